"""Formats of quantised weights: their configs, their arithmetic, and the layout that kernels read."""

from hfopt.quantization.config import QuantizationConfig, config_of
from hfopt.quantization.feedback import InputStatistics, block_inputs
from hfopt.quantization.format import FORMATS, Format, from_dict, register, resolve
from hfopt.quantization.int4 import Int4
from hfopt.quantization.int8 import Int8
from hfopt.quantization.layout import QuantizedMatrix
from hfopt.quantization.nf4 import NF4
from hfopt.quantization.packed import Packed, layout_of, misfit, packed_from

__all__ = [
    "FORMATS",
    "NF4",
    "Format",
    "InputStatistics",
    "Int4",
    "Int8",
    "Packed",
    "QuantizationConfig",
    "QuantizedMatrix",
    "block_inputs",
    "config_of",
    "from_dict",
    "layout_of",
    "misfit",
    "packed_from",
    "register",
    "resolve",
]
