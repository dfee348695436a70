"""Norms over rows: in float32, rounded once to the element type."""

from typing import NamedTuple

import numpy as np

from hfopt.kernels.instruction import Instruction, read_fields
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.simd.constants import ZERO
from hfopt.kernels.simd.memory import load_part, load_two, prefetch_two, store_part, store_two
from hfopt.kernels.simd.pointer import address_as, pointer, shifted
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import fma, product, splat, sum_lanes, where_part

_STEP = 2 * LANES
_PARALLEL_SIZE = 1 << 16  # elements; below, more threads cost more than they save


@body
def inverse_root(x):
    """1 / sqrt(x)."""
    # in float32 LLVM would take the approximate instruction and Newton's step, which makes a NaN of inf
    return np.float32(1.0 / np.sqrt(np.float64(x)))


@body
def sum_row(x, size):
    """Sum of `size` values."""
    a, b = splat(ZERO), splat(ZERO)
    k = 0
    while k + _STEP <= size:
        low, high = load_two(x, k)
        a = a + low
        b = b + high
        k += _STEP
    while k < size:
        a = a + load_part(x, k, min(size - k, LANES))
        k += LANES
    return sum_lanes(a + b)


@body
def sum_squares(x, mean, size):
    """Sum of (x - mean)^2 over `size` values."""
    a, b = splat(ZERO), splat(ZERO)
    k = 0
    while k + _STEP <= size:
        low, high = load_two(x, k)
        low, high = low - mean, high - mean
        a = fma(low, low, a)
        b = fma(high, high, b)
        k += _STEP
    while k < size:
        count = min(size - k, LANES)
        value = where_part(count, load_part(x, k, count) - mean, splat(ZERO))
        a = fma(value, value, a)
        k += LANES
    return sum_lanes(a + b)


@body
def rms_norm_row(x, weight, eps, size, out):
    """out = weight * x / sqrt(mean(x^2) + eps)."""
    # products as they are written: LLVM would take them in another order in another kernel
    scale = splat(inverse_root(sum_squares(x, splat(ZERO), size) / np.float32(size) + eps))
    k = 0
    while k + _STEP <= size:
        (a, b), (c, d) = load_two(x, k), load_two(weight, k)
        prefetch_two(x, size + k)
        store_two(out, k, product(c, product(a, scale)), product(d, product(b, scale)))
        k += _STEP
    while k < size:
        count = min(size - k, LANES)
        normed = product(load_part(x, k, count), scale)
        store_part(out, k, count, product(load_part(weight, k, count), normed))
        k += LANES


@body
def layer_norm_row(x, weight, bias, eps, size, out):
    """out = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias; weight and bias are addresses or 0."""
    mean = splat(sum_row(x, size) / np.float32(size))
    scale = splat(inverse_root(sum_squares(x, mean, size) / np.float32(size) + eps))
    w, b = address_as(weight, x), address_as(bias, x)
    k = 0
    while k + _STEP <= size:
        low, high = load_two(x, k)
        low, high = product(low - mean, scale), product(high - mean, scale)
        if weight != 0 and bias != 0:
            (c, d), (e, f) = load_two(w, k), load_two(b, k)
            low, high = fma(low, c, e), fma(high, d, f)
        elif weight != 0:
            c, d = load_two(w, k)
            low, high = product(low, c), product(high, d)
        elif bias != 0:
            e, f = load_two(b, k)
            low, high = low + e, high + f
        prefetch_two(x, size + k)
        store_two(out, k, low, high)
        k += _STEP
    while k < size:
        count = min(size - k, LANES)
        value = product(load_part(x, k, count) - mean, scale)
        if weight != 0 and bias != 0:
            value = fma(value, load_part(w, k, count), load_part(b, k, count))
        elif weight != 0:
            value = product(value, load_part(w, k, count))
        elif bias != 0:
            value = value + load_part(b, k, count)
        store_part(out, k, count, value)
        k += LANES


# ---- rows -------------------------------------------------------------------------------------------------------------


@body
def _rms_norm_task(row, x, size, weight, eps, out):
    rms_norm_row(shifted(x, row * size), address_as(weight, x), eps, size, shifted(out, row * size))


@body
def _layer_norm_task(row, x, size, weight, bias, eps, out):
    layer_norm_row(shifted(x, row * size), weight, bias, eps, size, shifted(out, row * size))


@body
def _heads_task(row, x, width, first, count, size, weight, eps):
    weight = address_as(weight, x)
    for head in range(first, first + count):
        here = shifted(x, row * width + head * size)
        rms_norm_row(here, weight, eps, size, here)


@body
def _rms_norm_rows(x, n_rows, size, weight, eps, out):
    arguments = (x, size, weight, np.float32(eps), out)
    parallel_for(_rms_norm_task, threads_for(n_rows, n_rows * size, _PARALLEL_SIZE), n_rows, arguments)


@body
def _layer_norm_rows(x, n_rows, size, weight, bias, eps, out):
    arguments = (x, size, weight, bias, np.float32(eps), out)
    parallel_for(_layer_norm_task, threads_for(n_rows, n_rows * size, _PARALLEL_SIZE), n_rows, arguments)


@body
def _norm_heads(x, n_rows, width, first, count, size, weight, eps):
    arguments = (x, width, first, count, size, weight, np.float32(eps))
    parallel_for(_heads_task, threads_for(n_rows, n_rows * count * size, _PARALLEL_SIZE), n_rows, arguments)


@launch
def rms_norm(like, x, n_rows, size, weight, eps, out):
    """out = weight * x / sqrt(mean(x^2) + eps) over rows.

    Addresses of arrays of the type of `like`: x, out [n_rows, size] and weight [size].
    """
    _rms_norm_rows(address_as(x, pointer(like)), n_rows, size, weight, eps, address_as(out, pointer(like)))


@launch
def layer_norm(like, x, n_rows, size, weight, bias, eps, out):
    """out = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias over rows; arguments as in `rms_norm`.

    weight and bias may be 0.
    """
    x, out = address_as(x, pointer(like)), address_as(out, pointer(like))
    _layer_norm_rows(x, n_rows, size, weight, bias, eps, out)


@launch
def rms_norm_heads(like, x, n_rows, width, first, count, size, weight, eps):
    """`rms_norm`, in place, of `count` heads of `size` channels each from head `first` on, in rows of x [n_rows, width]."""
    _norm_heads(address_as(x, pointer(like)), n_rows, width, first, count, size, weight, eps)


# ---- instructions -----------------------------------------------------------------------------------------------------


class _RmsNorm(NamedTuple):
    weight: int  # address


class _LayerNorm(NamedTuple):
    weight: int  # addresses, or 0
    bias: int


class _HeadNorm(NamedTuple):
    weight: int  # address
    width: int  # of a row
    first: int  # head
    n_heads: int


@body
def _run_rms_norm(like, held, operands, step):
    own = read_fields(operands.own, _RmsNorm)
    x, out = address_as(operands.x, like), address_as(operands.out, like)
    _rms_norm_rows(x, operands.n, operands.size, own.weight, operands.scalar, out)


@body
def _run_layer_norm(like, held, operands, step):
    own = read_fields(operands.own, _LayerNorm)
    x, out = address_as(operands.x, like), address_as(operands.out, like)
    _layer_norm_rows(x, operands.n, operands.size, own.weight, own.bias, operands.scalar, out)


@body
def _run_head_norm(like, held, operands, step):
    own, x = read_fields(operands.own, _HeadNorm), address_as(operands.out, like)
    heads = own.first, own.n_heads, operands.size
    _norm_heads(x, operands.n, own.width, *heads, own.weight, operands.scalar)


# the scalar is eps
RMS_NORM = Instruction("rms_norm", _RmsNorm._fields, _run_rms_norm)
LAYER_NORM = Instruction("layer_norm", _LayerNorm._fields, _run_layer_norm)
# in OUT, whose heads have SIZE channels
HEAD_NORM = Instruction("rms_norm of heads", _HeadNorm._fields, _run_head_norm)
