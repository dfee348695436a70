"""Rotary modules of transformers: what their angles depend on."""

import copy
import inspect
import sys
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# kinds (`rope_type`) whose angles follow from the position alone
_STATIC = frozenset({"default", "linear", "llama3", "yarn", "ntk_alpha", "proportional"})
_LONG = "longrope"  # other angles for all tokens of a text that is longer than those of the first training
_DYNAMIC = "dynamic"  # other angles for each length of a text beyond what the model was trained for
_LENGTH, _FIRST_LENGTH = (
    "max_seq_len_cached",
    "original_max_seq_len",
)  # of the longest text so far, and of an empty one
_FREQUENCIES, _FIRST_FREQUENCIES = "inv_freq", "original_inv_freq"
_REWRITTEN = {
    _LONG: frozenset({_FREQUENCIES, "long_inv_freq"}),
    _DYNAMIC: frozenset({_FREQUENCIES, _FIRST_FREQUENCIES, _LENGTH, "attention_scaling"}),
}
_TYPE = "layer_type"  # an argument of those that have several tables


class Kind(NamedTuple):
    """What angles depend on besides the position: breaks are lengths of a text beyond which all are others, and beyond
    `last` they are others for each length.
    """

    breaks: tuple[int, ...] = ()
    last: int | None = None


def kind_of(rotary: Any, layer_type: str | None = None) -> Kind | None:
    """The kind of a rotary module, for layers of a type where it has several; None if it is not known."""
    name = getattr(rotary, "rope_type", None)
    if isinstance(name, dict):
        name = name.get(layer_type)
    if not isinstance(name, str):
        return None
    if name in _STATIC:
        return Kind()
    if name == _LONG:
        length = _original_length(rotary, layer_type)
        return None if length is None else Kind((length,))
    length = getattr(rotary, _FIRST_LENGTH, None)
    if name == _DYNAMIC and not isinstance(rotary.rope_type, dict) and isinstance(length, int):
        return Kind(last=length)
    return None


def steady_length(modules: Iterable[nn.Module]) -> int:
    """Tokens of the longest text in which all angles are what they were when its beginning was read alone; sys.maxsize if
    that holds for any text, 0 if a rotary module among these is of a kind that is not known.
    """
    lengths = [sys.maxsize]
    for module in modules:
        names = vars(module).get("rope_type")
        for layer_type in names if isinstance(names, dict) else () if names is None else (None,):
            kind = kind_of(module, layer_type)
            if kind is None:
                return 0
            lengths += [*kind.breaks, *(() if kind.last is None else (kind.last,))]
    return min(lengths)


def frequencies(
    kind: str, settings: Mapping[str, Any], size: int, base: float, max_length: int, length: int | None = None
) -> tuple[Tensor, float]:
    """(angles of position 1, float32 [size / 2]; factor of all cosines and sines) of RoPE, as transformers computes it.

    kind: "default", or a key of its `ROPE_INIT_FUNCTIONS` with what that reads in `settings`. max_length:
    `max_position_embeddings`. length: of the text, for kinds whose angles depend on it.
    """
    if kind == "default":
        return 1.0 / base ** (torch.arange(0, size, 2).float() / size), 1.0
    given = {**settings, "rope_type": kind, "rope_theta": base}
    first_length = given.get("original_max_position_embeddings")
    if kind == _LONG and given.get("factor") is not None:
        max_length = given["factor"] * first_length  # releases of 4.x take the quotient in any case
    config = SimpleNamespace(
        rope_theta=base,
        rope_scaling=given,
        rope_parameters=given,
        standardize_rope_params=lambda: None,  # releases of 5.x call it
        max_position_embeddings=max_length,
        original_max_position_embeddings=first_length,
        head_dim=size,
        hidden_size=size,
        num_attention_heads=1,
        partial_rotary_factor=1.0,
    )
    found, factor = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=length)
    return found, float(factor)


def takes_types(rotary: nn.Module) -> bool:
    """Whether its forward has to be told the type of the layers that angles are for."""
    return _TYPE in inspect.signature(type(rotary).forward).parameters


def of_base(rotaries: Iterable[Any], base: float) -> nn.Module | None:
    """That of several rotary modules whose angles have this base; None if there is none."""
    return next((each for each in rotaries if each.config.rope_parameters["rope_theta"] == base), None)


def angles(rotary: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None) -> Any:
    """What the forward of its class gives for these positions; None if it has none for this type. x: tells the dtype."""
    kinds = vars(rotary).get("rope_type")
    if isinstance(kinds, dict) and layer_type not in kinds:
        return None
    more = {_TYPE: layer_type} if takes_types(rotary) else {}
    return type(rotary).forward(rotary, x, position_ids, **more)


def rewritten(module: nn.Module) -> frozenset[str]:
    """Names of buffers and attributes that a module's own forward writes, from its arguments and from all others."""
    name = vars(module).get("rope_type")
    return _REWRITTEN.get(name, frozenset()) if isinstance(name, str) else frozenset()


def begin_anew(module: nn.Module) -> None:
    """Let a rotary module forget the texts that it has seen, if its angles follow from the longest one."""
    state, buffers = vars(module), module._buffers
    first = buffers.get(_FIRST_FREQUENCIES)
    if state.get("rope_type") == _DYNAMIC and first is not None and _FIRST_LENGTH in state:
        state[_LENGTH] = state[_FIRST_LENGTH]
        buffers[_FREQUENCIES] = first.clone()


def twin(rotary: nn.Module) -> nn.Module:
    """A rotary module with the same attributes and buffers of its own, which has seen no text."""
    made = copy.copy(rotary)
    made._buffers = {name: None if each is None else each.clone() for name, each in rotary._buffers.items()}
    begin_anew(made)
    return made


def _original_length(rotary: Any, layer_type: str | None) -> int | None:
    config = rotary.config
    settings: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    settings = settings.get(layer_type, settings)
    name = "original_max_position_embeddings"
    # releases of 4.x read the field of the config first
    length = settings.get(name) or getattr(config, name, None)
    return length if isinstance(length, int) else None
