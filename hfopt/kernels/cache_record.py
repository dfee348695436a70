"""What kernels are told of the buffers of one layer of the cache (`cache.Appended`): some int64, in one array."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ADDRESS, ROWS, COLUMNS = range(3)  # of a buffer, behind where its part begins
TRUNK, BRANCH, KV_HEADS, HEAD_DIM = 0, 3, 6, 7
LENGTH = 8


def record_of(trunk: NDArray[Any], branch: NDArray[Any]) -> NDArray[np.int64]:
    """The record of two C-contiguous arrays [2, rows, n_kv_heads, columns, head_dim]; it does not keep them alive."""
    parts = [(array.ctypes.data, array.shape[1], array.shape[3]) for array in (trunk, branch)]
    return np.array([*parts[0], *parts[1], trunk.shape[2], trunk.shape[4]], np.int64)
