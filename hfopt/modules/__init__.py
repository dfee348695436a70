"""Building blocks of models, by the names that ipex.llm.modules gives them."""

from .paged import PagedAttention
from .varlen import VarlenAttention

__all__ = ["PagedAttention", "VarlenAttention"]
