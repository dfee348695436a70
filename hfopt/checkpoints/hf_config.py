"""The `quantization_config` in the `config.json` of a quantised model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfopt.errors import InvalidInput
from hfopt.host import LINEARS, Features
from hfopt.quantization import Format, QuantizationConfig, config_of, resolve
from hfopt.quantization.plan import Layer, Plan, plan

METHOD = "hfopt"


@register_quantization_config(METHOD)
class HfoptConfig(QuantizationConfigMixin):
    """Formats of a model for `from_pretrained(..., quantization_config=...)`, as `config.json` holds them.

    body: a format or its name. head, skip: as in `QuantizationConfig`. modules: formats of single linear layers by their
    names, None for floats. ordered: the layers whose inputs are in an order of their own (`Packed.order`).
    Unknown formats and fields raise InvalidInput.

    Example:
        >>> import hfopt
        >>> from transformers import AutoModelForCausalLM
        >>> config = hfopt.HfoptConfig("int8", head=None, skip=("*.down_proj",))
        >>> model = AutoModelForCausalLM.from_pretrained(hfopt.embedded_model(), quantization_config=config)
        >>> model.model.layers[0].mlp.up_proj
        QuantizedLinear(in_features=256, out_features=384, bias=False, format=Int8(group=None, ...
    """

    def __init__(
        self,
        body: str | Mapping[str, Any] | Format = "int8",
        *,
        modules: Mapping[str, Any] | None = None,
        ordered: Sequence[str] = (),
        quant_method: str = METHOD,
        **rest: Any,
    ) -> None:
        if quant_method != METHOD:
            raise InvalidInput(f"quant_method={quant_method!r}: {METHOD!r} is what HfoptConfig is for")
        if (
            not isinstance(modules or {}, Mapping)
            or isinstance(ordered, str)
            or not isinstance(ordered, Iterable)
        ):
            raise InvalidInput(
                f"modules={modules!r} and ordered={ordered!r} must be a dictionary and a list of names"
            )
        self.quant_method: Any = METHOD
        self.quantization = QuantizationConfig.from_dict({"body": resolve(body).to_dict(), **rest})
        self.modules = {
            path: None if format is None else resolve(format) for path, format in (modules or {}).items()
        }
        self.ordered = frozenset(ordered)

    @classmethod
    def of(cls, quantization: Any) -> HfoptConfig:
        """Config from what `hfopt.load` and `hfopt.optimize` take."""
        if isinstance(quantization, cls):
            return quantization
        config = cls()
        config.quantization = config_of(quantization)
        return config

    def format_of(self, path: str, *, is_head: bool) -> Format | str:
        """Format for the linear layer at this path; or in words, why it is left."""
        if path in self.modules:
            return self.modules[path] or "modules names it, with None"
        return self.quantization.format_of(path, is_head=is_head)

    def formats_of(self, model: PreTrainedModel) -> dict[str, Format | str]:
        """`format_of` all linear layers."""
        head = model.get_output_embeddings()
        return {
            path: self.format_of(path, is_head=linear is head) for path, linear in linears_of(model).items()
        }

    def plan(self, model: PreTrainedModel, done: Collection[str] = ()) -> Plan:
        """Plan the linear layers of a model, but for those that are done.

        Raises InvalidInput for a format that fits no layer.
        """
        self.quantization.warn_of_unused(model)
        head, decoder = model.get_output_embeddings(), set(model.base_model.modules())
        layers = {
            path: Layer(
                Features.of(linear).inputs,
                is_head=linear is head,
                in_decoder=linear in decoder,
                obstacle=None if type(linear) in LINEARS else f"it is a {type(linear).__name__}",
            )
            for path, linear in model.named_modules()
            if isinstance(linear, LINEARS) and path not in done
        }
        return plan(layers, self)

    def to_dict(self) -> dict[str, Any]:
        """Fields for JSON."""
        return {
            "quant_method": METHOD,
            **self.quantization.to_dict(),
            "modules": {
                path: None if format is None else format.to_dict() for path, format in self.modules.items()
            },
            "ordered": sorted(self.ordered),
        }


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that may be quantised, by their paths."""
    return {path: module for path, module in model.named_modules() if type(module) in LINEARS}
