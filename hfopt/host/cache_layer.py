"""The classes of layers in transformers' growing cache, which ours are made from: plain ones, and those of a window."""

import sys
from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache, cache_utils

# asked of a cache, because the class is not among transformers' public names
_kind = DynamicCache().layer_class_to_replicate
DynamicLayer: Any = _kind if isinstance(_kind, type) else cache_utils.DynamicLayer
WindowedLayer: Any = cache_utils.DynamicSlidingWindowLayer
_EmptyLayer: Any = getattr(cache_utils, "DummyLayer", None)  # older releases have none in its place


def window_of(layer: Any) -> int | None:
    """Tokens that each token sees of those in a layer of a cache, itself included: sys.maxsize if all; None if the layer
    is of another kind.
    """
    if type(layer) is DynamicLayer:
        return sys.maxsize
    window = layer.sliding_window if type(layer) is WindowedLayer else None
    return window if isinstance(window, int) and window > 1 else None


def layer_kinds(config: Any) -> Sequence[tuple[str, bool]]:
    """What a model of this configuration calls the kind of each of its layers, and whether that reads the keys of another;
    none if they are of one kind.
    """
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if not isinstance(kinds, list | tuple):
        return ()
    n_own = len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)
    return [(kind, index >= n_own) for index, kind in enumerate(kinds)]


def windows_of(config: Any) -> list[int | None]:
    """The same for each layer that a model of this configuration caches."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return [window_of(layer) for layer in holding(layers)]


def holding(layers: Sequence[Any]) -> list[Any]:
    """Layers of a cache without the last ones that hold nothing, whose part of the model reads what others hold."""
    n_layers = len(layers)
    while n_layers and type(layers[n_layers - 1]) is _EmptyLayer:
        n_layers -= 1
    return list(layers[:n_layers])
