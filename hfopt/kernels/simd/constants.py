"""Numbers that several kernels use; those of bodies are float32, which Numba would not make of a literal."""

import numpy as np

LINE = 64  # bytes of a cache line
INTEGERS = 12582912.0  # 1.5 * 2^23: a float32 plus this has its nearest integer in its lowest bits
LOG2_E = 1.4426950408889634

ZERO = np.float32(0.0)
ONE = np.float32(1.0)
NAN = np.float32(np.nan)
LOWEST = np.float32(-np.inf)
LARGEST = np.finfo(np.float32).max
