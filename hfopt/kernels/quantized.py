"""Linear layers of quantised weights, by products of integers: x is quantised as well, row by row and group by group.

    y = epilogue(row_scale * sum over groups of scale_x scale_w (sum of code_x (code_w - zero)) + b)

What 8 bits leave of a row of x can be quantised again, as a second and a third *term* of the row: with enough of them
nothing counts that is left, and only the weights are quantised. They are rows like any others until their results are added.

The weights of a *block*, 16 output columns, follow each other in memory: codes uint8 [blocks, units, 64] (`_quantized_tile`
says what a unit is), scales float16 [blocks, groups, 16], zero points uint8 [blocks, groups, 16], and scales of whole rows
float32 [blocks, 16]. Inputs are padded to whole units and columns to whole blocks.

Sums of products are exact, and groups are added one after the other: a row has the same bits whatever the number of rows
and of threads.
"""

from typing import Any, NamedTuple

import numpy as np

from ._jit import launch
from ._parallel import body, parallel_for, threads_for
from ._pointer import (
    address_as,
    floats_at,
    load,
    load_part,
    pointer,
    prefetch,
    shifted,
    store,
    store_scalar,
)
from ._quantized_tile import (
    FEW_BLOCKS,
    MORE_BLOCKS,
    TILE_ROWS,
    UNIT,
    Steps,
    larger_size,
    largest_size,
    quantized_tile,
    store_codes,
    words_of,
)
from ._simd import LANES
from ._tile import stack_floats, to_cache_line
from ._vector import fma, splat, sum_lanes
from .linear import WEIGHT, blocks_of, columns_of, count_blocks, field_of, finish

SCALES, ZEROS, ROW_SCALES = range(3)
_FIELDS = 3

X_GROUP = 256  # inputs of x with a scale of their own, where the weights have no smaller groups
# Terms that keep what x has, by the bytes of its elements: each has 8 bits more of the largest input of a group.
MOST_TERMS = {2: 2, 4: 3}
_PARALLEL_SIZE = 1 << 16  # elements of x, or products; below, more threads cost more than they save
PART_ROWS = 264  # most rows of a part: what they have of x stays in the L2 cache; a literal below
_CHUNK = 1024  # inputs that all tiles of a part meet before the next ones


class Quantized(NamedTuple):
    """As `linear.Linear`, where the table has the addresses of codes, and what the codes mean."""

    size: Any
    table: Any
    n_matrices: Any
    gated: Any
    code: Any
    residuals: Any
    n_residuals: Any
    out: Any
    width: Any
    scaling: Any  # pointer to int64 [n_matrices, 3]: addresses of scales or 0, of zero points or 0, of scales of rows
    bits: Any  # 8 or 4
    group: Any  # inputs with a scale in common, or 0
    levels: Any  # address of 16 bytes that 4-bit codes are indices into, or 0


class _Rows(NamedTuple):
    """x as `_quantize_row` leaves it, tile of rows by tile of rows; each row of x is `terms` rows there."""

    words: Any  # pointer to int32 [tile, words, rows of the tile]
    scales: Any  # pointer to float32 [tile, groups, rows of the tile]
    offsets: Any  # pointer to int32 like scales
    n_rows: Any  # of x
    terms: Any
    n_packed: Any  # rows there
    n_words: Any  # of a row
    n_groups: Any
    group: Any  # inputs


class _Work(NamedTuple):
    """How the work is dealt out."""

    blocks: Any  # of a strip
    n_parts: Any  # of the rows
    part_rows: Any  # of a part
    ahead: Any  # bytes by which codes are asked for in advance


@body
def scaling_of(layer, matrix, field):
    return layer.scaling[matrix * _FIELDS + field]


# ---- x ---------------------------------------------------------------------------------------------------------------


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
def _x_group(group, terms):
    """Inputs of x with a scale of their own; fewer where they must be as exact as float32."""
    most = X_GROUP if terms < 3 else X_GROUP // 2
    return group if 0 < group <= most else most


@body
def _words(size):
    """Of a row of x, padded to whole units of 4-bit codes."""
    return (size + 7) // 8 * 2


@body
def zero_point(layer):
    """That of all codes, or 1 where each group has its own."""
    if scaling_of(layer, 0, ZEROS) != 0:
        return 1
    return 128 if layer.bits == 8 or layer.levels != 0 else 8


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
        code = store_codes(codes, k, value * inverse)
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
def _quantize_row(row, x, size, zero, rows):
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


# ---- blocks ----------------------------------------------------------------------------------------------------------


@body
def _shift(group, x_group):
    """log2 of the groups of x in one of the weights; 62 where those have none."""
    if group == 0:
        return 62
    shift = 0
    while group > x_group << shift:
        shift += 1
    return shift


class _Strip(NamedTuple):
    """Blocks that a tile works on together: of one matrix, or with `gated` as many of both."""

    matrix: Any  # the first one's
    block: Any  # the first one
    count: Any  # panels
    blocks: Any  # of a tile, which may be more: then some are worked on twice


class _Operands(NamedTuple):
    """The strip of weights that tiles multiply."""

    w: Any  # addresses of codes, scales, zero points, levels
    steps: Any  # of codes, scales, zero points
    length: Any  # units of a group of x
    n_units: Any
    shift: Any
    ahead: Any


def _dot_of(kind):
    """The body that multiplies a tile of rows with codes of a kind of `quantized_tile`; tiles are made for literals."""

    @body
    def dot(x, rows, o, part, to):
        steps, part = o.steps, (*part, o.length, o.n_units, o.shift, o.ahead)
        if rows == 1:
            quantized_tile(x, o.w, steps, part, to, 1, FEW_BLOCKS, kind)
        elif rows == 2:
            quantized_tile(x, o.w, steps, part, to, 2, FEW_BLOCKS, kind)
        elif rows == 4:
            quantized_tile(x, o.w, steps, part, to, 4, MORE_BLOCKS, kind)
        elif rows == 8:
            quantized_tile(x, o.w, steps, part, to, 8, MORE_BLOCKS, kind)
        else:
            quantized_tile(x, o.w, steps, part, to, 12, MORE_BLOCKS, kind)

    return dot


_dot_codes, _dot_nibbles, _dot_levels = (_dot_of(kind) for kind in range(3))


@body
def _panels_of(layer, blocks):
    """Panels of a strip."""
    return blocks // 2 if layer.gated else blocks


@body
def count_strips(layer, blocks):
    """Number of strips of so many blocks."""
    if layer.gated:
        size = _panels_of(layer, blocks)
        return (count_blocks(layer) + size - 1) // size
    strips = 0
    for matrix in range(layer.n_matrices):
        strips += (blocks_of(layer, matrix) + blocks - 1) // blocks
    return strips


@body
def _find_strip(layer, index, blocks):
    if layer.gated:
        size = _panels_of(layer, blocks)
        first = index * size
        return _Strip(0, first, min(size, count_blocks(layer) - first), blocks)
    matrix = 0
    while index >= (blocks_of(layer, matrix) + blocks - 1) // blocks:
        index -= (blocks_of(layer, matrix) + blocks - 1) // blocks
        matrix += 1
    first = index * blocks
    return _Strip(matrix, first, min(blocks, blocks_of(layer, matrix) - first), blocks)


@body
def _place_in(layer, strip, panel, half):
    """Which of the blocks of a tile is the first or second one of a panel of a strip; see `_steps`."""
    if layer.gated:
        return 2 * panel + half
    return panel if panel < 2 else panel + strip.blocks - strip.count


@body
def _steps(layer, strip, one, other):
    """`Steps` where a block has `one` bytes and the second matrix is `other` bytes behind the first."""
    if layer.gated:
        far = one if strip.count > 1 else 0
        return Steps(other, far, strip.blocks // 2 * one)
    near = one if strip.count > 1 else 0
    return Steps(near, max(strip.count - 2, 0) * one, strip.blocks * one)


@body
def _operands(rows, layer, strip, ahead):
    """What tiles multiply with a strip."""
    per_unit = 4 if layer.bits == 8 else 8
    n_units = (layer.size + per_unit - 1) // per_unit
    n_groups = 1 if layer.group == 0 else layer.size // layer.group
    matrix, block = strip.matrix, strip.block
    codes, scales, zeros = (
        field_of(layer, matrix, WEIGHT),
        scaling_of(layer, matrix, SCALES),
        scaling_of(layer, matrix, ZEROS),
    )
    second = 1 if layer.gated else matrix
    code_bytes, scale_bytes, zero_bytes = n_units * UNIT, n_groups * 2 * LANES, n_groups * LANES
    steps = (
        _steps(layer, strip, code_bytes, field_of(layer, second, WEIGHT) - codes),
        _steps(layer, strip, scale_bytes, scaling_of(layer, second, SCALES) - scales),
        _steps(layer, strip, zero_bytes, scaling_of(layer, second, ZEROS) - zeros),
    )
    return _Operands(
        (
            codes + block * code_bytes,
            scales + block * scale_bytes if scales != 0 else 0,
            zeros + block * zero_bytes if zeros != 0 else 0,
            layer.levels,
        ),
        steps,
        rows.group // per_unit,
        n_units,
        _shift(layer.group, rows.group),
        ahead,
    )


@body
def _multiply_tile(rows, row, n_together, layer, operands, part, to):
    """Adds the products of a tile of rows with a strip.

    part: (first group of x, end). to: (pointer to the tile's sums, elements from a block to the next).
    """
    place = row * rows.n_groups
    x = (shifted(rows.words, row * rows.n_words), shifted(rows.scales, place), shifted(rows.offsets, place))
    if layer.bits == 8:
        _dot_codes(x, n_together, operands, part, to)
    elif layer.levels == 0:
        _dot_nibbles(x, n_together, operands, part, to)
    else:
        _dot_levels(x, n_together, operands, part, to)


@body
def _clear(sums, count):
    for k in range(0, count, LANES):
        store(sums, k, splat(0.0))


@body
def _sum_terms(sums, row, terms):
    """The sum of a row of x, the least term first."""
    last = (row + 1) * terms - 1
    total = load(sums, last * LANES)
    for term in range(1, terms):
        total = total + load(sums, (last - term) * LANES)
    return total


@body
def _finish_strip(layer, strip, sums, sum_step, first_row, n_rows, terms):
    """Epilogue of the columns of a strip, in rows of x."""
    matrix = 1 if layer.gated else strip.matrix
    for panel in range(strip.count):
        first = (strip.block + panel) * LANES
        columns = columns_of(layer, matrix, first)
        gates = shifted(sums, _place_in(layer, strip, panel, 0) * sum_step)
        values = shifted(sums, _place_in(layer, strip, panel, 1) * sum_step) if layer.gated else gates
        scale = load(floats_at(scaling_of(layer, matrix, ROW_SCALES)), first)
        gate_scale = load(floats_at(scaling_of(layer, 0, ROW_SCALES)), first) if layer.gated else scale
        for row in range(n_rows):
            value = _sum_terms(values, row, terms) * scale
            gate = _sum_terms(gates, row, terms) * gate_scale if layer.gated else value
            finish(layer, columns, first_row + row, value, gate)


@body
def _ask_for_rows(layer, strip):
    """Asks for what the epilogue of the next strip reads."""
    place = (strip.block + _panels_of(layer, strip.blocks)) * LANES
    for panel in range(strip.count):
        prefetch(floats_at(scaling_of(layer, strip.matrix, ROW_SCALES)), place + panel * LANES)
        if layer.gated:
            prefetch(floats_at(scaling_of(layer, 1, ROW_SCALES)), place + panel * LANES)


@body
def _part_rows(n_packed):
    """Rows of a part: whole tiles, all terms of their rows, and as many in each part."""
    n_parts = (n_packed + PART_ROWS - 1) // PART_ROWS
    return (n_packed + 12 * n_parts - 1) // (12 * n_parts) * 12


@body
def _multiply_strip(index, rows, layer, work):
    """A strip of a part of the rows."""
    sums = stack_floats(264 * 32)
    first_row = index % work.n_parts * work.part_rows
    last_row = min(first_row + work.part_rows, rows.n_packed)
    n_rows = last_row - first_row
    sum_step = n_rows * LANES
    _clear(sums, work.blocks * sum_step)
    strip = _find_strip(layer, index // work.n_parts, work.blocks)
    if first_row == 0:
        _ask_for_rows(layer, strip)
    operands = _operands(rows, layer, strip, work.ahead)
    step = rows.n_groups if n_rows <= TILE_ROWS else max(1, _CHUNK // rows.group)
    for group in range(0, rows.n_groups, step):
        last = min(group + step, rows.n_groups)
        row = first_row
        while row < last_row:
            n_together = tile_rows(row, rows.n_packed)
            to = shifted(sums, (row - first_row) * LANES), sum_step
            _multiply_tile(rows, row, n_together, layer, operands, (group, last), to)
            row += n_together
    first, count = first_row // rows.terms, n_rows // rows.terms
    _finish_strip(layer, strip, sums, sum_step, first, min(count, rows.n_rows - first), rows.terms)


@body
def quantized_scratch(n_rows, size, group, terms):
    """float32 of scratch that `multiply_quantized` needs."""
    x_group = _x_group(group, terms)
    return packed_rows(n_rows * terms) * (_words(size) + 2 * ((size + x_group - 1) // x_group)) + LANES


@body
def multiply_quantized(x, n_rows, layer, terms, scratch):
    """layer.out = epilogue(x W^T + b) for n_rows rows at x, each the sum of so many rows of codes.

    scratch: pointer to `quantized_scratch` float32.
    """
    n_terms, size, group = n_rows * terms, layer.size, _x_group(layer.group, terms)
    n_packed = packed_rows(n_terms)
    words, n_groups = shifted(scratch, to_cache_line(scratch)), (size + group - 1) // group
    scales = shifted(words, n_packed * _words(size))
    offsets = shifted(scales, n_packed * n_groups)
    offsets = words_of(offsets)
    rows = _Rows(words_of(words), scales, offsets, n_rows, terms, n_packed, _words(size), n_groups, group)
    n_packings = (n_packed + terms - 1) // terms
    threads = threads_for(n_packings, n_terms * size, _PARALLEL_SIZE)
    parallel_for(_quantize_row, threads, n_packings, (x, size, zero_point(layer), rows))

    blocks, ahead = (FEW_BLOCKS, 1024) if n_terms <= 2 else (MORE_BLOCKS, 4096)  # measured
    n_strips = count_strips(layer, blocks)
    part_rows = _part_rows(n_packed)
    n_parts = (n_packed + part_rows - 1) // part_rows
    work = _Work(blocks, n_parts, part_rows, ahead)
    n_items = n_strips * n_parts
    threads = threads_for(n_items, n_terms * size * n_strips * blocks, _PARALLEL_SIZE)
    parallel_for(_multiply_strip, threads, n_items, (rows, layer, work))


@body
def open_layer(size, table, scaling, bits, group, levels, gated, code, residuals, out, width):
    """The layer that the arguments of a launch describe."""
    return Quantized(
        size,
        pointer(table),
        table.shape[0],
        gated,
        code,
        pointer(residuals),
        residuals.shape[0],
        out,
        width,
        pointer(scaling),
        bits,
        group,
        levels,
    )


@launch
def quantized_linear(
    like, x, n_rows, size, table, scaling, bits, group, levels, terms, gated, code, residuals, out, width
):
    """out = epilogue(x W^T + b) for quantised matrices.

    Arguments as in `linear.linear_rows`, the table having addresses of codes, and: scaling int64 [matrices, 3], addresses of
    scales or 0, zero points or 0, scales of rows; bits 8 or 4; group: inputs with a scale in common, or 0; levels: address
    of 16 bytes that 4-bit codes are indices into, or 0; terms: rows of codes that a row of x is the sum of, 1, 2 or 3.
    """
    x, out = address_as(x, pointer(like)), address_as(out, pointer(like))
    layer = open_layer(size, table, scaling, bits, group, levels, gated, code, residuals, out, width)
    room = np.empty(quantized_scratch(n_rows, size, group, terms), np.float32)
    multiply_quantized(x, n_rows, layer, terms, pointer(room))
    room[0] = 0  # the last use of the scratch: it must live until here
