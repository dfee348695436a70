"""Quantised layers of known integers as other tools write them."""

from itertools import product
from typing import Any

import numpy as np
import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Known:
    """A layer of known integers: codes [out, in], zero points and scales [out, n_groups], the group of every input."""

    def __init__(
        self, bits: int, group: int, out: int = 24, inputs: int = 256, seed: int = 0, scatter: bool = False
    ) -> None:
        rng = np.random.default_rng(seed)
        self.bits, self.group = bits, group
        n_groups = 1 if group == -1 else inputs // group
        self.codes = rng.integers(0, 2**bits, (out, inputs))
        self.zeros = rng.integers(0, 2**bits, (out, n_groups))
        self.scales = rng.uniform(1e-3, 1e-1, (out, n_groups)).astype(np.float16)
        self.groups = np.arange(inputs) // (inputs if group == -1 else group)
        if scatter:
            rng.shuffle(self.groups)

    def dequantised(
        self, zeros: np.ndarray | int | None = None, scales: np.ndarray | None = None
    ) -> torch.Tensor:
        zero = np.broadcast_to(self.zeros if zeros is None else zeros, self.zeros.shape)[:, self.groups]
        scale = (self.scales if scales is None else scales).astype(np.float32)[:, self.groups]
        return torch.from_numpy((self.codes - zero).astype(np.float32) * scale)


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Numbers [rows, n] into int32 words [rows, ceil(n bits / 32)], lowest bits first."""
    per_word = 32 // bits
    rows, n = numbers.shape
    packed = np.zeros((rows, -(-n // per_word)), np.uint32)
    for row, column in product(range(rows), range(n)):
        packed[row, column // per_word] |= np.uint32(int(numbers[row, column]) << bits * (column % per_word))
    return packed.view(np.int32)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def gptq(known: Known, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    config = {
        "quant_method": "gptq",
        "bits": known.bits,
        "group_size": known.group,
        "desc_act": False,
        **options,
    }
    zeros = known.zeros if config.get("checkpoint_format") == "gptq_v2" else (known.zeros - 1) % 2**known.bits
    return {
        "qweight": tensor(words(known.codes, known.bits).T),
        "qzeros": tensor(words(zeros.T, known.bits)),
        "scales": tensor(known.scales.T),
        "g_idx": tensor(known.groups.astype(np.int32)),
    }, config


def awq(known: Known, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": known.group,
        "zero_point": True,
        "version": "gemm",
    }

    def shuffled(numbers: np.ndarray) -> np.ndarray:
        rows, n = numbers.shape
        return words(numbers.reshape(rows, n // 8, 8)[:, :, AWQ_ORDER].reshape(rows, n), 4)

    return {
        "qweight": tensor(shuffled(known.codes.T)),
        "qzeros": tensor(shuffled(known.zeros.T)),
        "scales": tensor(known.scales.T),
    }, {**config, **options}


def compressed(
    known: Known,
    packed: bool = False,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    middle = 2 ** (known.bits - 1)
    weights = {
        "num_bits": known.bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if known.group == -1 else "group",
        "group_size": None if known.group == -1 else known.group,
        **options,
    }
    tensors = {"weight_scale": tensor(known.scales).to(dtype)}
    if packed:
        tensors["weight_packed"] = tensor(words(known.codes, known.bits))
        tensors["weight_shape"] = torch.tensor(known.codes.shape)
    else:
        tensors["weight"] = tensor((known.codes - middle).astype(np.int8))
    if not symmetric and packed:
        tensors["weight_zero_point"] = tensor(words(known.zeros.T, known.bits).T)
    elif not symmetric:
        tensors["weight_zero_point"] = tensor((known.zeros - middle).astype(np.int8))
    return tensors, {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }
