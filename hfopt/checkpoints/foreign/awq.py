"""Layers as AutoAWQ writes them for its version "gemm": 4 bits.

qweight  int32  [in, out / 8]         codes of eight outputs in the order 0 2 4 6 1 3 5 7, lowest bits first
qzeros   int32  [n_groups, out / 8]   zero points in the same order
scales   float  [n_groups, out]
"""

from collections.abc import Mapping
from typing import Any

import torch

from hfopt.checkpoints.foreign.integers import (
    SCALES,
    Tensors,
    fields,
    group_of,
    n_groups_of,
    option,
    packed_integers,
)
from hfopt.quantization.packed import Packed

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where a word holds its first, second ... output


def outputs(words: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 8 n] from words [..., n], in the order of the outputs."""
    return fields(words, 4).unflatten(-1, (-1, 8))[..., PLACES].flatten(-2)


def read_awq(
    layer: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], compute: str
) -> Packed:
    bits = option(layer, config, "bits", (4,))
    version = str(config.get("version", "gemm")).lower()
    option(layer, {"version": version}, "version", ("gemm",))
    option(layer, config, "zero_point", (True,), True)
    group = group_of(layer, bits, config.get("group_size", -1))
    source = Tensors(layer, tensors)

    words = source.get("qweight", (None, None), torch.int32)
    in_features, out_features = len(words), 8 * words.shape[1]
    n_groups = n_groups_of(layer, in_features, group)
    why = f" for {in_features} inputs and group_size={group or -1}"
    scales = source.get("scales", (n_groups, out_features), *SCALES, why=why)
    zeros = outputs(source.get("qzeros", (n_groups, words.shape[1]), torch.int32, why=why))
    return packed_integers(layer, bits, group, outputs(words).t(), scales.t(), zeros.t(), None, compute)
