"""Operations on torch tensors: check, allocate, call a kernel.

Forward only: results carry no gradients. Tensors that a kernel cannot work on raise
`hfopt.errors.InvalidInput`.
"""

from .activation import ACTIVATIONS
from .attention import Mask, attend, prepare_mask
from .builder import Builder
from .choice import Kernels
from .linear import LinearWeights, Weights, linear
from .listing import Instruction, Listing
from .mixed import MixedWeights
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .program import Program, Table
from .quantized import QuantizedMatrix, QuantizedWeights, quantized_linear
from .rotary import rotate_and_store
from .sampling import argmax, log_softmax_top_k
from .step import Ends, StepScratch, choose, prefill, step
from .writer import Slot

__all__ = [
    "ACTIVATIONS",
    "Builder",
    "Ends",
    "Instruction",
    "Kernels",
    "LinearWeights",
    "Listing",
    "Mask",
    "MixedWeights",
    "Program",
    "QuantizedMatrix",
    "QuantizedWeights",
    "Slot",
    "StepScratch",
    "Table",
    "Weights",
    "add_layer_norm",
    "add_rms_norm",
    "argmax",
    "attend",
    "choose",
    "layer_norm",
    "linear",
    "log_softmax_top_k",
    "prefill",
    "prepare_mask",
    "quantized_linear",
    "rms_norm",
    "rotate_and_store",
    "step",
]
