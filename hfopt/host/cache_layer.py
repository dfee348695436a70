"""The class of the plain layers in transformers' growing cache, which ours are made from."""

from typing import Any

from transformers import DynamicCache

# asked of a cache, because the class is not among transformers' public names
DynamicLayer: Any = DynamicCache().layer_class_to_replicate
