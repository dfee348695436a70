"""Building blocks for modelling code of one's own: modules that run in hfopt's kernels.

Their names and signatures are those of `ipex.llm.modules`. `hfopt.optimize` needs none of them.
"""

from hfopt.modules.linear import (
    Linear2SiluMul,
    LinearAdd,
    LinearAddAdd,
    LinearGelu,
    LinearMul,
    LinearNewGelu,
    LinearRelu,
    LinearSilu,
    LinearSiluMul,
)
from hfopt.modules.moe import GatedMLPMOE
from hfopt.modules.norm import FastLayerNorm, RMSNorm
from hfopt.modules.rotary import RotaryEmbedding

from .indirect import IndirectAccessKVCacheAttention
from .paged import PagedAttention
from .varlen import VarlenAttention

__all__ = [
    "FastLayerNorm",
    "GatedMLPMOE",
    "IndirectAccessKVCacheAttention",
    "Linear2SiluMul",
    "LinearAdd",
    "LinearAddAdd",
    "LinearGelu",
    "LinearMul",
    "LinearNewGelu",
    "LinearRelu",
    "LinearSilu",
    "LinearSiluMul",
    "PagedAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "VarlenAttention",
]
