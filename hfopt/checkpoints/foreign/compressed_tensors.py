"""Layers as compressed-tensors writes integer weights (llm-compressor's W8A8, W8A16 and W4A16).

    int-quantized, naive-quantized (8 bits)
        weight             int8   [out, in]
        weight_zero_point  int8   [out, n_groups]                where the weights are asymmetric
    pack-quantized (4 or 8 bits), numbers shifted by half of their range, lowest bits first
        weight_packed      int32  [out, ceil(in bits / 32)]
        weight_shape       int    [2]
        weight_zero_point  int32  [ceil(out bits / 32), n_groups]
    both
        weight_scale       float  [out, n_groups]                one group for the strategy "channel"
        weight_g_idx       int32  [in]                           the group of every input, if they are not in order

How inputs are to be quantised (`input_activations`) is left to the format's own compute mode.
"""

import re
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
    order_of,
    packed_integers,
)
from hfopt.errors import CorruptCheckpoint, UnsupportedModel
from hfopt.quantization.packed import Packed

UNPACKED = ("int-quantized", "naive-quantized")
PACKED = "pack-quantized"


def scheme_of(layer: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config_groups that is for this layer: by its name, by a pattern, or for all that are Linear."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CorruptCheckpoint(f"{layer}: quantization_config has no config_groups")
    for generic in (False, True):
        for scheme in groups.values():
            for target in scheme.get("targets") or ():
                pattern = target[3:] if target.startswith("re:") else re.escape(target) + "$"
                if target == "Linear" if generic else re.match(pattern, layer):
                    return scheme
    raise UnsupportedModel(f"{layer}: no group of config_groups in quantization_config names it")


def read_compressed_tensors(
    layer: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], compute: str
) -> Packed:
    scheme = scheme_of(layer, config)
    weights = scheme.get("weights") or {}
    option(layer, weights, "type", ("int",), "int")
    symmetric = option(layer, weights, "symmetric", (True, False), True)
    strategy = option(layer, weights, "strategy", ("channel", "group"))
    written = scheme.get("format") or config.get("format")
    option(layer, {"format": written}, "format", (*UNPACKED, PACKED))
    bits = option(layer, weights, "num_bits", (4, 8) if written == PACKED else (8,))
    group = group_of(layer, bits, weights.get("group_size")) if strategy == "group" else None
    source = Tensors(layer, tensors)
    middle = 1 << (bits - 1)

    if written == PACKED:
        shape = source.get("weight_shape", (2,), torch.int32, torch.int64)
        out_features, in_features = map(int, shape)
        words = source.get("weight_packed", (out_features, -(-in_features * bits // 32)), torch.int32)
        codes = fields(words, bits)[:, :in_features]
    else:
        weight = source.get("weight", (None, None), torch.int8)
        out_features, in_features = weight.shape
        codes = weight.view(torch.uint8) ^ middle
    n_groups = n_groups_of(layer, in_features, group)
    why = f" for {in_features} inputs and group_size={group or -1}"
    scales = source.get("weight_scale", (out_features, n_groups), *SCALES, why=why)

    zeros = None
    if not symmetric and written == PACKED:
        size = (-(-out_features * bits // 32), n_groups)
        words = source.get("weight_zero_point", size, torch.int32, why=why)
        zeros = fields(words.t(), bits)[:, :out_features].t()
    elif not symmetric:
        points = source.get("weight_zero_point", (out_features, n_groups), torch.int8, why=why)
        zeros = points.view(torch.uint8) ^ middle
    order = None
    if "weight_g_idx" in source:
        g_idx = source.get("weight_g_idx", (in_features,), torch.int32, torch.int64, why=why)
        order = order_of(layer, g_idx, group, n_groups)
    return packed_integers(layer, bits, group, codes, scales, zeros, order, compute)
