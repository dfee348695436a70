"""Linear layers: y = epilogue(x W^T + b) over one or several weight matrices in one launch.

The matrices stay where the model has them, `[out, in]` row-major; a launch gets their addresses in a table of int64,
one row a matrix: (weight address, bias address or 0, out features, first output column).

A *block* is 16 output columns of one matrix, with `gated` the same 16 columns of both matrices. Each output value is
summed by one thread in a fixed order, so the bits do not depend on the number of threads.
"""

import numpy as np

from . import _tile
from ._jit import launch
from ._parallel import body, parallel_for, usable_threads
from ._simd import LANES, address_as, as_units, load, load_part, pointer, shifted, store, store_part
from .activation import activate

WEIGHT, BIAS, SIZE, COLUMN = range(4)

ROW_LIMIT = 16  # most rows of `linear_rows`; a literal below, in the size of its stack
# units of x that a block of weights is multiplied with before the next ones: half an L1 cache
DEPTH_UNITS = 4096
# 14 rows x 2 vectors of sums, 2 of weights and one of x fill the 32 vector registers of AVX-512
TILE_COLUMNS = 2 * LANES
# Packed weights at a time: 4 panels x 512 units x 32 columns x 4 bytes stay in an L2 cache (256 KB), and the part of x that
# they meet (14 rows x 512 units, 28 KB) in an L1 cache; x is read once for every 128 columns.
PANELS = 4
PANEL_UNITS = 512


@body
def _block_of(table, index):
    """(matrix, first row in it) of the index-th block of 16 output columns."""
    matrix = 0
    while index >= (table[matrix, SIZE] + LANES - 1) // LANES:
        index -= (table[matrix, SIZE] + LANES - 1) // LANES
        matrix += 1
    return matrix, index * LANES


@body
def count_blocks(table, gated):
    """Number of blocks of 16 output columns."""
    if gated:
        return (table[0, SIZE] + LANES - 1) // LANES
    blocks = 0
    for matrix in range(table.shape[0]):
        blocks += (table[matrix, SIZE] + LANES - 1) // LANES
    return blocks


@body
def _finish(value, gate, n_columns, bias, gate_bias, code, gated, residuals, out, place):
    """Epilogue of 16 output columns of one row: bias, activation, gate, residuals, rounding, store at out + place.

    `value` belongs to the only matrix, or with `gated` to the second one, and `gate` to the first.
    """
    if bias != 0:
        value = value + load_part(address_as(bias, out), 0, n_columns)
    if gated:
        if gate_bias != 0:
            gate = gate + load_part(address_as(gate_bias, out), 0, n_columns)
        value = activate(gate, code) * value
    else:
        value = activate(value, code)
    for r in range(residuals.shape[0]):
        value = value + load_part(address_as(residuals[r], out), place, n_columns)
    if n_columns == LANES:
        store(out, place, value)
    else:
        store_part(out, place, n_columns, value)


@body
def _offset(address, count, item_size):
    """address + count items, 0 staying 0."""
    if address == 0:
        return address
    return address + count * item_size


@body
def _pack_chunks(x, n_rows, size, target):
    """Rows of x chunk by chunk (16 units of every row, then the next 16), zeros behind the end; see `_tile.dot_tile`."""
    per_unit = _tile.units_ratio(x)
    n_units = (size + per_unit - 1) // per_unit
    for row in range(n_rows):
        source = shifted(x, row * size)
        whole = size // (per_unit * LANES)
        for chunk in range(whole):
            _tile.copy_chunk(source, chunk * LANES * per_unit, target, (chunk * n_rows + row) * LANES)
        for unit in range(whole * LANES, (n_units + LANES - 1) // LANES * LANES):
            place = (unit // LANES * n_rows + row) * LANES + unit % LANES
            _tile.copy_unit(source, unit * per_unit, min(per_unit, size - unit * per_unit), target, place)


@body
def _dot_columns(x, n_rows, w, size, chunks, tail, sums, more):
    """Products of all packed rows of x with four rows of w."""
    row = 0
    x_step = n_rows * LANES
    while row < n_rows:
        left = n_rows - row
        x_here, out = shifted(x, row * LANES), shifted(sums, row * LANES * LANES)
        if left >= 8:
            _tile.dot_tile(x_here, x_step, w, size, chunks, tail, out, more, 8, 2, 1)
            w_next, out = shifted(w, 2 * size), shifted(out, 2 * LANES)
            _tile.dot_tile(x_here, x_step, w_next, size, chunks, tail, out, more, 8, 2, 1)
            row += 8
        elif left >= 4:
            _tile.dot_tile(x_here, x_step, w, size, chunks, tail, out, more, 4, 4, 1)
            row += 4
        elif left >= 2:
            _tile.dot_tile(x_here, x_step, w, size, chunks, tail, out, more, 2, 4, 2)
            row += 2
        else:
            _tile.dot_tile(x_here, x_step, w, size, chunks, tail, out, more, 1, 4, 2)
            row += 1


@body
def _dot_block(x, n_rows, size, w, n_columns, sums):
    """sums[i, j, :] = partial sums of x[i] . w[j] for all (packed) rows and up to 16 columns.

    For one row of x, the rows of w pass by one after the other: a single stream through memory is read faster than
    several at once. More rows share loads of x and w in tiles; from 8 on the depth is cut so that the part of x in use
    stays in the L1 cache.
    """
    width = LANES * _tile.units_ratio(w)
    whole = size // width
    step = max(16, DEPTH_UNITS // (LANES * n_rows)) if n_rows >= 8 else whole
    first = 0
    while True:
        last = min(first + step, whole)
        tail = size - whole * width if last == whole else 0
        more = first > 0
        x_here = shifted(x, first * n_rows * LANES)
        column = 0
        while column < n_columns:
            w_here, out = shifted(w, column * size + first * width), shifted(sums, column * LANES)
            if n_rows > 1 and column + 4 <= n_columns:
                _dot_columns(x_here, n_rows, w_here, size, last - first, tail, out, more)
                column += 4
            else:
                for row in range(n_rows):
                    x_row, to = shifted(x_here, row * LANES), shifted(out, row * LANES * LANES)
                    _tile.dot_tile(x_row, n_rows * LANES, w_here, size, last - first, tail, to, more, 1, 1, 4)
                column += 1
        first = last
        if first == whole:
            break


@body
def rows_block(index, x, n_rows, size, table, gated, code, residuals, out, width, item_size):
    """One block of up to 16 rows, straight from the row-major weights; x packed by `_pack_chunks`."""
    sums = _tile.stack_floats(16 * 16 * 16)
    gate = _tile.stack_floats(16 * 16 * 16)
    if gated:
        matrix, first = 1, index * LANES
        n_columns = min(table[0, SIZE] - first, LANES)
        w = shifted(address_as(table[0, WEIGHT], out), first * size)
        _dot_block(x, n_rows, size, w, n_columns, gate)
    else:
        matrix, first = _block_of(table, index)
        n_columns = min(table[matrix, SIZE] - first, LANES)
    w = shifted(address_as(table[matrix, WEIGHT], out), first * size)
    _dot_block(x, n_rows, size, w, n_columns, sums)
    bias = _offset(table[matrix, BIAS], first, item_size)
    gate_bias = _offset(table[0, BIAS], first, item_size)
    column = first if gated else table[matrix, COLUMN] + first
    for row in range(n_rows):
        value = _tile.sum_rows(shifted(sums, row * LANES * LANES))
        other = _tile.sum_rows(shifted(gate, row * LANES * LANES)) if gated else value
        place = row * width + column
        _finish(value, other, n_columns, bias, gate_bias, code, gated, residuals, out, place)


@launch
def linear_rows(x, table, gated, code, residuals, out):
    """out = epilogue(x W^T + b) for 1 to 16 rows.

    x [n, in], out [n, width]: float32 or bfloat16 bits, C-contiguous; table int64 [matrices, 4]; residuals int64 addresses
    of arrays like out; code from `activation`.
    """
    n_rows, size = x.shape
    n_units = (size * x.itemsize + 3) // 4
    room = np.empty((n_units + LANES) * n_rows + LANES, np.float32)
    packed = as_units(shifted(pointer(room), _tile.to_cache_line(pointer(room))), pointer(x))
    _pack_chunks(pointer(x), n_rows, size, packed)
    n_blocks = count_blocks(table, gated)
    arguments = (
        packed,
        n_rows,
        size,
        table,
        gated,
        code,
        residuals,
        pointer(out),
        out.shape[1],
        out.itemsize,
    )
    parallel_for(rows_block, min(usable_threads(), n_blocks), n_blocks, arguments)
    room[0] = 0  # the last use of the scratch: it must live until here


# ---- many rows: packed panels and register tiles --------------------------------------------------------------------


@body
def _pack(source, n_rows, readable, size, first, last, per_unit, target, width, stride):
    """target[(unit - first) * stride + row] = 32-bit unit of row-major rows, for units first to last and `width` rows.

    Rows from n_rows on become zero. Where 16 rows are readable, whole blocks are transposed in registers;
    they write up to 16 - width units too many, which the next block overwrites (the last one needs the room).
    """
    unit = first
    if readable >= LANES:
        while unit + LANES <= min(last, size // per_unit):
            block = shifted(target, (unit - first) * stride)
            _tile.transpose_block(shifted(source, unit * per_unit), size, block, stride)
            unit += LANES
    while unit < last:
        valid = min(per_unit, size - unit * per_unit)
        for row in range(width):
            place = (unit - first) * stride + row
            index = row * size + unit * per_unit
            _tile.copy_unit(source, index, valid if row < n_rows else 0, target, place)
        unit += 1


@body
def _half_panel(table, panel, half, gated):
    """(matrix, first row, rows) behind 16 of the 32 columns of a panel; 0 rows behind the last block."""
    if gated:
        return half, panel * LANES, min(table[half, SIZE] - panel * LANES, LANES)
    index = 2 * panel + half
    if index >= count_blocks(table, False):
        return 0, 0, 0
    matrix, first = _block_of(table, index)
    return matrix, first, min(table[matrix, SIZE] - first, LANES)


@body
def _finish_tile(sums, first_row, n_rows, table, panel, gated, code, residuals, out, width, item_size):
    """Epilogue of the rows of one tile; with `gated` the halves of a panel are gate and up."""
    for half in range(1 if gated else 0, 2):
        matrix, first, n_columns = _half_panel(table, panel, half, gated)
        bias = _offset(table[matrix, BIAS], first, item_size)
        gate_bias = _offset(table[0, BIAS], first, item_size)
        column = first if gated else table[matrix, COLUMN] + first
        if n_columns > 0:
            for row in range(n_rows):
                here = row * TILE_COLUMNS
                _finish(
                    load(sums, here + half * LANES),
                    load(sums, here),
                    n_columns,
                    bias,
                    gate_bias,
                    code,
                    gated,
                    residuals,
                    out,
                    (first_row + row) * width + column,
                )


@body
def panel_group(
    packed,
    n_rows,
    size,
    table,
    start,
    end,
    gated,
    code,
    residuals,
    out,
    width,
    item_size,
    room,
    sums,
    tile_rows,
):
    """Panels start to end (at most PANELS; 32 output columns each, 16 of both matrices with `gated`) of all rows.

    packed: x as `linear_tiles` packs it; room: units for the packed panels; sums: float32 [PANELS, tiles, tile_rows, 32].
    A tile of x is multiplied with every panel of the group while it is in the L1 cache.
    """
    per_unit = 4 // item_size
    n_units = (size + per_unit - 1) // per_unit
    n_tiles = (n_rows + tile_rows - 1) // tile_rows
    tile_sums = tile_rows * TILE_COLUMNS
    for first in range(0, n_units, PANEL_UNITS):
        last = min(first + PANEL_UNITS, n_units)
        for panel in range(start, end):
            for half in range(2):
                matrix, row, n_columns = _half_panel(table, panel, half, gated)
                source = shifted(address_as(table[matrix, WEIGHT], out), row * size)
                target = shifted(room, (panel - start) * PANEL_UNITS * TILE_COLUMNS + half * LANES)
                _pack(source, n_columns, n_columns, size, first, last, per_unit, target, LANES, TILE_COLUMNS)
        for tile in range(n_tiles):
            x = shifted(packed, tile * (n_units * tile_rows + LANES) + first * tile_rows)
            for panel in range(start, end):
                w = shifted(room, (panel - start) * PANEL_UNITS * TILE_COLUMNS)
                here = shifted(sums, ((panel - start) * n_tiles + tile) * tile_sums)
                if tile_rows == 14:
                    _tile.outer_tile(x, w, last - first, here, 14, 2, first > 0)
                else:
                    _tile.outer_tile(x, w, last - first, here, 8, 2, first > 0)
                if last == n_units:
                    row = tile * tile_rows
                    rows = min(tile_rows, n_rows - row)
                    _finish_tile(here, row, rows, table, panel, gated, code, residuals, out, width, item_size)


@body
def _pack_tile(tile, x, n_rows, size, per_unit, packed, tile_rows):
    """One tile of x into its place in `packed`."""
    n_units = (size + per_unit - 1) // per_unit
    row = tile * tile_rows
    target = shifted(packed, tile * (n_units * tile_rows + LANES))
    rows = min(tile_rows, n_rows - row)
    _pack(
        shifted(x, row * size), rows, n_rows - row, size, 0, n_units, per_unit, target, tile_rows, tile_rows
    )


@body
def _panels_chunk(
    chunk, packed, n_rows, size, table, gated, code, residuals, out, width, item_size, panels, sums, tile_rows
):
    """The chunk-th share of all panels, with scratch of its own."""
    n_panels = (count_blocks(table, gated) + (0 if gated else 1)) // (1 if gated else 2)
    n_chunks = panels.shape[0]
    room = as_units(shifted(pointer(panels), chunk * panels.shape[1]), out)
    here = shifted(pointer(sums), chunk * sums.shape[1])
    end = (chunk + 1) * n_panels // n_chunks
    for start in range(chunk * n_panels // n_chunks, end, PANELS):
        panel_group(
            packed,
            n_rows,
            size,
            table,
            start,
            min(start + PANELS, end),
            gated,
            code,
            residuals,
            out,
            width,
            item_size,
            room,
            here,
            tile_rows,
        )


@launch
def linear_tiles(x, table, gated, code, residuals, out, packed, panels, sums, tile_rows):
    """out = epilogue(x W^T + b) for many rows; arguments as in `linear_rows`, and scratch (see `tile_scratch`).

    tile_rows is 14 or 8: rows of one register tile.
    """
    n_rows, size = x.shape
    n_tiles = (n_rows + tile_rows - 1) // tile_rows
    units = as_units(pointer(packed), pointer(x))
    packing = (pointer(x), n_rows, size, 4 // x.itemsize, units, tile_rows)
    parallel_for(_pack_tile, min(usable_threads(), n_tiles), n_tiles, packing)
    n_chunks = panels.shape[0]
    arguments = (units, n_rows, size, table, gated, code, residuals, pointer(out), out.shape[1], out.itemsize)
    scratch = (panels, sums, tile_rows)
    parallel_for(_panels_chunk, min(usable_threads(), n_chunks), n_chunks, arguments + scratch)


def tile_scratch(n_rows: int, size: int, item_size: int, n_chunks: int) -> tuple[tuple, tuple, tuple, int]:
    """Shapes of the float32 arrays `packed`, `panels` and `sums` of `linear_tiles`, and its tile_rows.

    n_chunks: threads among which the panels are split.
    """
    waste = {rows: -(-n_rows // rows) * rows for rows in (8, 14)}
    tile_rows = 8 if waste[8] < 0.92 * waste[14] else 14
    n_units = -(-size * item_size // 4)
    n_tiles = -(-n_rows // tile_rows)
    packed = (n_tiles * (n_units * tile_rows + LANES),)
    sums = (n_chunks, PANELS * n_tiles * tile_rows * TILE_COLUMNS)
    return packed, (n_chunks, PANELS * PANEL_UNITS * TILE_COLUMNS), sums, tile_rows
