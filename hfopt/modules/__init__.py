"""Building blocks for modelling code of one's own: modules that run in hfopt's kernels.

Their names and signatures are those of `ipex.llm.modules`. `hfopt.optimize` needs none of them.
"""

from hfopt.modules.indirect import IndirectAccessKVCacheAttention
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
from hfopt.modules.mamba_mixer import MambaMixer
from hfopt.modules.moe import GatedMLPMOE
from hfopt.modules.norm import FastLayerNorm, RMSNorm
from hfopt.modules.paged import PagedAttention
from hfopt.modules.rotary import RotaryEmbedding
from hfopt.modules.varlen import VarlenAttention

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
    "MambaMixer",
    "PagedAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "VarlenAttention",
]
