"""Bringing a cache back to the beginning of what it holds, for a text that goes on otherwise from there."""

from __future__ import annotations

from typing import Any

from transformers import Cache, DynamicCache

from hfopt.cache.layer import IndirectLayer
from hfopt.host import cached_length, holding, window_of


def crop_to(cache: Cache | None, length: int) -> bool:
    """Let a cache keep its first `length` tokens, of at least as many; False if it cannot, and then it is to be dropped.

    Caches that can are growing ones with layers of keys and values alone. A layer of a window cannot once it has lost what
    those tokens see; one with a recurrent state, of which only the last is there, is not asked.
    """
    n_held = cached_length(cache)
    if not isinstance(cache, DynamicCache) or n_held is None:
        return False
    layers, n_surplus = holding(cache.layers), n_held - length
    if not layers or not all(_goes_back(layer, n_held, n_surplus) for layer in layers):
        return False
    if n_surplus:
        try:
            cache.crop(-n_surplus)
        except (RuntimeError, ValueError):  # a window, in words that releases differ in
            return False
    return cached_length(cache) == length


def _goes_back(layer: Any, n_held: int, n_surplus: int) -> bool:
    if isinstance(layer, IndirectLayer):
        return True  # it raises, with nothing changed, where it cannot
    window = window_of(layer)
    # past a window, transformers' crop of a layer that records its past does not ask whether it is all there
    return window is not None and (not n_surplus or n_held < window)
