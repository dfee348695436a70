"""Which Linears of a model get packed weights, and how that is done: one after the other, in place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfopt.errors import InvalidInput, UnsupportedModel
from hfopt.host import LINEARS, Conv1D, Features, by_outputs
from hfopt.modules.guards import has_own_forward
from hfopt.modules.quantized import QuantizedLinear, quantize_linear, unquantize_linear
from hfopt.modules.sharded import ShardedLinear
from hfopt.modules.weights import original_class
from hfopt.patches.linear import Linear
from hfopt.patches.replacement import Replacement, swap, unswap
from hfopt.patches.weights import lay_by_inputs
from hfopt.quantization import Format, InputStatistics, QuantizationConfig
from hfopt.quantization.plan import Layer, plan
from hfopt.words import DTYPES


@dataclass(frozen=True)
class Quantized:
    """A Linear with a packed weight: its format, the bytes of it, and those of a float weight that are saved.

    tied_to: the embedding whose weight the Linear shared; it stays, so that nothing is saved.
    """

    path: str
    format: str
    n_bytes: int
    saved_bytes: int
    tied_to: str | None


class Packing:
    """Linears of a model that a config gives packed weights. left: those that stay as they are, and why.

    Raises InvalidInput for weights that are not finite, for a model that is quantised already, otherwise, and for formats
    that fit no layer.
    """

    def __init__(self, model: nn.Module, config: QuantizationConfig) -> None:
        config.warn_of_unused(model)
        self._model = model
        formats, self.left = plan(_layers(model), config)
        self._planned: dict[str, tuple[Any, Format]] = {}
        for path, format in formats.items():
            module: Any = model.get_submodule(path)
            ends = torch.stack(module.weight.detach().aminmax())
            if not bool(ends.isfinite().all()):
                raise InvalidInput(f"{path}.weight must be finite to be quantised: it has NaN or Inf")
            self._planned[path] = module, format

    def __len__(self) -> int:
        return len(self._planned)

    @property
    def linears(self) -> dict[str, nn.Module]:
        """Linears that are to be packed, by paths."""
        return {path: module for path, (module, _) in self._planned.items()}

    def apply(
        self,
        inputs: Mapping[str, InputStatistics | None],
        advance: Callable[[], None],
        *,
        keep_original: bool,
    ) -> None:
        """Pack one weight after the other; each float weight is freed as soon as it is packed.

        inputs: the paths, and what is known of the inputs there. advance: called after each weight.
        Nothing else may hold the weights, records of earlier calls for example.
        """
        for module in self._model.modules():
            if isinstance(module, Replacement):
                module._hfopt.weights.clear()
        for path, known in inputs.items():
            module, format = self._planned[path]
            packed = format.pack(by_outputs(module, module.weight), known)
            record = module.__dict__.get("_hfopt")
            if record is not None:
                unswap(module)
            quantize_linear(module, packed, keep_original=keep_original)
            if record is not None:
                swap(module, Linear, record)
            advance()


def _layers(model: nn.Module) -> dict[str, Layer]:
    """Linears of a model, as far as a plan depends on them."""
    head, decoder = head_of(model), set(_decoder(model).modules())
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, LINEARS):
            packed = module.format if isinstance(module, QuantizedLinear) else None
            layers[path] = Layer(
                Features.of(module).inputs,
                is_head=module is head,
                in_decoder=module in decoder,
                obstacle=None if packed is not None else _obstacle(model, path, module),
                packed=packed,
            )
    return layers


def head_of(model: nn.Module) -> nn.Module | None:
    """The Linear that gives logits."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            head: nn.Module | None = module.get_output_embeddings()
            if head is not None:
                return head
    return None


def _decoder(model: nn.Module) -> nn.Module:
    """The model without what stands behind its layers; the module itself if it is no model of transformers."""
    found = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next((module.base_model for module in found), model)


def _obstacle(model: nn.Module, path: str, module: nn.Module) -> str | None:
    """Reason in words why this Linear cannot be quantised; None if it can."""
    if original_class(module) not in (*LINEARS, ShardedLinear):
        return f"it is a {type(module).__name__}"
    if "_hf_hook" in module.__dict__ or has_own_forward(module):
        return "its forward is wrapped (accelerate, tensor parallelism)"
    if _is_adapter(model, path):
        return "it is a part of an adapter"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter"  # but computed from others, by `weight_norm` for example
    if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
        return f"its weight is a {type(weight).__name__}, {weight.dtype}"
    return None


def _is_adapter(model: nn.Module, path: str) -> bool:
    """Whether a module above it has the model's own layer as another child."""
    parent, _, name = path.rpartition(".")
    while name:
        children = model.get_submodule(parent)._modules
        if "base_layer" in children and name != "base_layer":
            return True
        parent, _, name = parent.rpartition(".")
    return False


def quantized(model: nn.Module) -> tuple[Quantized, ...]:
    """Every quantised Linear of the model, in its order."""
    head, embedding = head_of(model), _tied_embedding(model)
    found = []
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            n_bytes = module.packed.nbytes
            tied_to = embedding if module is head else None
            floats = module.out_features * module.in_features * module.weight_dtype.itemsize
            saved = (0 if tied_to is not None or module.original is not None else floats) - n_bytes
            found.append(Quantized(path, str(module.format), n_bytes, saved, tied_to))
    return tuple(found)


def _tied_embedding(model: nn.Module) -> str | None:
    """Path of the embedding that the head of the model shares its weight with, by its configuration."""
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            embedding = module.get_input_embeddings()
            is_tied = getattr(module.config.get_text_config(), "tie_word_embeddings", False)
            if not is_tied or not isinstance(embedding, nn.Embedding):
                return None
            return next(path for path, each in model.named_modules() if each is embedding)
    return None


def check_originals(model: nn.Module) -> None:
    """Raises UnsupportedModel if a float weight is gone."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.original is None:
            raise UnsupportedModel(
                f"restore: the float weight of {path} is gone since the model was quantised; load the model again, or "
                "quantise it with optimize(..., keep_original=True)"
            )


def unpack(model: nn.Module) -> None:
    """Gives quantised Linears their float weights back; nothing may be swapped any more."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            unquantize_linear(module)
            if isinstance(module, Conv1D):
                lay_by_inputs(module)
