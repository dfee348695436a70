"""Arithmetic on each value by itself: in float32, rounded once to the element type."""

from typing import NamedTuple

import numpy as np

from hfopt.kernels.instruction import NONE, Instruction, read_fields
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.simd.constants import ZERO
from hfopt.kernels.simd.functions import tanh
from hfopt.kernels.simd.memory import load_part, load_two, store_part, store_two
from hfopt.kernels.simd.pointer import address_as, pointer, shifted
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import maximum, product, quotient, splat

_STEP = 2 * LANES
_BLOCK = 1 << 12  # values that a thread scales at a time
_PARALLEL_SIZE = 1 << 16  # values; below, more threads cost more than they save


@body
def add_row(x, other, size, total):
    """total = x + other, rounded to the element type."""
    k = 0
    while k + _STEP <= size:
        (a, b), (c, d) = load_two(x, k), load_two(other, k)
        store_two(total, k, a + c, b + d)
        k += _STEP
    while k < size:
        count = min(size - k, LANES)
        store_part(total, k, count, load_part(x, k, count) + load_part(other, k, count))
        k += LANES


# ---- products of two arrays -------------------------------------------------------------------------------------------


@body
def _multiply_row(row, x, width, size, out):
    """out *= x in one row, rounded."""
    x, out = shifted(x, row * width), shifted(out, row * size)
    for k in range(0, size, LANES):
        n = min(size - k, LANES)
        store_part(out, k, n, load_part(out, k, n) * load_part(x, k, n))


class _Multiply(NamedTuple):
    width: int  # values of IN for each token
    first: int  # of those that count


@body
def _run_multiply(like, held, operands, step):
    own, n, size = read_fields(operands.own, _Multiply), operands.n, operands.size
    x, out = shifted(address_as(operands.x, like), own.first), address_as(operands.out, like)
    parallel_for(_multiply_row, threads_for(n, n * size, _PARALLEL_SIZE), n, (x, own.width, size, out))


# OUT *= SIZE values of IN
MULTIPLY = Instruction("multiply", _Multiply._fields, _run_multiply)


# ---- products with a number -------------------------------------------------------------------------------------------


@body
def _scale_block(index, x, count, factor, divide, residual, out):
    factor = splat(factor)
    for k in range(index * _BLOCK, min((index + 1) * _BLOCK, count), LANES):
        n = min(count - k, LANES)
        value = load_part(x, k, n)
        value = quotient(value, factor) if divide else product(value, factor)
        if residual != 0:
            value = load_part(address_as(residual, x), k, n) + value
        store_part(out, k, n, value)


@body
def _scale(x, count, factor, divide, residual, out):
    n_blocks = (count + _BLOCK - 1) // _BLOCK
    arguments = x, count, np.float32(factor), divide, residual, out
    parallel_for(_scale_block, threads_for(n_blocks, count, _PARALLEL_SIZE), n_blocks, arguments)


@launch
def scale(like, x, count, factor, divide, residual, out):
    """out = x * factor, or x / factor; plus the residual, if there is one.

    Addresses of arrays [count] of the type of `like`; out may be x or residual, which may be 0.
    """
    _scale(address_as(x, pointer(like)), count, factor, divide, residual, address_as(out, pointer(like)))


class _Scale(NamedTuple):
    divide: int
    residual: int  # slot, or NONE


@body
def _run_scale(like, held, operands, step):
    own = read_fields(operands.own, _Scale)
    x, out = address_as(operands.x, like), address_as(operands.out, like)
    residual = 0 if own.residual == NONE else step.arena + own.residual * step.n_tokens
    _scale(x, operands.n * operands.size, operands.scalar, own.divide != 0, residual, out)


# OUT = IN * the scalar, or IN / it; IN and OUT may be the same, or LOGITS
SCALE = Instruction("scale", _Scale._fields, _run_scale)


# ---- limits -----------------------------------------------------------------------------------------------------------


@body
def _limit_block(index, x, count, limit, smooth, out):
    most, least = splat(limit), splat(-limit)
    zero = splat(ZERO)
    for k in range(index * _BLOCK, min((index + 1) * _BLOCK, count), LANES):
        n = min(count - k, LANES)
        value = load_part(x, k, n)
        if smooth:
            # rounded after each operation, as torch does
            store_part(out, k, n, quotient(value, most))
            store_part(out, k, n, tanh(load_part(out, k, n)))
            value = product(load_part(out, k, n), most)
        else:
            value = zero - maximum(zero - maximum(value, least), least)
        store_part(out, k, n, value)


@body
def _limit(x, count, limit, smooth, out):
    n_blocks = (count + _BLOCK - 1) // _BLOCK
    arguments = x, count, np.float32(limit), smooth, out
    parallel_for(_limit_block, threads_for(n_blocks, count, _PARALLEL_SIZE), n_blocks, arguments)


@launch
def limit(like, x, count, limit, smooth, out):
    """out = x between -limit and limit; or limit * tanh(x / limit), each operation rounded, if it is smooth.

    Addresses of arrays [count] of the type of `like`, float32 or bfloat16 bits; out may be x.
    """
    _limit(address_as(x, pointer(like)), count, limit, smooth, address_as(out, pointer(like)))


class _Limit(NamedTuple):
    smooth: int


@body
def _run_limit(like, held, operands, step):
    own = read_fields(operands.own, _Limit)
    x, out = address_as(operands.x, like), address_as(operands.out, like)
    _limit(x, operands.n * operands.size, operands.scalar, own.smooth != 0, out)


# OUT = IN, limited by the scalar; IN and OUT may be the same, or LOGITS
LIMIT = Instruction("limit", _Limit._fields, _run_limit)
