"""Norms over rows, with the addition of a residual fused in.

A sum of input and residual is rounded to the element type before it is normed, as in a model that stores it
between the two; everything else is float32, rounded once.
"""

import numpy as np

from ._jit import launch
from ._parallel import body, parallel_for, threads_for
from ._simd import (
    LANES,
    address_as,
    fma,
    load,
    load_part,
    pointer,
    shifted,
    splat,
    store,
    store_part,
    sum_lanes,
    where_part,
)

_PARALLEL_SIZE = 1 << 16  # elements; below, more threads cost more than they save
_ZERO = np.float32(0.0)


@body
def add_row(x, residual, size, summed):
    """summed = x + residual, rounded to the element type."""
    whole = size - size % LANES
    for k in range(0, whole, LANES):
        store(summed, k, load(x, k) + load(residual, k))
    left = size - whole
    if left > 0:
        store_part(summed, whole, left, load_part(x, whole, left) + load_part(residual, whole, left))


@body
def inverse_root(x):
    """1 / sqrt(x)."""
    # in float32 LLVM would take the approximate instruction and Newton's step, which makes a NaN of inf
    return np.float32(1.0 / np.sqrt(np.float64(x)))


@body
def rms_norm_row(x, weight, eps, size, out):
    """out = weight * x / sqrt(mean(x^2) + eps)."""
    whole = size - size % LANES
    left = size - whole
    squares = splat(_ZERO)
    for k in range(0, whole, LANES):
        value = load(x, k)
        squares = fma(value, value, squares)
    if left > 0:
        value = load_part(x, whole, left)
        squares = fma(value, value, squares)
    scale = splat(inverse_root(sum_lanes(squares) / np.float32(size) + eps))
    for k in range(0, whole, LANES):
        store(out, k, load(weight, k) * (load(x, k) * scale))
    if left > 0:
        value = load_part(weight, whole, left) * (load_part(x, whole, left) * scale)
        store_part(out, whole, left, value)


@body
def layer_norm_row(x, weight, bias, eps, size, out):
    """out = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias; weight and bias are addresses or 0."""
    whole = size - size % LANES
    left = size - whole
    total = splat(_ZERO)
    for k in range(0, whole, LANES):
        total = total + load(x, k)
    if left > 0:
        total = total + load_part(x, whole, left)
    mean = splat(sum_lanes(total) / np.float32(size))
    squares = splat(_ZERO)
    for k in range(0, whole, LANES):
        value = load(x, k) - mean
        squares = fma(value, value, squares)
    if left > 0:
        value = where_part(left, load_part(x, whole, left) - mean, splat(_ZERO))
        squares = fma(value, value, squares)
    scale = splat(inverse_root(sum_lanes(squares) / np.float32(size) + eps))
    for k in range(0, whole, LANES):
        value = (load(x, k) - mean) * scale
        if weight != 0:
            value = value * load(address_as(weight, x), k)
        if bias != 0:
            value = value + load(address_as(bias, x), k)
        store(out, k, value)
    if left > 0:
        value = (load_part(x, whole, left) - mean) * scale
        if weight != 0:
            value = value * load_part(address_as(weight, x), whole, left)
        if bias != 0:
            value = value + load_part(address_as(bias, x), whole, left)
        store_part(out, whole, left, value)


@body
def _summed(x, row, size, item_size, residual, summed):
    """Row of x, or of summed = x + residual, written here, where there is a residual."""
    if residual == 0:
        return shifted(x, row * size)
    target = address_as(summed + row * size * item_size, x)
    add_row(shifted(x, row * size), address_as(residual + row * size * item_size, x), size, target)
    return target


@body
def _rms_norm_task(row, x, size, item_size, residual, weight, eps, summed, out):
    source = _summed(x, row, size, item_size, residual, summed)
    rms_norm_row(source, address_as(weight, x), eps, size, shifted(out, row * size))


@body
def _layer_norm_task(row, x, size, item_size, residual, weight, bias, eps, summed, out):
    source = _summed(x, row, size, item_size, residual, summed)
    layer_norm_row(source, weight, bias, eps, size, shifted(out, row * size))


@launch
def rms_norm(x, residual, weight, eps, summed, out):
    """out = weight * s / sqrt(mean(s^2) + eps) over rows, s = x or, where a residual is given, summed = x +
    residual.

    x, out [n, size]: float32 or bfloat16 bits, C-contiguous; residual, summed (both or neither 0) and
    weight: addresses of arrays of the same type; eps float32.
    """
    n_rows, size = x.shape
    arguments = (pointer(x), size, x.itemsize, residual, weight, eps, summed, pointer(out))
    parallel_for(_rms_norm_task, threads_for(n_rows, x.size, _PARALLEL_SIZE), n_rows, arguments)


@launch
def layer_norm(x, residual, weight, bias, eps, summed, out):
    """out = weight * (s - mean(s)) / sqrt(var(s) + eps) + bias over rows; arguments as in `rms_norm`.

    weight and bias may be 0.
    """
    n_rows, size = x.shape
    arguments = (pointer(x), size, x.itemsize, residual, weight, bias, eps, summed, pointer(out))
    parallel_for(_layer_norm_task, threads_for(n_rows, x.size, _PARALLEL_SIZE), n_rows, arguments)
