"""Checkpoints that other tools have quantised: their integers and scales as packed matrices, bit by bit.

A new layout is one file and a row in `READERS`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hfopt.checkpoints.foreign.awq import read_awq
from hfopt.checkpoints.foreign.compressed_tensors import read_compressed_tensors
from hfopt.checkpoints.foreign.gptq import read_gptq
from hfopt.errors import UnsupportedModel
from hfopt.quantization.packed import Packed

Reader = Callable[[str, Mapping[str, torch.Tensor], Mapping[str, Any], str], Packed]

# quant_method of a quantization_config -> how a linear layer is read
READERS: dict[str, Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
}


def read_linear(
    layer: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], *, compute: str = "int8"
) -> Packed:
    """The weight of a linear layer from the tensors stored under its name, without that name ("qweight", ...).

    config: the checkpoint's quantization_config. compute: that of the format. What hfopt cannot read raises
    UnsupportedModel; tensors that are missing, damaged, or contradict the config raise CorruptCheckpoint.
    """
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise UnsupportedModel(
            f"{layer}: quant_method={method!r} of quantization_config is not among {sorted(READERS)}"
        )
    return READERS[method](layer, tensors, config, compute)


__all__ = ["READERS", "read_linear"]
