"""What kernels are told of the buffers of one layer of the cache (`cache.Appended`): some int64, in one array."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of a buffer, behind where its part begins. SCALES: address, or 0. START: tokens of the part that came before its first
# column, and are not held any more.
ADDRESS, ROWS, COLUMNS, SCALES, START = range(5)
PREFIX, SUFFIX, KV_HEADS, HEAD_DIM = 0, 5, 10, 11
LENGTH = 12


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
        numbers += (array.ctypes.data, array.shape[1], array.shape[3], scales_at, start)
    return np.array([*numbers, prefix.shape[2], prefix.shape[4]], np.int64)
