"""What kernels are told of the buffers of one layer of the cache (`cache.Appended`): some int64, in one array."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of a buffer, behind where its part begins. SCALES: address, or 0. START: tokens of the part that came before its first
# column, and are not held any more. Elements: ROW, of a physical row; HEAD, of one of its heads; TO_VALUES, from a key to
# its value.
ADDRESS, ROWS, COLUMNS, SCALES, START, ROW, HEAD, TO_VALUES = range(8)
PREFIX, SUFFIX, KV_HEADS, HEAD_DIM = 0, 8, 16, 17
LENGTH = 18


def record_of(
    prefix: NDArray[Any],
    suffix: NDArray[Any],
    prefix_scales: NDArray[np.float32] | None = None,
    suffix_scales: NDArray[np.float32] | None = None,
    *,
    starts: tuple[int, int] = (0, 0),
) -> NDArray[np.int64]:
    """The record of two C-contiguous arrays [2, rows, n_kv_heads, columns, head_dim], and of the scales of codes, which have
    no last dimension; it does not keep them alive. starts: see START.
    """
    numbers: list[int] = []
    for array, scales, start in ((prefix, prefix_scales, starts[0]), (suffix, suffix_scales, starts[1])):
        scales_at = 0 if scales is None else scales.ctypes.data
        _, n_rows, n_kv_heads, columns, head_dim = array.shape
        head = columns * head_dim
        sizes = n_kv_heads * head, head, n_rows * n_kv_heads * head
        numbers += (array.ctypes.data, n_rows, columns, scales_at, start, *sizes)
    return np.array([*numbers, prefix.shape[2], prefix.shape[4]], np.int64)


def record_of_keys(
    address: int, n_rows: int, head: int, to_values: int, n_kv_heads: int, head_dim: int
) -> NDArray[np.int64]:
    """The record of keys and values that lie anywhere, all of them in the suffix: key t of a head is `row + t` keys behind
    `address`, for the row below n_rows that the table names; head, to_values: see HEAD, TO_VALUES.
    """
    part = address, n_rows, 0, 0, 0, head_dim, head, to_values
    return np.array([*part, *part, n_kv_heads, head_dim], np.int64)
