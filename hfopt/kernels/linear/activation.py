"""Activations on vectors, chosen by a code at run time so that one compiled kernel serves them all."""

import numpy as np

from hfopt.kernels.jit.parallel import body
from hfopt.kernels.simd.constants import ONE, ZERO
from hfopt.kernels.simd.functions import erf, exp, tanh
from hfopt.kernels.simd.vector import maximum, splat

NONE, RELU, SILU, GELU, GELU_TANH, QUICK_GELU, TANH, SIGMOID, RELU_SQUARED = range(9)

_HALF = np.float32(0.5)
_INVERSE_ROOT_2 = np.float32(0.7071067811865476)
_ROOT_2_BY_PI = np.float32(0.7978845608028654)
_CUBIC = np.float32(0.044715)
_QUICK = np.float32(1.702)


@body
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return splat(ONE) / (splat(ONE) + exp(splat(ZERO) - x))


@body
def activate(x, code):
    """The activation named by `code` on 16 lanes."""
    if code == SILU:
        # a quotient, not x * sigmoid(x): -inf gives the NaN that torch gives
        return x / (splat(ONE) + exp(splat(ZERO) - x))
    if code == RELU:
        return maximum(x, splat(ZERO))
    if code == GELU:
        return splat(_HALF) * x * (splat(ONE) + erf(x * splat(_INVERSE_ROOT_2)))
    if code == GELU_TANH:
        inner = splat(_ROOT_2_BY_PI) * (x + splat(_CUBIC) * x * x * x)
        return splat(_HALF) * x * (splat(ONE) + tanh(inner))
    if code == QUICK_GELU:
        return x * sigmoid(splat(_QUICK) * x)
    if code == RELU_SQUARED:
        positive = maximum(x, splat(ZERO))
        return positive * positive
    if code == TANH:
        return tanh(x)
    if code == SIGMOID:
        return sigmoid(x)
    return x
