"""Operations on torch tensors: check, allocate, call a kernel.

Forward only: results carry no gradients. Tensors that a kernel cannot work on raise
`hfopt.errors.InvalidInput`.
"""

from .activation import ACTIVATIONS
from .add_norm import add_layer_norm, add_rms_norm
from .attention import Mask, attend, prepare_mask
from .causal_conv import causal_conv1d, causal_conv1d_update
from .choice import Kernels
from .deltas import Delta, DeltaTables, activate, add_deltas, check_deltas, pieces_of
from .epilogue import Epilogue
from .gated import activated_product, gelu_mul, silu_mul
from .indirect import indirect_access_kv_cache_attention
from .limit import clamp, softcap
from .linear import LinearWeights, Weights, linear
from .lora import (
    bgmv_expand,
    bgmv_expand_slice,
    bgmv_shrink,
    sgmv_expand,
    sgmv_expand_slice,
    sgmv_shrink,
)
from .mixed import MixedWeights
from .norm import Norm, fast_layer_norm, layer_norm, norm, norm_heads, rms_norm
from .parts import attend_part, join_parts
from .quantized import QuantizedWeights, quantized_linear
from .rotary import rotate, rotate_and_store
from .rotary_embedding import rotary_embedding
from .sampling import argmax, log_softmax_top_k
from .scale import scale
from .scoring import Scoring
from .selective_scan import selective_scan, selective_state_update
from .varlen import varlen_attention
from .xielu import Xielu, xielu

__all__ = [
    "ACTIVATIONS",
    "Delta",
    "DeltaTables",
    "Epilogue",
    "Kernels",
    "LinearWeights",
    "Mask",
    "MixedWeights",
    "Norm",
    "QuantizedWeights",
    "Scoring",
    "Weights",
    "Xielu",
    "activate",
    "activated_product",
    "add_deltas",
    "add_layer_norm",
    "add_rms_norm",
    "argmax",
    "attend",
    "attend_part",
    "bgmv_expand",
    "bgmv_expand_slice",
    "bgmv_shrink",
    "causal_conv1d",
    "causal_conv1d_update",
    "check_deltas",
    "clamp",
    "fast_layer_norm",
    "gelu_mul",
    "indirect_access_kv_cache_attention",
    "join_parts",
    "layer_norm",
    "linear",
    "log_softmax_top_k",
    "norm",
    "norm_heads",
    "pieces_of",
    "prepare_mask",
    "quantized_linear",
    "rms_norm",
    "rotary_embedding",
    "rotate",
    "rotate_and_store",
    "scale",
    "selective_scan",
    "selective_state_update",
    "sgmv_expand",
    "sgmv_expand_slice",
    "sgmv_shrink",
    "silu_mul",
    "softcap",
    "varlen_attention",
    "xielu",
]
