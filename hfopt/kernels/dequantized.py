"""Linear layers of quantised weights in the arithmetic of x: the weights are dequantised, a part of a panel at a time.

    y = epilogue(row_scale * sum of x (code_w - zero) scale_w + b)

A *panel* is 32 output columns, as in `linear_tiles`. With bfloat16 its values are rounded to that, without the scales of
whole rows, which the sums are multiplied by.
"""

from typing import Any, NamedTuple

import numpy as np

from . import _tile
from ._dequantized_tile import dequantize
from ._jit import launch
from ._parallel import body, parallel_for, threads_for
from ._pointer import address_as, as_units, floats_at, load, pointer, shifted
from ._quantized_tile import UNIT
from ._simd import LANES
from .linear import WEIGHT, columns_of, count_blocks, field_of, finish
from .linear_tiles import TILE_COLUMNS, half_panel
from .quantized import (
    PART_ROWS,
    ROW_SCALES,
    SCALES,
    ZEROS,
    open_layer,
    packed_rows,
    scaling_of,
    tile_of,
    tile_rows,
    zero_point,
)

_DEPTH = 128  # 32-bit units of x at a time: they and the weights that they meet stay in the L1 cache
_PARALLEL_SIZE = 1 << 14  # elements to pack, or weights; below, more threads cost more than they save


class _Rows(NamedTuple):
    """x, tile of rows by tile of rows."""

    packed: Any  # pointer to 32-bit units [tile, units, rows of the tile]
    n_rows: Any  # of x
    n_packed: Any
    n_units: Any


@body
def _pack_row(row, x, size, rows):
    """One row of x in 32-bit units to its place in its tile; zeros for rows that x does not have."""
    per_unit = _tile.units_ratio(x)
    first, n_together = tile_of(row, rows.n_packed)
    target = shifted(rows.packed, first * rows.n_units + row - first)
    source = shifted(x, row * size)
    for unit in range(rows.n_units):
        valid = min(per_unit, size - unit * per_unit) if row < rows.n_rows else 0
        _tile.copy_unit(source, unit * per_unit, valid, target, unit * n_together)


@body
def _dequantize_half(layer, matrix, block, first, last, target):
    """Inputs first to last of a block, into 16 of the 32 columns at target."""
    per_unit = 4 if layer.bits == 8 else 8
    n_units = (layer.size + per_unit - 1) // per_unit
    n_groups = 1 if layer.group == 0 else layer.size // layer.group
    length = n_units if layer.group == 0 else layer.group // per_unit
    scales, zeros = scaling_of(layer, matrix, SCALES), scaling_of(layer, matrix, ZEROS)
    w = (
        field_of(layer, matrix, WEIGHT) + block * n_units * UNIT,
        scales + block * n_groups * 2 * LANES if scales != 0 else 0,
        zeros + block * n_groups * LANES if zeros != 0 else 0,
        layer.levels,
    )
    part = (first // per_unit, min((last + per_unit - 1) // per_unit, n_units), length)
    if layer.bits == 8:
        dequantize(w, part, target, zero_point(layer), 0)
    elif layer.levels == 0:
        dequantize(w, part, target, zero_point(layer), 1)
    else:
        dequantize(w, part, target, zero_point(layer), 2)


@body
def _finish_panel(layer, panel, sums, first_row, n_rows):
    """Epilogue of the rows of a part; with `gated` the halves of a panel are gate and up."""
    for half in range(1 if layer.gated else 0, 2):
        matrix, first, n_columns = half_panel(layer, panel, half)
        if n_columns > 0:
            columns = columns_of(layer, matrix, first)
            scale = load(floats_at(scaling_of(layer, matrix, ROW_SCALES)), first)
            gate_scale = load(floats_at(scaling_of(layer, 0, ROW_SCALES)), first) if layer.gated else scale
            for row in range(n_rows):
                here = row * TILE_COLUMNS
                value, gate = load(sums, here + half * LANES) * scale, load(sums, here) * gate_scale
                finish(layer, columns, first_row + row, value, gate)


@body
def _multiply_panel(index, rows, layer, n_parts):
    """One panel for a part of the rows."""
    sums = _tile.stack_floats(264 * 32)
    room = as_units(_tile.stack_floats(128 * 32), layer.out)
    panel, first_row = index // n_parts, index % n_parts * PART_ROWS
    last_row = min(first_row + PART_ROWS, rows.n_packed)
    per_unit = _tile.units_ratio(layer.out)
    for first in range(0, rows.n_units, _DEPTH):
        last = min(first + _DEPTH, rows.n_units)
        for half in range(2):
            matrix, column, n_columns = half_panel(layer, panel, half)
            if n_columns > 0:
                target = shifted(room, half * LANES)
                _dequantize_half(layer, matrix, column // LANES, first * per_unit, last * per_unit, target)
        row = first_row
        while row < last_row:
            n_together = tile_rows(row, rows.n_packed)
            x = shifted(rows.packed, row * rows.n_units + first * n_together)
            to, more = shifted(sums, (row - first_row) * TILE_COLUMNS), first > 0
            if n_together == 1:
                _tile.outer_tile(x, room, last - first, to, 1, 2, more)
            elif n_together == 2:
                _tile.outer_tile(x, room, last - first, to, 2, 2, more)
            elif n_together == 4:
                _tile.outer_tile(x, room, last - first, to, 4, 2, more)
            elif n_together == 8:
                _tile.outer_tile(x, room, last - first, to, 8, 2, more)
            else:
                _tile.outer_tile(x, room, last - first, to, 12, 2, more)
            row += n_together
    _finish_panel(layer, panel, sums, first_row, min(last_row, rows.n_rows) - first_row)


@body
def dequantized_scratch(x, n_rows, size):
    """float32 of scratch that `multiply_dequantized` needs."""
    per_unit = _tile.units_ratio(x)
    return packed_rows(n_rows) * ((size + per_unit - 1) // per_unit) + LANES


@body
def multiply_dequantized(x, n_rows, layer, scratch):
    """layer.out = epilogue(x W^T + b) for n_rows rows at x; scratch: pointer to `dequantized_scratch` float32."""
    size, n_packed, per_unit = layer.size, packed_rows(n_rows), _tile.units_ratio(x)
    packed = as_units(shifted(scratch, _tile.to_cache_line(scratch)), x)
    rows = _Rows(packed, n_rows, n_packed, (size + per_unit - 1) // per_unit)
    parallel_for(_pack_row, threads_for(n_packed, n_rows * size, _PARALLEL_SIZE), n_packed, (x, size, rows))
    n_blocks = count_blocks(layer)
    n_parts = (n_packed + PART_ROWS - 1) // PART_ROWS
    n_items = (n_blocks if layer.gated else (n_blocks + 1) // 2) * n_parts
    threads = threads_for(n_items, size * n_blocks * LANES, _PARALLEL_SIZE)
    parallel_for(_multiply_panel, threads, n_items, (rows, layer, n_parts))


@launch
def dequantized_linear(
    like, x, n_rows, size, table, scaling, bits, group, levels, gated, code, residuals, out, width
):
    """out = epilogue(x W^T + b) for dequantised matrices; arguments as in `quantized.quantized_linear`."""
    x, out = address_as(x, pointer(like)), address_as(out, pointer(like))
    layer = open_layer(size, table, scaling, bits, group, levels, gated, code, residuals, out, width)
    room = np.empty(dequantized_scratch(x, n_rows, size), np.float32)
    multiply_dequantized(x, n_rows, layer, pointer(room))
    room[0] = 0  # the last use of the scratch: it must live until here
