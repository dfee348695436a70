"""Rotary modules of transformers: what their angles depend on."""

import copy
from typing import Any, NamedTuple

from torch import nn

# kinds (`rope_type`) whose angles follow from the position alone
_STATIC = frozenset({"default", "linear", "llama3", "yarn"})
_LONG = "longrope"  # other angles for all tokens of a text that is longer than those of the first training
_REWRITTEN = frozenset({"inv_freq", "long_inv_freq"})


class Kind(NamedTuple):
    """What angles depend on besides the position: breaks are lengths of a text beyond which all are others."""

    breaks: tuple[int, ...] = ()


def kind_of(rotary: Any) -> Kind | None:
    """The kind of a rotary module; None if it is not known."""
    name = getattr(rotary, "rope_type", None)
    if not isinstance(name, str):
        return None
    if name in _STATIC:
        return Kind()
    if name == _LONG:
        length = _original_length(rotary)
        return None if length is None else Kind((length,))
    return None


def rewritten(module: nn.Module) -> frozenset[str]:
    """Names of buffers and attributes that a module's own forward writes, from its arguments and from all others."""
    return _REWRITTEN if vars(module).get("rope_type") == _LONG else frozenset()


def twin(rotary: nn.Module) -> nn.Module:
    """A rotary module with the same attributes and buffers of its own."""
    made = copy.copy(rotary)
    made._buffers = {name: None if each is None else each.clone() for name, each in rotary._buffers.items()}
    return made


def _original_length(rotary: Any) -> int | None:
    config = rotary.config
    settings: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    name = "original_max_position_embeddings"
    # releases of 4.x read the field of the config first
    length = settings.get(name) or getattr(config, name, None)
    return length if isinstance(length, int) else None
