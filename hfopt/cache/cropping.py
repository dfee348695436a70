"""A cache brought back to the beginning of what it holds, for a text that goes on otherwise from there."""

from __future__ import annotations

from typing import Any

from transformers import Cache, DynamicCache

from hfopt.cache.layer import IndirectLayer
from hfopt.host import cached_length, holding, window_of


def crop_to(cache: Cache | None, length: int) -> bool:
    """Let a cache keep its first `length` tokens, of at least as many; False if it cannot, and then it is to be dropped.

    Those that can are growing ones with layers of keys and values alone. A layer of a window cannot once it has lost what
    those tokens see; one with a recurrent state, of which only the last is there, is not asked.
    """
    n_held = cached_length(cache)
    if not isinstance(cache, DynamicCache) or n_held is None:
        return False
    layers = holding(cache.layers)
    if not layers or not all(map(_goes_back, layers)):
        return False
    if n_held != length:
        try:
            cache.crop(length - n_held)
        except (RuntimeError, ValueError):  # a window, in words that releases differ in
            return False
    return cached_length(cache) == length


def _goes_back(layer: Any) -> bool:
    """Whether a layer holds keys and values alone; a window that records its past is cropped beyond it without a word."""
    is_known = isinstance(layer, IndirectLayer) or window_of(layer) is not None
    return is_known and not getattr(layer, "record_past", False)
