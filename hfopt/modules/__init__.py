"""Building blocks for modelling code of one's own: modules that run in hfopt's kernels.

Their names and signatures are those of `ipex.llm.modules`. `hfopt.optimize` needs none of them.
"""

from .indirect import IndirectAccessKVCacheAttention
from .paged import PagedAttention
from .varlen import VarlenAttention

__all__ = ["IndirectAccessKVCacheAttention", "PagedAttention", "VarlenAttention"]
