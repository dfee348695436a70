"""Which Linears of a model are quantised, and how."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from hfopt.errors import InvalidInput
from hfopt.host import LINEARS
from hfopt.quantization.format import Format, from_dict, resolve
from hfopt.quantization.int8 import Int8

logger = logging.getLogger(__name__)

HEAD = Int8()
_FIELDS = ("body", "head", "skip")


@dataclass(frozen=True)
class QuantizationConfig:
    """The formats of a model.

    body: of the Linears of the decoder. head: of the one behind it that gives logits; "body" for the same, None to leave
    it. skip: patterns of the `fnmatch` module ("*.down_proj") for paths of Linears that are left as they are. Anything
    else raises InvalidInput.

    Example:
        >>> import hfopt
        >>> from hfopt.quantization import NF4, QuantizationConfig
        >>> config = QuantizationConfig(NF4(), head=None, skip=("*.layers.0.*",))
        >>> model = hfopt.load(hfopt.embedded_model(), quantization=config)
        >>> model.hfopt.left["lm_head"], model.hfopt.left["model.layers.0.mlp.up_proj"]
        ('head is None', "skip names it ('*.layers.0.*')")
    """

    body: Format
    head: Format | Literal["body"] | None = HEAD
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.body, Format):
            raise InvalidInput(f"body={self.body!r} must be a format, such as hfopt.quantization.Int8()")
        if not (self.head is None or self.head == "body" or isinstance(self.head, Format)):
            raise InvalidInput(f'head={self.head!r} must be a format, "body" or None')
        is_several = isinstance(self.skip, Iterable) and not isinstance(self.skip, str)
        if not is_several or not all(isinstance(pattern, str) for pattern in self.skip):
            raise InvalidInput(f"skip={self.skip!r} must be a tuple of patterns")
        object.__setattr__(self, "skip", tuple(self.skip))

    def format_of(self, path: str, *, is_head: bool) -> Format | str:
        """The format for the Linear at this path; or in words, why it is left."""
        pattern = next((pattern for pattern in self.skip if fnmatchcase(path, pattern)), None)
        if pattern is not None:
            return f"skip names it ({pattern!r})"
        if not is_head or self.head == "body":
            return self.body
        return "head is None" if self.head is None else self.head

    def warn_of_unused(self, model: nn.Module) -> None:
        """Logs the patterns of `skip` that name none of a model's linear layers."""
        paths = [path for path, module in model.named_modules() if isinstance(module, LINEARS)]
        for pattern in self.skip:
            if not any(fnmatchcase(path, pattern) for path in paths):
                logger.warning("skip: %r names no linear layer of the model", pattern)

    def to_dict(self) -> dict[str, Any]:
        """Fields for JSON."""
        head = self.head.to_dict() if isinstance(self.head, Format) else self.head
        return {"body": self.body.to_dict(), "head": head, "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizationConfig":
        """The inverse of `to_dict`; unknown names and values raise InvalidInput."""
        if unknown := sorted(values.keys() - set(_FIELDS)):
            raise InvalidInput(f"a quantization config has no options {unknown}; options are {list(_FIELDS)}")
        if not isinstance(values.get("body"), Mapping):
            raise InvalidInput(f"body={values.get('body')!r} of a quantization config must be a dictionary")
        options = {name: value for name, value in values.items() if name != "body"}
        if isinstance(options.get("head"), Mapping):
            options["head"] = from_dict(options["head"])
        return cls(from_dict(values["body"]), **options)


def config_of(quantization: "str | Mapping[str, Any] | Format | QuantizationConfig") -> QuantizationConfig:
    """A config from the name or the dictionary of a format or of a config, from a format, or as it is."""
    if isinstance(quantization, QuantizationConfig):
        return quantization
    if isinstance(quantization, Mapping) and "body" in quantization:
        return QuantizationConfig.from_dict(quantization)
    return QuantizationConfig(resolve(quantization))
