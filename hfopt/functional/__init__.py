"""Operations on torch tensors: check, allocate, call a kernel.

Forward only: results carry no gradients. Tensors that a kernel cannot work on raise
`hfopt.errors.InvalidInput`.
"""

from .activation import ACTIVATIONS
from .add_norm import add_layer_norm, add_rms_norm
from .attention import Mask, attend, prepare_mask
from .choice import Kernels
from .epilogue import Epilogue
from .gated import activated_product, gelu_mul, silu_mul
from .indirect import indirect_access_kv_cache_attention
from .limit import clamp, softcap
from .linear import LinearWeights, Weights, linear
from .mixed import MixedWeights
from .norm import Norm, fast_layer_norm, layer_norm, norm, norm_heads, rms_norm
from .quantized import QuantizedWeights, quantized_linear
from .rotary import rotate, rotate_and_store
from .rotary_embedding import rotary_embedding
from .sampling import argmax, log_softmax_top_k
from .scale import scale
from .scoring import Scoring
from .varlen import varlen_attention
from .xielu import Xielu, xielu

__all__ = [
    "ACTIVATIONS",
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
    "activated_product",
    "add_layer_norm",
    "add_rms_norm",
    "argmax",
    "attend",
    "clamp",
    "fast_layer_norm",
    "gelu_mul",
    "indirect_access_kv_cache_attention",
    "layer_norm",
    "linear",
    "log_softmax_top_k",
    "norm",
    "norm_heads",
    "prepare_mask",
    "quantized_linear",
    "rms_norm",
    "rotary_embedding",
    "rotate",
    "rotate_and_store",
    "scale",
    "silu_mul",
    "softcap",
    "varlen_attention",
    "xielu",
]
