"""The classes of layers in transformers' growing cache, which ours are made from: plain ones, and those of a window."""

import sys
from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache, cache_utils

# asked of a cache, because the class is not among transformers' public names
_kind = DynamicCache().layer_class_to_replicate
DynamicLayer: Any = _kind if isinstance(_kind, type) else cache_utils.DynamicLayer
WindowedLayer: Any = cache_utils.DynamicSlidingWindowLayer


def window_of(layer: Any) -> int | None:
    """Tokens that each token sees of those in a layer of a cache, itself included: sys.maxsize if all; None if the layer
    is of another kind.
    """
    if type(layer) is DynamicLayer:
        return sys.maxsize
    window = layer.sliding_window if type(layer) is WindowedLayer else None
    return window if isinstance(window, int) and window > 1 else None


def layer_kinds(config: Any) -> Sequence[str]:
    """What a model of this configuration calls the kind of each of its layers; none if they are of one kind."""
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
    return kinds if isinstance(kinds, list | tuple) else ()


def windows_of(config: Any) -> list[int | None]:
    """The same for each layer that a model of this configuration caches."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return [window_of(layer) for layer in layers]
