"""Building blocks of models, with the names and arguments of ipex.llm's modules."""

from .indirect import IndirectAccessKVCacheAttention

__all__ = ["IndirectAccessKVCacheAttention"]
