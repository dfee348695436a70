"""The class of the plain layers in transformers' growing cache, which ours are made from."""

from typing import Any

from transformers import DynamicCache, cache_utils

# asked of a cache, because the class is not among transformers' public names
_kind = DynamicCache().layer_class_to_replicate
DynamicLayer: Any = _kind if isinstance(_kind, type) else cache_utils.DynamicLayer
