"""The classes of layers in transformers' growing cache: plain ones, which ours are made from, and those of a window."""

import sys
from typing import Any

from transformers import DynamicCache, cache_utils

# asked of a cache, because the class is not among transformers' public names
_kind = DynamicCache().layer_class_to_replicate
DynamicLayer: Any = _kind if isinstance(_kind, type) else cache_utils.DynamicLayer
_Window: Any = getattr(cache_utils, "DynamicSlidingWindowLayer", None)


def full_attention(layer: Any) -> int:
    """Tokens up to which attention over a layer is over all that it has been given; 0 if the layer is of another kind."""
    if type(layer) is DynamicLayer:
        return sys.maxsize
    window = getattr(layer, "sliding_window", None) if type(layer) is _Window else None
    return window if isinstance(window, int) else 0


def full_attention_of(config: Any) -> int:
    """The same for all layers that a model of this configuration caches."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return min(map(full_attention, layers), default=0)
