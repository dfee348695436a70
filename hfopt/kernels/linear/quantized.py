"""Linear layers of quantised weights, by products of integers: x is quantised as well, row by row and group by group.

    y = epilogue(row_scale * sum over groups of scale_x scale_w (sum of code_x (code_w - zero)) + b)

Many rows of bfloat16 are left as they are where the target has tile registers (`matrix_quantized`).

What 8 bits leave of a row of x can be quantised again, as a second and a third *term* of the row: with enough of them
nothing counts that is left, and only the weights are quantised. They are rows like any others until their results are added.

The weights of a *block*, 16 output columns, follow each other in memory: codes uint8 [blocks, units, 64] (`quantized_tile`
says what a unit is), scales float16 [blocks, groups, 16], zero points uint8 [blocks, groups, 16], and scales of whole rows
float32 [blocks, 16]. Inputs are padded to whole units and columns to whole blocks.

Sums of products are exact, and groups are added one after the other: a row has the same bits whatever the number of threads,
and of rows (of bfloat16 with tile registers: of up to 64).
"""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.instruction import Format, Instruction, read_fields
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for, usable_threads
from hfopt.kernels.linear.blocks import LinearColumns, gather_residuals
from hfopt.kernels.linear.matrix_quantized import can_unpack, multiply_unpacked, unpacked_scratch
from hfopt.kernels.linear.quantized_rows import (
    Rows,
    count_words,
    group_of_x,
    packed_rows,
    quantize_row,
    tile_rows,
    words_of,
)
from hfopt.kernels.linear.quantized_strip import (
    Quantized,
    ask_for_rows,
    count_strips,
    find_strip,
    finish_strip,
    multiply_tile,
    operands_of,
    zero_point,
)
from hfopt.kernels.linear.quantized_tile import FEW_BLOCKS, MORE_BLOCKS, TILE_ROWS
from hfopt.kernels.simd.matrix import has_tiles
from hfopt.kernels.simd.memory import store
from hfopt.kernels.simd.pointer import address_as, address_of, floats_at, integers_at, pointer, shifted
from hfopt.kernels.simd.tile import stack_addresses, stack_floats, to_cache_line
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import splat

# Terms that keep what x has, by the type of its elements as kernels get them: each has 8 bits more of the largest input of a
# group. bfloat16 has 8 bits itself, float16 11.
MAX_TERMS = {"float32": 3, "uint16": 2, "int16": 3}
_PARALLEL_SIZE = 1 << 16  # elements of x, or products; below, more threads cost more than they save
PART_ROWS = 264  # most rows of a part: what they have of x stays in the L2 cache; a literal below
_WHOLE = 12  # rows that are whole tiles of every target, and whole rows of x with 1, 2 or 3 terms
_CHUNK = 1024  # inputs that all tiles of a part meet before the next ones


class _Work(NamedTuple):
    """How the work is dealt out."""

    blocks: Any  # of a strip
    n_parts: Any  # of the rows
    part_rows: Any  # of a part
    ahead: Any  # bytes by which codes are asked for in advance


@body
def _clear(sums, count):
    for k in range(0, count, LANES):
        store(sums, k, splat(0.0))


@body
def _part_rows(n_packed):
    """Rows of a part: whole tiles, all terms of their rows, and as many in each part."""
    n_parts = (n_packed + PART_ROWS - 1) // PART_ROWS
    return (n_packed + _WHOLE * n_parts - 1) // (_WHOLE * n_parts) * _WHOLE


@body
def _multiply_strip(index, rows, layer, work):
    """A strip of a part of the rows."""
    sums = stack_floats(264 * 32)
    first_row = index % work.n_parts * work.part_rows
    last_row = min(first_row + work.part_rows, rows.n_packed)
    n_rows = last_row - first_row
    sum_step = n_rows * LANES
    _clear(sums, work.blocks * sum_step)
    strip = find_strip(layer, index // work.n_parts, work.blocks)
    if first_row == 0:
        ask_for_rows(layer, strip)
    operands = operands_of(rows, layer, strip, work.ahead)
    step = rows.n_groups if n_rows <= TILE_ROWS else max(1, _CHUNK // rows.group)
    for group in range(0, rows.n_groups, step):
        last = min(group + step, rows.n_groups)
        row = first_row
        while row < last_row:
            n_together = tile_rows(row, rows.n_packed)
            to = shifted(sums, (row - first_row) * LANES), sum_step
            multiply_tile(rows, row, n_together, layer, operands, (group, last), to)
            row += n_together
    first, count = first_row // rows.terms, n_rows // rows.terms
    finish_strip(layer, strip, sums, sum_step, first, min(count, rows.n_rows - first), rows.terms)


@body
def quantized_scratch(x, n_rows, size, group, terms, threads):
    """float32 of scratch that `multiply_quantized` needs for rows like x, on so many threads."""
    if has_tiles(x) and can_unpack(n_rows, size, group, terms):
        return (unpacked_scratch(size, threads) + 3) // 4
    x_group = group_of_x(group, terms)
    return packed_rows(n_rows * terms) * (count_words(size) + 2 * ((size + x_group - 1) // x_group)) + LANES


@body
def multiply_quantized(x, n_rows, layer, terms, scratch, threads):
    """layer.out = epilogue(x W^T + b) for n_rows rows at x, each the sum of so many rows of codes.

    scratch: pointer to `quantized_scratch` float32.
    """
    if has_tiles(x) and can_unpack(n_rows, layer.size, layer.group, terms):
        multiply_unpacked(x, n_rows, layer, address_of(scratch), threads)
        return
    n_terms, size, group = n_rows * terms, layer.size, group_of_x(layer.group, terms)
    n_packed = packed_rows(n_terms)
    words, n_groups = shifted(scratch, to_cache_line(scratch)), (size + group - 1) // group
    scales = shifted(words, n_packed * count_words(size))
    offsets = shifted(scales, n_packed * n_groups)
    offsets = words_of(offsets)
    rows = Rows(words_of(words), scales, offsets, n_rows, terms, n_packed, count_words(size), n_groups, group)
    n_packings = (n_packed + terms - 1) // terms
    threads = threads_for(n_packings, n_terms * size, _PARALLEL_SIZE)
    parallel_for(quantize_row, threads, n_packings, (x, size, zero_point(layer), rows))

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

    Arguments as in `rows.linear_rows`, the table having addresses of codes, and: scaling int64 [matrices, 3], addresses of
    scales or 0, zero points or 0, scales of rows; bits 8 or 4; group: inputs with a scale in common, or 0; levels: address
    of 16 bytes that 4-bit codes are indices into, or 0; terms: rows of codes that a row of x is the sum of, 1, 2 or 3.
    """
    x, out = address_as(x, pointer(like)), address_as(out, pointer(like))
    layer = open_layer(size, table, scaling, bits, group, levels, gated, code, residuals, out, width)
    threads = usable_threads()
    room = np.empty(quantized_scratch(x, n_rows, size, group, terms, threads), np.float32)
    multiply_quantized(x, n_rows, layer, terms, pointer(room), threads)
    room[0] = 0  # the last use of the scratch: it must live until here


# ---- the instruction --------------------------------------------------------------------------------------------------


@body
def _run(like, held, operands, step):
    own, format = read_fields(operands.own, LinearColumns), read_fields(operands.format, Format)
    residuals = stack_addresses(2)
    n_residuals = gather_residuals(own, step, residuals)
    layer = Quantized(
        operands.size,
        integers_at(own.matrices),
        own.n_matrices,
        own.gated != 0,
        own.code,
        residuals,
        n_residuals,
        address_as(operands.out, like),
        own.width,
        integers_at(format.scaling),
        format.bits,
        format.group,
        format.levels,
    )
    x, scratch = address_as(operands.x, like), floats_at(step.scratch)
    multiply_quantized(x, operands.n, layer, format.terms, scratch, step.threads)


@body
def _scratch_bytes(like, own, format, sizes):
    format = read_fields(format, Format)
    return 4 * quantized_scratch(like, sizes.n, sizes.size, format.group, format.terms, sizes.threads)


QUANTIZED_LINEAR = Instruction(
    "quantized linear", LinearColumns._fields, _run, _scratch_bytes, needs_formats=True
)
