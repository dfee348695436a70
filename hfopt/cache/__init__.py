"""The cache of keys and values: rows share what they have in common, and reordering moves none of them."""

from hfopt.cache.cropping import crop_to
from hfopt.cache.indirect import KV_CACHES, Appended, AppendedEverywhere, Buffers, IndirectCache
from hfopt.cache.prefix import PrefixCache
from hfopt.cache.sharded import ShardedLayer, Share
from hfopt.cache.storage import Layout

__all__ = [
    "KV_CACHES",
    "Appended",
    "AppendedEverywhere",
    "Buffers",
    "IndirectCache",
    "Layout",
    "PrefixCache",
    "ShardedLayer",
    "Share",
    "crop_to",
]
