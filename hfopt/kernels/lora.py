"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): y += B (scale A x), a small vector v = scale A x between.

Weights are read where they are, in the element type of the model: A [rank, size] and B [outputs, rank], row-major. Sums are
float32, each made by one thread in a fixed order. Bodies for other kernels, all on pointers:

    shrink(x, a, step, size, count, scale, v)      v[j] = scale * (row j of A) . x, for up to RANKS rows of A
    turn(b, step, rank, count, columns)            16 rows of B as columns, float32 [rank, 16]
    expand(v, columns, step, rank, count, value)   value + what these columns give for v, in 16 lanes

A task of a parallel loop is RANKS numbers of v in one row of x; then, v being whole, 16 outputs in all rows of x. Where B is
kept as B^T [rank, outputs], `expand` reads it as it is, `step` being the number of outputs, and nothing is turned.
"""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.simd.constants import ZERO
from hfopt.kernels.simd.memory import load_part, load_scalar, load_two, store, store_part, store_scalar
from hfopt.kernels.simd.pointer import address_as, floats_at, pointer, shifted
from hfopt.kernels.simd.tile import stack_floats, transpose_block
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import fma, splat, sum_lanes

RANKS = 4  # rows of A that read a row of x together
_STEP = 2 * LANES
_PIECE = 256  # ranks of which columns are kept at a time; a literal in the size of a stack
_PARALLEL_SIZE = 1 << 15  # multiply-adds; below, more threads cost more than they save


@body
def shrink(x, a, step, size, count, scale, v):
    """v[j] = scale * sum over k < size of a[j * step + k] x[k], for j < count, 1 to RANKS; rounded to the type of v."""
    b, c = shifted(a, min(1, count - 1) * step), shifted(a, min(2, count - 1) * step)
    d = shifted(a, min(3, count - 1) * step)
    zero = splat(ZERO)
    low_a, low_b, low_c, low_d = zero, zero, zero, zero
    high_a, high_b, high_c, high_d = zero, zero, zero, zero
    k = 0
    while k + _STEP <= size:
        x_low, x_high = load_two(x, k)
        low, high = load_two(a, k)
        low_a, high_a = fma(low, x_low, low_a), fma(high, x_high, high_a)
        low, high = load_two(b, k)
        low_b, high_b = fma(low, x_low, low_b), fma(high, x_high, high_b)
        low, high = load_two(c, k)
        low_c, high_c = fma(low, x_low, low_c), fma(high, x_high, high_c)
        low, high = load_two(d, k)
        low_d, high_d = fma(low, x_low, low_d), fma(high, x_high, high_d)
        k += _STEP
    while k < size:
        n = min(size - k, LANES)
        value = load_part(x, k, n)
        low_a, low_b = fma(load_part(a, k, n), value, low_a), fma(load_part(b, k, n), value, low_b)
        low_c, low_d = fma(load_part(c, k, n), value, low_c), fma(load_part(d, k, n), value, low_d)
        k += LANES
    store_scalar(v, 0, scale * sum_lanes(low_a + high_a))
    if count > 1:
        store_scalar(v, 1, scale * sum_lanes(low_b + high_b))
    if count > 2:
        store_scalar(v, 2, scale * sum_lanes(low_c + high_c))
    if count > 3:
        store_scalar(v, 3, scale * sum_lanes(low_d + high_d))


@body
def turn(b, step, rank, count, columns):
    """columns[r * 16 + j] = b[j * step + r] for j < count, 1 to 16, and 0 for the others.

    columns: float32 [rank up to a multiple of 16, 16], all of it written.
    """
    rows = stack_floats(16 * 16)
    for r in range(0, rank, LANES):
        n = min(rank - r, LANES)
        for j in range(LANES):
            store(rows, j * LANES, load_part(b, min(j, count - 1) * step + r, n if j < count else 0))
        transpose_block(rows, LANES, shifted(columns, r * LANES), LANES)


@body
def expand(v, columns, step, rank, count, value):
    """value + sum over r < rank of v[r] columns[r * step + j], in lanes j < count, 1 to 16; the others keep theirs."""
    other = splat(ZERO)
    r = 0
    while r + 2 <= rank:
        value = fma(splat(load_scalar(v, r)), load_part(columns, r * step, count), value)
        other = fma(splat(load_scalar(v, r + 1)), load_part(columns, (r + 1) * step, count), other)
        r += 2
    if r < rank:
        value = fma(splat(load_scalar(v, r)), load_part(columns, r * step, count), value)
    return value + other


# ---- rows with an adapter each ----------------------------------------------------------------------------------------


class _Adapters(NamedTuple):
    """Matrices of one shape, one after the other, and which of them each row has."""

    first: Any  # pointer to the first one
    step: Any  # elements from a matrix to the next
    row_step: Any  # from a row of one to the next
    rank: Any
    index: Any  # pointer to int64 [n_rows]; below 0 for none


class _Rows(NamedTuple):
    """Rows with adapters, and where their results go."""

    x: Any
    x_step: Any  # elements from a row to the next
    n: Any
    size: Any  # elements of one
    out: Any
    out_step: Any


@body
def _shrink_task(task, rows, adapters, scale):
    n_blocks = (adapters.rank + RANKS - 1) // RANKS
    row, first = task // n_blocks, task % n_blocks * RANKS
    index = adapters.index[row]
    if index >= 0:
        a = shifted(adapters.first, index * adapters.step + first * adapters.row_step)
        x, out = shifted(rows.x, row * rows.x_step), shifted(rows.out, row * rows.out_step + first)
        shrink(x, a, adapters.row_step, rows.size, min(adapters.rank - first, RANKS), scale, out)


@launch
def shrink_rows(like, like_out, x, x_step, n_rows, size, a, a_step, a_row, rank, index, scale, out, out_step):
    """out[i, :rank] = scale * A[index[i]] x[i], rounded; rows of index -1 stay as they are.

    Addresses of x, rows of `size` elements, and A, matrices [rank, size], of the type of `like`, and of rows of the type of
    `like_out`; steps are elements from one to the next, rows in front of each other; index int64 [n_rows].
    """
    rows = _Rows(
        address_as(x, pointer(like)), x_step, n_rows, size, address_as(out, pointer(like_out)), out_step
    )
    adapters = _Adapters(address_as(a, pointer(like)), a_step, a_row, rank, pointer(index))
    n_tasks = n_rows * ((rank + RANKS - 1) // RANKS)
    threads = threads_for(n_tasks, n_rows * rank * size, _PARALLEL_SIZE)
    parallel_for(_shrink_task, threads, n_tasks, (rows, adapters, np.float32(scale)))


@body
def _expand_task(block, rows, adapters, add):
    """16 outputs of all rows: an adapter's columns are turned once for rows in a row that share it."""
    columns = stack_floats(256 * 16)
    first = block * LANES
    count, rank, known = min(rows.size - first, LANES), adapters.rank, -1
    for row in range(rows.n):
        index = adapters.index[row]
        if index >= 0:
            b = shifted(adapters.first, index * adapters.step + first * adapters.row_step)
            v, out = shifted(rows.x, row * rows.x_step), shifted(rows.out, row * rows.out_step)
            value = load_part(out, first, count if add else 0)
            for piece in range(0, rank, _PIECE):
                n = min(rank - piece, _PIECE)
                if index != known or rank > _PIECE:
                    turn(shifted(b, piece), adapters.row_step, n, count, columns)
                value = expand(shifted(v, piece), columns, LANES, n, count, value)
            known = index
            store_part(out, first, count, value)


@launch
def expand_rows(like, like_out, v, v_step, n_rows, size, b, b_step, b_row, rank, index, add, out, out_step):
    """out[i, :size] = B[index[i]] v[i], plus what is there if `add`, rounded; rows of index -1 stay as they are.

    Addresses of v, float32 rows of `rank`, of B, matrices [size, rank] of the type of `like`, and of rows of the type of
    `like_out`; steps and index as in `shrink_rows`.
    """
    rows = _Rows(floats_at(v), v_step, n_rows, size, address_as(out, pointer(like_out)), out_step)
    adapters = _Adapters(address_as(b, pointer(like)), b_step, b_row, rank, pointer(index))
    n_blocks = (size + LANES - 1) // LANES
    threads = threads_for(n_blocks, n_rows * rank * size, _PARALLEL_SIZE)
    parallel_for(_expand_task, threads, n_blocks, (rows, adapters, add))
