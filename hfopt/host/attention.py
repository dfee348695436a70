"""Which function computes a module's attention: transformers' own, or one that somebody has registered."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, Literal

from transformers import modeling_utils

_NOTHING: Mapping[str, Any] = {}


def _of(module: str, name: str) -> Any:
    """An object of transformers by its place; None in a release that has none there."""
    try:
        return getattr(__import__(f"transformers.{module}", fromlist=[name]), name, None)
    except ImportError:
        return None


_FUNCTIONS: Any = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", _NOTHING)
_MASKS: Any = _of("masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS") or _NOTHING
# name -> the function that models look up ("eager": none, each file has its own), and the one that makes masks for it
_OWN: dict[Any, tuple[Any, Any]] = {
    "sdpa": (_of("integrations.sdpa_attention", "sdpa_attention_forward"), _of("masking_utils", "sdpa_mask")),
    "eager": (None, _of("masking_utils", "eager_mask")),
}


def attention_kind(config: Any, kind: type, names: frozenset[str]) -> Literal["sdpa", "eager"] | None:
    """Which of transformers' own functions, with masks of transformers' own for it, modules of this class go through now;
    None for all others, which only they can compute, and where this release does not tell.

    names: those that the class reads. A class whose attention is in its own code counts as "eager".
    """
    name: Any = getattr(config, "_attn_implementation", None)
    function, mask = _OWN.get(name, (None, None))
    if mask is None or _MASKS.get(name) is not mask or (name == "sdpa" and function is None):
        return None
    table = _table(kind, names)
    found = None if table is None else table.get(name)
    return name if found is function else None


@functools.cache
def _table(kind: Any, names: frozenset[str]) -> Any:
    """Where modules of this class look their attention function up; None if they do not."""
    if "_attn_implementation" not in names:
        return None
    known = inspect.unwrap(kind.forward).__globals__
    tables = (known[name] for name in names & known.keys())
    return next((each for each in tables if isinstance(each, type(_FUNCTIONS))), _FUNCTIONS)


def registered_attention(config: Any) -> tuple[Any, Any]:
    """The functions that the name of this config's attention stands for: one that computes it, one that makes masks."""
    name = getattr(config, "_attn_implementation", None)
    return _FUNCTIONS.get(name), _MASKS.get(name)
