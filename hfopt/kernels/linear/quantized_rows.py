"""Rows of x as 8-bit codes, for products of integers with quantised weights."""

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit.parallel import body
from hfopt.kernels.linear.quantized_tile import TILE_ROWS
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.constants import INTEGERS
from hfopt.kernels.simd.memory import load, load_part, store, store_scalar
from hfopt.kernels.simd.pointer import shifted
from hfopt.kernels.simd.tile import stack_floats
from hfopt.kernels.simd.types import F32X, I8, I8X, I32, I32X, LANES, float32x
from hfopt.kernels.simd.vector import fma, splat, sum_lanes

X_GROUP = 256  # inputs of x with a scale of their own, where the weights have no smaller groups


# ---- codes ----------------------------------------------------------------------------------------------------------


@intrinsic
def round_to_codes(typingctx, p, place, value):
    """Stores 16 values between -127 and 127 as int8 at p + place, rounded to nearest even; returns what was stored."""

    def codegen(context, builder, sig, args):
        p, place, value = args
        shifted = simd.emit_fence(builder, builder.fadd(value, simd.splat_float(INTEGERS)))
        codes = builder.trunc(builder.bitcast(shifted, I32X), I8X)
        where = builder.bitcast(p, I8.as_pointer())
        builder.store(codes, builder.bitcast(builder.gep(where, [place]), I8X.as_pointer()), align=1)
        return builder.fsub(shifted, simd.splat_float(INTEGERS))

    return float32x(p, types.intp, float32x), codegen


@intrinsic
def larger_size(typingctx, a, b):
    """Larger of |a| and b in each lane, b being a result of it or zero; NaN if either is."""

    def codegen(context, builder, sig, args):
        a, b = (builder.bitcast(value, I32X) for value in args)
        # the bits of sizes have the order of sizes, with Inf and then NaN on top
        size = builder.and_(a, simd.splat_int(0x7FFFFFFF))
        return builder.bitcast(simd.emit_call(builder, "llvm.smax.v16i32", I32X, [size, b]), F32X)

    return float32x(float32x, float32x), codegen


@intrinsic
def largest_size(typingctx, x):
    """Largest lane of a result of `larger_size`; NaN if one is."""

    def codegen(context, builder, sig, args):
        bits = simd.emit_call(
            builder, "llvm.vector.reduce.smax.v16i32", I32, [builder.bitcast(args[0], I32X)]
        )
        return builder.bitcast(bits, simd.F32)

    return types.float32(float32x), codegen


@intrinsic
def words_of(typingctx, p):
    """The same address as a pointer to int32."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], I32.as_pointer())

    return types.CPointer(types.int32)(p), codegen


# ---- rows -----------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """x as `quantize_row` leaves it, tile of rows by tile of rows; each row of x is `terms` rows there."""

    words: Any  # pointer to int32 [tile, words, rows of the tile]
    scales: Any  # pointer to float32 [tile, groups, rows of the tile]
    offsets: Any  # pointer to int32 like scales
    n_rows: Any  # of x
    terms: Any
    n_packed: Any  # rows there
    n_words: Any  # of a row
    n_groups: Any
    group: Any  # inputs


@body
def packed_rows(n_rows):
    """Rows of packed x: up to 4 rows cost what memory costs in any case."""
    return n_rows if n_rows <= 2 else (n_rows + 3) // 4 * 4


@body
def tile_rows(row, n_packed):
    """Rows of the tile that starts at a row."""
    left = n_packed - row
    if left >= TILE_ROWS:
        return TILE_ROWS
    rows = 8
    while rows > left:
        rows //= 2
    return rows


@body
def tile_of(row, n_packed):
    """(first row, rows) of the tile that has a row."""
    first = row // TILE_ROWS * TILE_ROWS
    rows = tile_rows(first, n_packed)
    while row >= first + rows:
        first += rows
        rows = tile_rows(first, n_packed)
    return first, rows


@body
def group_of_x(group, terms):
    """Inputs of x with a scale of their own; fewer where they must be as exact as float32."""
    most = X_GROUP if terms < 3 else X_GROUP // 2
    return group if 0 < group <= most else most


@body
def count_words(size):
    """Of a row of x, padded to whole units of 4-bit codes."""
    return (size + 7) // 8 * 2


@body
def _quantize_group(source, start, count, zero, rows, row, group, rest):
    """A group of inputs as codes, a scale and an offset in a packed row: `count` values from source[start], zeros behind.

    Writes what is left of the values, source - scale code, to rest (pointer to float32); returns how many there are.
    """
    room = words_of(stack_floats(64))
    first, n_together = tile_of(row, rows.n_packed)
    words = shifted(rows.words, first * rows.n_words + row - first)
    place = (first * rows.n_groups + row - first) + group * n_together
    whole = count // LANES * LANES
    largest = splat(0.0)
    for k in range(0, whole, LANES):
        largest = larger_size(load(source, start + k), largest)
    if whole < count:
        largest = larger_size(load_part(source, start + whole, count - whole), largest)
    most = largest_size(largest)
    scale = most * np.float32(1 / 127)
    # the quotient of vectors: that of numbers may be taken by a reciprocal
    inverse = splat(127.0) / splat(most)
    if not most < np.float32(np.inf):
        scale, count, whole = np.float32(np.nan), 0, 0
    elif most < np.float32(1e-36):
        scale, count, whole = np.float32(0), 0, 0
    # the codes of a row alone are written where they belong, unless that would touch what is behind them
    in_place = n_together == 1 and whole == count
    first_word = group * rows.group // 4
    codes = shifted(words, first_word) if in_place else room
    total = splat(0.0)
    for k in range(0, count, LANES):
        value = load(source, start + k) if k < whole else load_part(source, start + k, count - k)
        code = round_to_codes(codes, k, value * inverse)
        total = total + code
        if rows.terms > 1:
            store(rest, k, fma(splat(-scale), code, value))
    last = (count + 3) // 4
    if not in_place:
        for k in range(last):
            words[(first_word + k) * n_together] = codes[k]
    for k in range(first_word + last, min(first_word + rows.group // 4, rows.n_words)):
        words[k * n_together] = 0
    store_scalar(rows.scales, place, scale)
    rows.offsets[place] = -np.int64(sum_lanes(total)) * zero
    return count


@body
def quantize_row(row, x, size, zero, rows):
    """One row of x as signed 8-bit codes, q = round(127 x / absmax), and a scale and an offset for each group.

    A group that is not finite has NaN as its scale, one that is zero has 0. The next term is what is left of the first one.
    """
    rest = stack_floats(256)
    first = row * rows.terms
    terms = min(rows.terms, rows.n_packed - first)
    for group in range(rows.n_groups):
        start = group * rows.group
        count = min(rows.group, size - start) if row < rows.n_rows else 0
        count = _quantize_group(x, row * size + start, count, zero, rows, first, group, rest)
        for term in range(1, terms):
            count = _quantize_group(rest, 0, count, zero, rows, first + term, group, rest)
