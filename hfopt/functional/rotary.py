"""Rotary position embedding, fused with the write of new keys and values into the cache."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import rope as kernels

from .checks import array_of, check_contiguous, check_floats, check_shape, prepare_threads

if TYPE_CHECKING:
    from hfopt.cache import Appended

ROTATIONS = {"none": kernels.NONE, "half": kernels.HALF, "interleaved": kernels.INTERLEAVED}

_NO_ANGLES = np.zeros((1, 1, 0), np.float32)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    appended: "Appended",
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    rotation: str,
) -> None:
    """Rotate queries in place; write rotated keys, and values, to the cache columns of the new tokens.

    qkv: [n_rows, n_new, (n_heads + 2 * n_kv_heads) * head_dim], contiguous: heads of queries, then keys,
    then values.
    rotation: "half" turns channels i and i + n_rotary / 2 (https://arxiv.org/abs/2104.09864, in Llama's
        order; cos, sin [1 or
        n_rows, n_new, n_rotary]); "interleaved" turns channels 2i and 2i + 1 (GPT-J; cos, sin [1 or n_rows,
        n_new, n_rotary / 2]); "none" only stores (cos, sin None). Channels from n_rotary on stay. cos, sin:
        float32 or bfloat16.
    Raises `InvalidInput`.
    """
    check_qkv(qkv, appended, n_heads, n_kv_heads, head_dim)
    if rotation not in ROTATIONS:
        raise InvalidInput(f"rotation is {rotation!r}: {', '.join(map(repr, ROTATIONS))} are allowed")
    n_rows, n_new, width = qkv.shape
    cos_array = sin_array = _NO_ANGLES
    n_rotary = 0
    if rotation != "none":
        cos_array, n_rotary = _angles("cos", cos, n_rows, n_new, head_dim, rotation)
        sin_array, _ = _angles("sin", sin, n_rows, n_new, head_dim, rotation)
        if cos_array.shape != sin_array.shape:
            raise InvalidInput(f"sin has shape {sin_array.shape}: that of cos, {cos_array.shape}, is needed")
    cache, length = (
        (appended.branch, appended.branch_len) if appended.in_branch else (appended.trunk, appended.trunk_len)
    )
    if cache.shape[1] < n_rows or not n_new <= length <= cache.shape[3]:
        raise InvalidInput(
            f"appended ends at column {length} of {cache.shape}: "
            f"room for {n_new} tokens of {n_rows} rows is needed"
        )
    if qkv.numel():
        prepare_threads()
        kernels.rotate_and_store(
            array_of(qkv).reshape(-1, width),
            n_new,
            cos_array,
            sin_array,
            n_rotary,
            ROTATIONS[rotation],
            n_heads,
            n_kv_heads,
            cache,
            length - n_new,
        )


def check_qkv(qkv: Tensor, appended: "Appended", n_heads: int, n_kv_heads: int, head_dim: int) -> None:
    """Raise `InvalidInput` unless projections, cache and sizes belong together."""
    check_floats("qkv", qkv)
    if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads or head_dim < 1:
        raise InvalidInput(
            f"n_heads = {n_heads}, n_kv_heads = {n_kv_heads}, head_dim = {head_dim}: "
            "positive numbers are needed, n_heads a multiple of n_kv_heads"
        )
    if qkv.ndim != 3:
        raise InvalidInput(f"qkv has shape {tuple(qkv.shape)}: [n_rows, n_new, channels] is needed")
    rows = len(appended.trunk_row)
    check_shape("qkv", qkv, (rows, appended.n_new, (n_heads + 2 * n_kv_heads) * head_dim))
    check_contiguous("qkv", qkv)
    bits = np.uint16 if qkv.dtype is torch.bfloat16 else np.float32
    for name, cache in (("trunk", appended.trunk), ("branch", appended.branch)):
        shape = cache.shape
        if len(shape) != 5 or (shape[0], shape[2], shape[4]) != (2, n_kv_heads, head_dim):
            raise InvalidInput(
                f"appended.{name} has shape {shape}: (2, rows, {n_kv_heads}, columns, {head_dim}) is needed"
            )
        if cache.dtype != bits or not cache.flags.c_contiguous:
            raise InvalidInput(
                f"appended.{name} has dtype {cache.dtype}: contiguous {np.dtype(bits)} is needed"
            )


def _angles(
    name: str, tensor: Tensor | None, n_rows: int, n_new: int, head_dim: int, rotation: str
) -> tuple[np.ndarray, int]:
    """(contiguous float32 array, number of rotated channels)."""
    if tensor is None:
        raise InvalidInput(f"{name} is None: rotation {rotation!r} needs it")
    check_floats(name, tensor)
    n_rotary = tensor.shape[-1] * (1 if rotation == "half" else 2) if tensor.ndim == 3 else -1
    if tensor.ndim != 3 or tensor.shape[0] not in (1, n_rows) or tensor.shape[1] != n_new:
        raise InvalidInput(
            f"{name} has shape {tuple(tensor.shape)}: [1 or {n_rows}, {n_new}, angles] is needed"
        )
    if n_rotary % 2 or n_rotary > head_dim:
        raise InvalidInput(
            f"{name} has {tensor.shape[-1]} angles: they turn {n_rotary} channels, "
            f"an even number up to {head_dim} is allowed"
        )
    if tensor.dtype is not torch.float32 or not tensor.is_contiguous():
        tensor = tensor.to(torch.float32).contiguous()
    return array_of(tensor), n_rotary
