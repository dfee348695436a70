"""Norms over rows, with the addition of a residual fused in.

A sum of input and residual is rounded to the element type before it is normed, as in a model that stores it
between the two; everything else is float32, rounded once.
"""

from typing import NamedTuple

import numpy as np

from hfopt.kernels.instruction import Instruction, read_fields
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, inlined, parallel_for, threads_for
from hfopt.kernels.simd.pointer import (
    address_as,
    item_bytes,
    load_part,
    load_two,
    pointer,
    prefetch_two,
    shifted,
    store_part,
    store_two,
)
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import fma, splat, sum_lanes, where_part

STEP = 2 * LANES
_PARALLEL_SIZE = 1 << 16  # elements; below, more threads cost more than they save
_ZERO = np.float32(0.0)


@body
def add_row(x, residual, size, summed):
    """summed = x + residual, rounded to the element type."""
    k = 0
    while k + STEP <= size:
        (a, b), (c, d) = load_two(x, k), load_two(residual, k)
        store_two(summed, k, a + c, b + d)
        k += STEP
    while k < size:
        count = min(size - k, LANES)
        store_part(summed, k, count, load_part(x, k, count) + load_part(residual, k, count))
        k += LANES


@body
def inverse_root(x):
    """1 / sqrt(x)."""
    # in float32 LLVM would take the approximate instruction and Newton's step, which makes a NaN of inf
    return np.float32(1.0 / np.sqrt(np.float64(x)))


@body
def sum_row(x, size):
    """Sum of `size` values."""
    a, b = splat(_ZERO), splat(_ZERO)
    k = 0
    while k + STEP <= size:
        low, high = load_two(x, k)
        a = a + low
        b = b + high
        k += STEP
    while k < size:
        a = a + load_part(x, k, min(size - k, LANES))
        k += LANES
    return sum_lanes(a + b)


@body
def sum_squares(x, mean, size):
    """Sum of (x - mean)^2 over `size` values."""
    a, b = splat(_ZERO), splat(_ZERO)
    k = 0
    while k + STEP <= size:
        low, high = load_two(x, k)
        low, high = low - mean, high - mean
        a = fma(low, low, a)
        b = fma(high, high, b)
        k += STEP
    while k < size:
        count = min(size - k, LANES)
        value = where_part(count, load_part(x, k, count) - mean, splat(_ZERO))
        a = fma(value, value, a)
        k += LANES
    return sum_lanes(a + b)


@body
def rms_norm_row(x, weight, eps, size, out):
    """out = weight * x / sqrt(mean(x^2) + eps)."""
    scale = splat(inverse_root(sum_squares(x, splat(_ZERO), size) / np.float32(size) + eps))
    k = 0
    while k + STEP <= size:
        (a, b), (c, d) = load_two(x, k), load_two(weight, k)
        prefetch_two(x, size + k)
        store_two(out, k, c * (a * scale), d * (b * scale))
        k += STEP
    while k < size:
        count = min(size - k, LANES)
        store_part(out, k, count, load_part(weight, k, count) * (load_part(x, k, count) * scale))
        k += LANES


@body
def layer_norm_row(x, weight, bias, eps, size, out):
    """out = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias; weight and bias are addresses or 0."""
    mean = splat(sum_row(x, size) / np.float32(size))
    scale = splat(inverse_root(sum_squares(x, mean, size) / np.float32(size) + eps))
    k = 0
    while k + STEP <= size:
        a, b = load_two(x, k)
        a, b = (a - mean) * scale, (b - mean) * scale
        if weight != 0:
            c, d = load_two(address_as(weight, x), k)
            a, b = a * c, b * d
        if bias != 0:
            c, d = load_two(address_as(bias, x), k)
            a, b = a + c, b + d
        prefetch_two(x, size + k)
        store_two(out, k, a, b)
        k += STEP
    while k < size:
        count = min(size - k, LANES)
        value = (load_part(x, k, count) - mean) * scale
        if weight != 0:
            value = value * load_part(address_as(weight, x), k, count)
        if bias != 0:
            value = value + load_part(address_as(bias, x), k, count)
        store_part(out, k, count, value)
        k += LANES


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


@body
def _rms_norm_rows(x, n_rows, size, residual, weight, eps, summed, out):
    arguments = (x, size, item_bytes(x), residual, weight, np.float32(eps), summed, out)
    parallel_for(_rms_norm_task, threads_for(n_rows, n_rows * size, _PARALLEL_SIZE), n_rows, arguments)


@body
def _layer_norm_rows(x, n_rows, size, residual, weight, bias, eps, summed, out):
    arguments = (x, size, item_bytes(x), residual, weight, bias, np.float32(eps), summed, out)
    parallel_for(_layer_norm_task, threads_for(n_rows, n_rows * size, _PARALLEL_SIZE), n_rows, arguments)


@launch
def rms_norm(like, x, n_rows, size, residual, weight, eps, summed, out):
    """out = weight * s / sqrt(mean(s^2) + eps) over rows, s = x or, where a residual is given, summed = x +
    residual.

    Addresses of arrays of the type of `like`, float32 or bfloat16 bits: x, out, residual, summed [n_rows, size]
    (the last two both or neither 0) and weight [size].
    """
    x, out = address_as(x, pointer(like)), address_as(out, pointer(like))
    _rms_norm_rows(x, n_rows, size, residual, weight, eps, summed, out)


@launch
def layer_norm(like, x, n_rows, size, residual, weight, bias, eps, summed, out):
    """out = weight * (s - mean(s)) / sqrt(var(s) + eps) + bias over rows; arguments as in `rms_norm`.

    weight and bias may be 0.
    """
    x, out = address_as(x, pointer(like)), address_as(out, pointer(like))
    _layer_norm_rows(x, n_rows, size, residual, weight, bias, eps, summed, out)


# ---- instructions -----------------------------------------------------------------------------------------------------


class _RmsNorm(NamedTuple):
    weight: int  # address


class _LayerNorm(NamedTuple):
    weight: int  # addresses, or 0
    bias: int


@inlined
def _run_rms_norm(like, held, operands, step):
    own = read_fields(operands.own, _RmsNorm)
    x, out = address_as(operands.x, like), address_as(operands.out, like)
    _rms_norm_rows(x, operands.n, operands.size, 0, own.weight, operands.scalar, 0, out)


@inlined
def _run_layer_norm(like, held, operands, step):
    own = read_fields(operands.own, _LayerNorm)
    x, out = address_as(operands.x, like), address_as(operands.out, like)
    _layer_norm_rows(x, operands.n, operands.size, 0, own.weight, own.bias, operands.scalar, 0, out)


# the scalar is eps
RMS_NORM = Instruction("rms_norm", _RmsNorm._fields, _run_rms_norm)
LAYER_NORM = Instruction("layer_norm", _LayerNorm._fields, _run_layer_norm)
