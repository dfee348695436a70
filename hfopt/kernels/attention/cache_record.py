"""What kernels are told of the buffers of one layer of the cache (`cache.Appended`): some int64, in one array."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ADDRESS, ROWS, COLUMNS, SCALES = range(4)  # of a buffer, behind where its part begins; SCALES: address, or 0
PREFIX, SUFFIX, KV_HEADS, HEAD_DIM = 0, 4, 8, 9
LENGTH = 10


def record_of(
    prefix: NDArray[Any],
    suffix: NDArray[Any],
    prefix_scales: NDArray[np.float32] | None = None,
    suffix_scales: NDArray[np.float32] | None = None,
) -> NDArray[np.int64]:
    """The record of two C-contiguous arrays [2, rows, n_kv_heads, columns, head_dim], and of the scales of codes, which have
    no last dimension; it does not keep them alive.
    """
    numbers: list[int] = []
    for array, scales in ((prefix, prefix_scales), (suffix, suffix_scales)):
        scales_at = 0 if scales is None else scales.ctypes.data
        numbers += (array.ctypes.data, array.shape[1], array.shape[3], scales_at)
    return np.array([*numbers, prefix.shape[2], prefix.shape[4]], np.int64)
