"""Norms over rows: in float32, rounded once to the element type."""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.instruction import Instruction, read_fields
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.simd.constants import ZERO
from hfopt.kernels.simd.memory import load_part, load_two, prefetch_two, store_part, store_two
from hfopt.kernels.simd.pointer import address_as, address_of, pointer, shifted
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import fma, lane, product, quotient, splat, sum_lanes, where_part

_STEP = 2 * LANES
PARALLEL_SIZE = 1 << 16  # elements; below, more threads cost more than they save


@body
def inverse_root(x):
    """1 / sqrt(x)."""
    # in float32 LLVM would take the approximate instruction and Newton's step, which makes a NaN of inf
    return np.float32(1.0 / np.sqrt(np.float64(x)))


@body
def mean_of(total, size):
    """total / size, by the division that is written here: LLVM would multiply by the inverse in a loop over heads."""
    return lane(quotient(splat(total), splat(np.float32(size))), 0)


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
def inverse_rms(x, mean, eps, size):
    """1 / sqrt(mean((x - mean)^2) + eps), in every lane."""
    return splat(inverse_root(mean_of(sum_squares(x, mean, size), size) + eps))


@body
def rms_norm_row(x, weight, offset, eps, size, out):
    """out = (weight + offset) * x / sqrt(mean(x^2) + eps); weight is an address, or 0 for none."""
    # products as they are written: LLVM would take them in another order in another kernel
    scale = inverse_rms(x, splat(ZERO), eps, size)
    w, more = address_as(weight, x), splat(offset)
    k = 0
    while k + _STEP <= size:
        a, b = load_two(x, k)
        a, b = product(a, scale), product(b, scale)
        if weight != 0:
            c, d = load_two(w, k)
            a, b = product(c + more, a), product(d + more, b)
        prefetch_two(x, size + k)
        store_two(out, k, a, b)
        k += _STEP
    while k < size:
        count = min(size - k, LANES)
        value = product(load_part(x, k, count), scale)
        if weight != 0:
            value = product(load_part(w, k, count) + more, value)
        store_part(out, k, count, value)
        k += LANES


@body
def layer_norm_row(x, weight, bias, offset, eps, size, out):
    """out = (weight + offset) * (x - mean(x)) / sqrt(var(x) + eps) + bias; weight and bias are addresses or 0."""
    mean = splat(mean_of(sum_row(x, size), size))
    affine_row(x, mean, inverse_rms(x, mean, eps, size), weight, bias, offset, size, out)


@body
def affine_row(x, mean, scale, weight, bias, offset, size, out):
    """out = (weight + offset) * (x - mean) * scale + bias; weight and bias are addresses or 0."""
    w, b, more = address_as(weight, x), address_as(bias, x), splat(offset)
    k = 0
    while k + _STEP <= size:
        low, high = load_two(x, k)
        low, high = product(low - mean, scale), product(high - mean, scale)
        if weight != 0 and bias != 0:
            (c, d), (e, f) = load_two(w, k), load_two(b, k)
            low, high = fma(low, c + more, e), fma(high, d + more, f)
        elif weight != 0:
            c, d = load_two(w, k)
            low, high = product(low, c + more), product(high, d + more)
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
            value = fma(value, load_part(w, k, count) + more, load_part(b, k, count))
        elif weight != 0:
            value = product(value, load_part(w, k, count) + more)
        elif bias != 0:
            value = value + load_part(b, k, count)
        store_part(out, k, count, value)
        k += LANES


# ---- rows -------------------------------------------------------------------------------------------------------------


class Vectors(NamedTuple):
    """What a norm multiplies with and adds: addresses of weight and bias, or 0; what is added to the weight; eps."""

    weight: Any
    bias: Any
    offset: Any  # float32
    eps: Any


@body
def _norm_row(is_layer, x, vectors, place, size, out):
    """One norm, of the vectors from element `place` on."""
    weight, bias = vectors.weight, vectors.bias
    if weight != 0:
        weight = address_of(shifted(address_as(weight, x), place))
    if bias != 0:
        bias = address_of(shifted(address_as(bias, x), place))
    if is_layer:
        layer_norm_row(x, weight, bias, vectors.offset, vectors.eps, size, out)
    else:
        rms_norm_row(x, weight, vectors.offset, vectors.eps, size, out)


@body
def _norm_task(row, is_layer, x, size, vectors, out):
    _norm_row(is_layer, shifted(x, row * size), vectors, 0, size, shifted(out, row * size))


@body
def _heads_task(row, is_layer, x, width, first, count, size, step, vectors):
    for head in range(count):
        here = shifted(x, row * width + first + head * size)
        _norm_row(is_layer, here, vectors, head * step, size, here)


@body
def _norm_rows(is_layer, x, n_rows, size, vectors, out):
    arguments = (is_layer, x, size, vectors, out)
    parallel_for(_norm_task, threads_for(n_rows, n_rows * size, PARALLEL_SIZE), n_rows, arguments)


@body
def _norm_heads(is_layer, x, n_rows, width, first, count, size, step, vectors):
    arguments = (is_layer, x, width, first, count, size, step, vectors)
    parallel_for(_heads_task, threads_for(n_rows, n_rows * count * size, PARALLEL_SIZE), n_rows, arguments)


@launch
def norm(like, is_layer, x, n_rows, size, weight, bias, offset, eps, out):
    """out = (weight + offset) * x / sqrt(mean(x^2) + eps) + bias over rows; x - mean(x) in place of x if `is_layer`.

    Addresses of arrays of the type of `like`, float32 or bfloat16 bits: x, out [n_rows, size]; weight, bias [size], or 0.
    Without `is_layer` there is no bias.
    """
    vectors = Vectors(weight, bias, np.float32(offset), np.float32(eps))
    _norm_rows(is_layer, address_as(x, pointer(like)), n_rows, size, vectors, address_as(out, pointer(like)))


@launch
def norm_heads(like, is_layer, x, n_rows, width, first, count, size, step, weight, bias, offset, eps):
    """`norm`, in place, of `count` heads of `size` channels each from channel `first` on, in rows of x [n_rows, width].

    step: elements from the weight (and the bias) of a head to those of the next; 0 if they share them.
    """
    vectors = Vectors(weight, bias, np.float32(offset), np.float32(eps))
    _norm_heads(is_layer, address_as(x, pointer(like)), n_rows, width, first, count, size, step, vectors)


# ---- instructions -----------------------------------------------------------------------------------------------------


class _Norm(NamedTuple):
    weight: int  # addresses, or 0
    bias: int
    offset: int


class _HeadNorm(NamedTuple):
    weight: int  # addresses, or 0
    bias: int
    offset: int
    step: int
    width: int  # of a row
    first: int  # channel
    n_heads: int
    is_layer: int


@body
def _run_norm(is_layer, like, operands):
    own = read_fields(operands.own, _Norm)
    x, out = address_as(operands.x, like), address_as(operands.out, like)
    vectors = Vectors(own.weight, own.bias, np.float32(own.offset), np.float32(operands.scalar))
    _norm_rows(is_layer, x, operands.n, operands.size, vectors, out)


@body
def _run_rms_norm(like, held, operands, step):
    _run_norm(False, like, operands)


@body
def _run_layer_norm(like, held, operands, step):
    _run_norm(True, like, operands)


@body
def _run_head_norm(like, held, operands, step):
    own, x = read_fields(operands.own, _HeadNorm), address_as(operands.out, like)
    heads = own.first, own.n_heads, operands.size, own.step
    vectors = Vectors(own.weight, own.bias, np.float32(own.offset), np.float32(operands.scalar))
    _norm_heads(own.is_layer != 0, x, operands.n, own.width, *heads, vectors)


# the scalar is eps
RMS_NORM = Instruction("rms_norm", _Norm._fields, _run_rms_norm)
LAYER_NORM = Instruction("layer_norm", _Norm._fields, _run_layer_norm)
# in OUT, whose heads have SIZE channels
HEAD_NORM = Instruction("norm of heads", _HeadNorm._fields, _run_head_norm)
