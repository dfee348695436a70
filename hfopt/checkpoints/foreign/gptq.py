"""Layers as GPTQ's tools write them (AutoGPTQ, GPTQModel).

qweight  int32  [in bits / 32, out]       codes along the inputs, lowest bits first
qzeros   int32  [n_groups, out bits / 32] zero points along the outputs, one less than they are
                                          (checkpoint_format "gptq") or as they are ("gptq_v2")
scales   float  [n_groups, out]
g_idx    int32  [in]                      the group of every input (needed with desc_act)
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
    order_of,
    packed_integers,
)
from hfopt.quantization.packed import Packed


def read_gptq(
    layer: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], compute: str
) -> Packed:
    bits = option(layer, config, "bits", (4, 8))
    stored_less = option(layer, config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq") == "gptq"
    group = group_of(layer, bits, config.get("group_size", -1))
    source = Tensors(layer, tensors)
    per_word = 32 // bits

    words = source.get("qweight", (None, None), torch.int32)
    in_features, out_features = len(words) * per_word, words.shape[1]
    n_groups = n_groups_of(layer, in_features, group)
    why = f" for {bits} bits, {in_features} inputs and group_size={group or -1}"
    scales = source.get("scales", (n_groups, out_features), *SCALES, why=why)
    zeros = fields(source.get("qzeros", (n_groups, -(-out_features // per_word)), torch.int32, why=why), bits)
    if stored_less:
        zeros = (zeros + 1) & ((1 << bits) - 1)  # a zero point of 0 is stored as the largest number
    order = None
    if "g_idx" in source or option(layer, config, "desc_act", (True, False), False):
        g_idx = source.get("g_idx", (in_features,), torch.int32, torch.int64, why=why)
        order = order_of(layer, g_idx, group, n_groups)
    codes = fields(words.t(), bits)
    return packed_integers(layer, bits, group, codes, scales.t(), zeros[:, :out_features].t(), order, compute)
