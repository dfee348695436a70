"""Linear layers: y = epilogue(x W^T + b) over one or several weight matrices in one launch.

The matrices stay where the model has them, `[out, in]` row-major; a launch gets their addresses in a table of int64,
one row a matrix: (weight address, bias address or 0, out features, first output column).

A *block* is 16 output columns of one matrix, with `gated` the same 16 columns of both matrices. Each output value is
summed by one thread in a fixed order, so the bits do not depend on the number of threads.
"""

import numpy as np

from . import _tile
from ._jit import launch
from ._parallel import body, next_share, parallel_for, threads_for, usable_threads
from ._simd import LANES, address_as, as_units, load, load_part, pointer, shifted, store, store_part
from .activation import activate

WEIGHT, BIAS, SIZE, COLUMN = range(4)

ROW_LIMIT = 32  # most rows of `linear_rows`; a literal below, in the size of its stack
# 14 rows x 2 vectors of sums, 2 of weights and one of x fill the 32 vector registers of AVX-512
TILE_COLUMNS = 2 * LANES
# Packed weights at a time: 4 panels x 512 units x 32 columns x 4 bytes stay in an L2 cache (256 KB), and the part of x that
# they meet (14 rows x 512 units, 28 KB) in an L1 cache; x is read once for every 128 columns.
PANELS = 4
PANEL_UNITS = 512
_PARALLEL_SIZE = 1 << 16  # elements to pack, or multiply-adds; below, more threads cost more than they save


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
def _pack_chunks(row, x, n_rows, size, target, n_packed):
    """One row of x among n_packed, chunk by chunk (16 units of every row, then the next 16); see `_tile.dot_tile`.

    Rows from n_rows on, and what is behind the end of a row, become zero.
    """
    per_unit = _tile.units_ratio(x)
    n_units = (size + per_unit - 1) // per_unit
    source = shifted(x, row * size)
    whole = size // (per_unit * LANES) if row < n_rows else 0
    for chunk in range(whole):
        _tile.copy_chunk(source, chunk * LANES * per_unit, target, (chunk * n_packed + row) * LANES)
    for unit in range(whole * LANES, (n_units + LANES - 1) // LANES * LANES):
        valid = min(per_unit, size - unit * per_unit) if row < n_rows else 0
        place = (unit // LANES * n_packed + row) * LANES + unit % LANES
        _tile.copy_unit(source, unit * per_unit, valid, target, place)


@body
def _packed_rows(n_rows):
    """Rows of packed x: tiles have 1, 2 or 4 rows, and up to 8 rows cost what memory costs in any case."""
    return n_rows if n_rows <= 2 else (n_rows + 3) // 4 * 4


@body
def _steps(n_rows):
    """(chunks of all columns of a block that are worked on before the next ones; chunks that are asked for in advance).

    The part of x in use stays in the L1 cache; the distances were measured.
    """
    if n_rows <= 2:
        return 64, 64
    return (32, 64) if n_rows == 4 else (16, 32)


@body
def _dot_columns(x, n_rows, w, size, chunks, tail, ahead, sums, more):
    """Products of all packed rows of x with eight rows of w for 1 or 2 rows of x, with four for more."""
    x_step = n_rows * LANES
    if n_rows == 1:
        _tile.dot_tile(x, x_step, w, size, chunks, tail, ahead, sums, more, 1, 8, 8)
    elif n_rows == 2:
        _tile.dot_tile(x, x_step, w, size, chunks, tail, ahead, sums, more, 2, 8, 8)
    elif n_rows == 4:
        _tile.dot_tile(x, x_step, w, size, chunks, tail, ahead, sums, more, 4, 4, 4)
    else:
        # the requests are spread over the tiles, since a core can only wait for so many lines at a time
        asked = 0
        for row in range(0, n_rows, 4):
            x_here, out = shifted(x, row * LANES), shifted(sums, row * LANES * LANES)
            there = shifted(ahead, asked % 4 * size)
            if n_rows == 8 or (n_rows == 12 and row == 0):
                _tile.dot_tile(x_here, x_step, w, size, chunks, tail, there, out, more, 4, 4, 2)
                asked += 2
            else:
                _tile.dot_tile(x_here, x_step, w, size, chunks, tail, there, out, more, 4, 4, 1)
                asked += 1


@body
def _dot_block(x, n_rows, size, w, n_columns, following, sums):
    """sums[i, j, :] = partial sums of x[i] . w[j] for all packed rows and up to 16 columns.

    Several rows of w pass at a time, and what comes next is asked for early, into the L2 cache: the same columns further
    on in these rows, and in the end the first ones of the block at `following`.
    """
    width = LANES * _tile.units_ratio(w)
    whole = size // width
    step, distance = _steps(n_rows)
    together = 8 if n_rows <= 2 else 4
    first = 0
    while True:
        last = min(first + step, whole)
        tail = size - whole * width if last == whole else 0
        x_here = shifted(x, first * n_rows * LANES)
        column = 0
        while column < n_columns:
            w_here, out = shifted(w, column * size + first * width), shifted(sums, column * LANES)
            if column + together <= n_columns:
                if first + distance < whole:
                    ahead = shifted(w_here, distance * width)
                else:
                    passed = max(first + distance - (whole + step - 1) // step * step, 0)
                    ahead = shifted(following, column * size + passed * width)
                _dot_columns(x_here, n_rows, w_here, size, last - first, tail, ahead, out, first > 0)
                column += together
            else:
                for row in range(n_rows):
                    x_row, to = shifted(x_here, row * LANES), shifted(out, row * LANES * LANES)
                    chunks, more = last - first, first > 0
                    _tile.dot_tile(
                        x_row, n_rows * LANES, w_here, size, chunks, tail, w_here, to, more, 1, 1, 0
                    )
                column += 1
        first = last
        if first == whole:
            break


@body
def rows_block(index, x, n_packed, n_rows, size, table, gated, code, residuals, out, width, item_size):
    """One block of up to 32 rows, straight from the row-major weights; x packed by `_pack_chunks`."""
    sums = _tile.stack_floats(32 * 16 * 16)
    gate = _tile.stack_floats(32 * 16 * 16)
    if gated:
        matrix, first = 1, index * LANES
        n_columns = min(table[0, SIZE] - first, LANES)
        w = shifted(address_as(table[0, WEIGHT], out), first * size)
        up = shifted(address_as(table[1, WEIGHT], out), first * size)
        _dot_block(x, n_packed, size, w, n_columns, up, gate)
        following = shifted(w, LANES * size)
    else:
        matrix, first = _block_of(table, index)
        n_columns = min(table[matrix, SIZE] - first, LANES)
        following = shifted(address_as(table[matrix, WEIGHT], out), (first + LANES) * size)
    w = shifted(address_as(table[matrix, WEIGHT], out), first * size)
    _dot_block(x, n_packed, size, w, n_columns, following, sums)
    bias = _offset(table[matrix, BIAS], first, item_size)
    gate_bias = _offset(table[0, BIAS], first, item_size)
    column = first if gated else table[matrix, COLUMN] + first
    for row in range(n_rows):
        value = _tile.sum_rows(shifted(sums, row * LANES * LANES))
        other = _tile.sum_rows(shifted(gate, row * LANES * LANES)) if gated else value
        place = row * width + column
        _finish(value, other, n_columns, bias, gate_bias, code, gated, residuals, out, place)


@launch
def linear_rows(like, x, n_rows, size, table, gated, code, residuals, out, width):
    """out = epilogue(x W^T + b) for 1 to 32 rows.

    Addresses of x [n_rows, size] and out [n_rows, width] of the type of `like`, float32 or bfloat16 bits; table int64
    [matrices, 4]; residuals int64 addresses of arrays like out; code from `activation`.
    """
    x, out = address_as(x, pointer(like)), address_as(out, pointer(like))
    n_packed = _packed_rows(n_rows)
    n_units = (size * like.itemsize + 3) // 4
    room = np.empty((n_units + LANES) * n_packed + LANES, np.float32)
    packed = as_units(shifted(pointer(room), _tile.to_cache_line(pointer(room))), x)
    packing = (x, n_rows, size, packed, n_packed)
    parallel_for(_pack_chunks, threads_for(n_packed, n_rows * size, _PARALLEL_SIZE), n_packed, packing)
    n_blocks = count_blocks(table, gated)
    arguments = (
        packed,
        n_packed,
        n_rows,
        size,
        table,
        gated,
        code,
        residuals,
        out,
        width,
        like.itemsize,
    )
    threads = threads_for(n_blocks, n_rows * size * n_blocks * LANES, _PARALLEL_SIZE)
    parallel_for(rows_block, threads, n_blocks, arguments)
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
    first_tile,
    last_tile,
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
    """Panels start to end (at most PANELS; 32 output columns each, 16 of both matrices with `gated`) of some tiles of rows.

    packed: x as `linear_tiles` packs it; room: units for the packed panels; sums: float32 [PANELS, tiles, tile_rows, 32].
    A tile of x is multiplied with every panel of the group while it is in the L1 cache.
    """
    per_unit = 4 // item_size
    n_units = (size + per_unit - 1) // per_unit
    n_tiles = last_tile - first_tile
    tile_sums = tile_rows * TILE_COLUMNS
    for first in range(0, n_units, PANEL_UNITS):
        last = min(first + PANEL_UNITS, n_units)
        for panel in range(start, end):
            for half in range(2):
                matrix, row, n_columns = _half_panel(table, panel, half, gated)
                source = shifted(address_as(table[matrix, WEIGHT], out), row * size)
                target = shifted(room, (panel - start) * PANEL_UNITS * TILE_COLUMNS + half * LANES)
                _pack(source, n_columns, n_columns, size, first, last, per_unit, target, LANES, TILE_COLUMNS)
        for tile in range(first_tile, last_tile):
            x = shifted(packed, tile * (n_units * tile_rows + LANES) + first * tile_rows)
            for panel in range(start, end):
                w = shifted(room, (panel - start) * PANEL_UNITS * TILE_COLUMNS)
                here = shifted(sums, ((panel - start) * n_tiles + tile - first_tile) * tile_sums)
                if tile_rows == 14:
                    _tile.outer_tile(x, w, last - first, here, 14, 2, first > 0)
                elif tile_rows == 13:
                    _tile.outer_tile(x, w, last - first, here, 13, 2, first > 0)
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
def split_tiles(n_tiles, n_panels, n_threads):
    """(panels of a group, parts that the tiles of x are split into) so that the last groups leave no thread idle for long.

    Small groups read x more often, and weights are packed anew for each part.
    """
    group = max(1, min(PANELS, n_panels // (8 * n_threads)))
    return group, min(n_tiles, max(1, 4 * n_threads // n_panels))


@body
def _worker(
    worker,
    counter,
    packed,
    n_rows,
    size,
    table,
    gated,
    code,
    residuals,
    out,
    width,
    item_size,
    panels,
    sums,
    tile_rows,
):
    """Shares of all panels of all parts of the rows, as long as there are any, with scratch of its own."""
    n_panels = (count_blocks(table, gated) + (0 if gated else 1)) // (1 if gated else 2)
    n_tiles = (n_rows + tile_rows - 1) // tile_rows
    n_workers = panels.shape[0]
    group, n_parts = split_tiles(n_tiles, n_panels, n_workers)
    n_groups = (n_panels + group - 1) // group
    room = as_units(shifted(pointer(panels), worker * panels.shape[1]), out)
    here = shifted(pointer(sums), worker * sums.shape[1])
    while True:
        start, end = next_share(pointer(counter), n_groups * n_parts, n_workers)
        if start == end:
            break
        for index in range(start, end):
            part = index // n_groups
            panel = (index - part * n_groups) * group
            first_tile, last_tile = part * n_tiles // n_parts, (part + 1) * n_tiles // n_parts
            panel_group(
                packed,
                n_rows,
                size,
                table,
                panel,
                min(panel + group, n_panels),
                first_tile,
                last_tile,
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
    """out = epilogue(x W^T + b) for many rows, x and out being arrays; other arguments as in `linear_rows`, and scratch.

    tile_rows: rows of one register tile; see `tile_scratch`.
    """
    n_rows, size = x.shape
    n_tiles = (n_rows + tile_rows - 1) // tile_rows
    units = as_units(pointer(packed), pointer(x))
    packing = (pointer(x), n_rows, size, 4 // x.itemsize, units, tile_rows)
    parallel_for(_pack_tile, min(usable_threads(), n_tiles), n_tiles, packing)
    n_workers = panels.shape[0]
    counter = np.zeros(1, np.int64)
    arguments = (counter, units, n_rows, size, table, gated, code, residuals)
    target = (pointer(out), out.shape[1], out.itemsize, panels, sums, tile_rows)
    parallel_for(_worker, min(usable_threads(), n_workers), n_workers, arguments + target)


def tile_scratch(n_rows: int, size: int, item_size: int, n_workers: int) -> tuple[tuple, tuple, tuple, int]:
    """Shapes of the float32 arrays `packed`, `panels` and `sums` of `linear_tiles`, and its tile_rows.

    n_workers: threads among which the panels are dealt out.
    """

    def cost(tile_rows: int) -> float:
        """Of the rows with those that fill the last tile; a small tile keeps the multiply-adds less busy."""
        return -(-n_rows // tile_rows) * tile_rows * (1.08 if tile_rows == 8 else 1.0)

    tile_rows = min((14, 13, 8), key=cost)
    n_units = -(-size * item_size // 4)
    n_tiles = -(-n_rows // tile_rows)
    packed = (n_tiles * (n_units * tile_rows + LANES),)
    sums = (n_workers, PANELS * n_tiles * tile_rows * TILE_COLUMNS)
    return packed, (n_workers, PANELS * PANEL_UNITS * TILE_COLUMNS), sums, tile_rows
