"""Linear layers of many rows: packed panels of weights and register tiles."""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.instruction import Instruction, read_fields
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, next_share, parallel_for, usable_threads
from hfopt.kernels.linear.blocks import (
    Linear,
    LinearColumns,
    columns_of,
    finish,
    gather_residuals,
    weight_rows,
)
from hfopt.kernels.linear.matrix_tiles import multiply_panels, panels_scratch
from hfopt.kernels.linear.panels import PANELS, count_panels, half_panel, split_tiles
from hfopt.kernels.linear.rows import ROW_LIMIT, multiply_rows, rows_scratch
from hfopt.kernels.simd.constants import LINE
from hfopt.kernels.simd.matrix import has_tiles
from hfopt.kernels.simd.memory import load
from hfopt.kernels.simd.pointer import (
    address_as,
    address_of,
    as_units,
    floats_at,
    integers_at,
    pointer,
    shifted,
)
from hfopt.kernels.simd.tile import copy_unit, outer_tile, stack_addresses, transpose_block, units_ratio
from hfopt.kernels.simd.types import LANES

# 14 rows x 2 vectors of sums, 2 of weights and one of x fill the 32 vector registers of AVX-512
TILE_COLUMNS = 2 * LANES
# Packed weights at a time: 4 panels x 512 units x 32 columns x 4 bytes stay in an L2 cache (256 KB), and the part of x that
# they meet (14 rows x 512 units, 28 KB) in an L1 cache; x is read once for every 128 columns.
PANEL_UNITS = 512


class _Tiles(NamedTuple):
    """x as `_pack_tile` packs it."""

    packed: Any
    n_units: Any  # of a row
    n_rows: Any  # of x
    tile_rows: Any  # of one register tile


class _Scratch(NamedTuple):
    """What each worker has of its own, in pointers to float32 of the first one's."""

    panels: Any
    panel_floats: Any  # of a worker
    sums: Any
    sum_floats: Any
    n_workers: Any


class _Group(NamedTuple):
    """Panels and tiles that are multiplied while the panels stay in the L2 cache."""

    panel: Any
    last_panel: Any
    tile: Any
    last_tile: Any


@body
def _pack(source, n_rows, readable, size, first, last, target, width, stride):
    """target[(unit - first) * stride + row] = 32-bit unit of row-major rows, for units first to last and `width` rows.

    Rows from n_rows on become zero. Where 16 rows are readable, whole blocks are transposed in registers;
    they write up to 16 - width units too many, which the next block overwrites (the last one needs the room).
    """
    per_unit = units_ratio(source)
    unit = first
    if readable >= LANES:
        while unit + LANES <= min(last, size // per_unit):
            block = shifted(target, (unit - first) * stride)
            transpose_block(shifted(source, unit * per_unit), size, block, stride)
            unit += LANES
    while unit < last:
        valid = min(per_unit, size - unit * per_unit)
        for row in range(width):
            place = (unit - first) * stride + row
            index = row * size + unit * per_unit
            copy_unit(source, index, valid if row < n_rows else 0, target, place)
        unit += 1


@body
def _finish_tile(layer, panel, sums, first_row, n_rows):
    """Epilogue of the rows of one tile; with `gated` the halves of a panel are gate and up."""
    for half in range(1 if layer.gated else 0, 2):
        matrix, first, n_columns = half_panel(layer, panel, half)
        columns = columns_of(layer, matrix, first)
        if n_columns > 0:
            for row in range(n_rows):
                here = row * TILE_COLUMNS
                value, gate = load(sums, here + half * LANES), load(sums, here)
                finish(layer, columns, first_row + row, value, gate)


@body
def _multiply_group(tiles, layer, group, room, sums):
    """All panels of a group (at most PANELS) for all its tiles of rows.

    A tile of x is multiplied with every panel of the group while it is in the L1 cache.
    """
    n_units, tile_rows = tiles.n_units, tiles.tile_rows
    n_tiles = group.last_tile - group.tile
    tile_sums = tile_rows * TILE_COLUMNS
    for first in range(0, n_units, PANEL_UNITS):
        last = min(first + PANEL_UNITS, n_units)
        for panel in range(group.panel, group.last_panel):
            for half in range(2):
                matrix, row, n_columns = half_panel(layer, panel, half)
                source = weight_rows(layer, matrix, row)
                target = shifted(room, (panel - group.panel) * PANEL_UNITS * TILE_COLUMNS + half * LANES)
                _pack(source, n_columns, n_columns, layer.size, first, last, target, LANES, TILE_COLUMNS)
        for index in range(group.tile, group.last_tile):
            x = shifted(tiles.packed, index * (n_units * tile_rows + LANES) + first * tile_rows)
            for panel in range(group.panel, group.last_panel):
                w = shifted(room, (panel - group.panel) * PANEL_UNITS * TILE_COLUMNS)
                here = shifted(sums, ((panel - group.panel) * n_tiles + index - group.tile) * tile_sums)
                if tile_rows == 14:
                    outer_tile(x, w, last - first, here, 14, 2, first > 0)
                elif tile_rows == 13:
                    outer_tile(x, w, last - first, here, 13, 2, first > 0)
                else:
                    outer_tile(x, w, last - first, here, 8, 2, first > 0)
                if last == n_units:
                    row = index * tile_rows
                    _finish_tile(layer, panel, here, row, min(tile_rows, tiles.n_rows - row))


@body
def _pack_tile(tile, x, size, tiles):
    """One tile of x into its place among the packed ones."""
    n_units, tile_rows = tiles.n_units, tiles.tile_rows
    row = tile * tile_rows
    target = shifted(tiles.packed, tile * (n_units * tile_rows + LANES))
    left = tiles.n_rows - row
    source = shifted(x, row * size)
    _pack(source, min(tile_rows, left), left, size, 0, n_units, target, tile_rows, tile_rows)


@body
def _worker(worker, counter, tiles, layer, scratch):
    """Shares of all panels of all parts of the rows, as long as there are any, with scratch of its own."""
    n_panels = count_panels(layer)
    n_tiles = (tiles.n_rows + tiles.tile_rows - 1) // tiles.tile_rows
    n_workers = scratch.n_workers
    n_together, n_parts = split_tiles(n_tiles, n_panels, n_workers)
    n_groups = (n_panels + n_together - 1) // n_together
    room = as_units(shifted(scratch.panels, worker * scratch.panel_floats), layer.out)
    sums = shifted(scratch.sums, worker * scratch.sum_floats)
    while True:
        start, end = next_share(counter, n_groups * n_parts, n_workers)
        if start == end:
            break
        for index in range(start, end):
            part = index // n_groups
            panel = (index - part * n_groups) * n_together
            first_tile, last_tile = part * n_tiles // n_parts, (part + 1) * n_tiles // n_parts
            group = _Group(panel, min(panel + n_together, n_panels), first_tile, last_tile)
            _multiply_group(tiles, layer, group, room, sums)


@body
def _tile_rows(n_rows):
    """Rows of a register tile, so that few only fill up the last one; a small tile keeps the multiply-adds less busy."""
    best, least = 14, (n_rows + 13) // 14 * 14 * 100
    cost = (n_rows + 12) // 13 * 13 * 100
    if cost < least:
        best, least = 13, cost
    return 8 if (n_rows + 7) // 8 * 8 * 108 < least else best


@body
def _sizes(n_rows, n_units):
    """(rows of a tile, tiles, float32 of packed x, of the panels of a worker, of its sums); the last three in whole cache
    lines.
    """
    tile_rows = _tile_rows(n_rows)
    n_tiles = (n_rows + tile_rows - 1) // tile_rows
    packed = (n_tiles * (n_units * tile_rows + LANES) + LANES - 1) // LANES * LANES
    sums = PANELS * n_tiles * tile_rows * TILE_COLUMNS
    return tile_rows, n_tiles, packed, PANELS * PANEL_UNITS * TILE_COLUMNS, sums


@body
def _units(x, size):
    """32-bit units of a row."""
    per_unit = units_ratio(x)
    return (size + per_unit - 1) // per_unit


@body
def tiles_scratch(x, n_rows, size, threads):
    """Bytes of scratch that `multiply_tiles` needs on so many threads."""
    if has_tiles(x):
        return panels_scratch(n_rows, size, threads)
    _, _, packed, panels, sums = _sizes(n_rows, _units(x, size))
    return LINE + 4 * (packed + threads * (panels + sums))


@body
def multiply_tiles(x, n_rows, layer, scratch, threads):
    """layer.out = epilogue(x W^T + b) for many rows at x; scratch: `tiles_scratch` bytes, at a multiple of 64."""
    if has_tiles(x):
        multiply_panels(x, n_rows, layer, scratch, threads)
        return
    size, n_workers = layer.size, min(usable_threads(), threads)
    n_units = _units(x, size)
    tile_rows, n_tiles, packed, panel_floats, sum_floats = _sizes(n_rows, n_units)
    counter, first = integers_at(scratch), floats_at(scratch + LINE)
    panels = shifted(first, packed)
    sums = shifted(panels, n_workers * panel_floats)
    tiles = _Tiles(as_units(first, x), n_units, n_rows, tile_rows)
    parallel_for(_pack_tile, min(n_workers, n_tiles), n_tiles, (x, size, tiles))
    counter[0] = 0
    own = _Scratch(panels, panel_floats, sums, sum_floats, n_workers)
    parallel_for(_worker, n_workers, n_workers, (counter, tiles, layer, own))


@launch
def linear_tiles(like, x, n_rows, size, table, gated, code, residuals, out, width):
    """`linear_rows` for any number of rows, faster than it for more than 64."""
    x, out = address_as(x, pointer(like)), address_as(out, pointer(like))
    addresses, n_residuals = pointer(residuals), residuals.shape[0]
    layer = Linear(size, pointer(table), table.shape[0], gated, code, addresses, n_residuals, out, width)
    threads = usable_threads()
    room = np.empty(tiles_scratch(x, n_rows, size, threads) // 8 + 9, np.int64)
    multiply_tiles(x, n_rows, layer, (address_of(pointer(room)) + LINE - 1) // LINE * LINE, threads)
    room[0] = 0  # the last use of the scratch: it must live until here


# ---- the instruction --------------------------------------------------------------------------------------------------


@body
def _run(like, held, operands, step):
    own, n = read_fields(operands.own, LinearColumns), operands.n
    residuals = stack_addresses(2)
    n_residuals = gather_residuals(own, step, residuals)
    layer = Linear(
        operands.size,
        integers_at(own.matrices),
        own.n_matrices,
        own.gated != 0,
        own.code,
        residuals,
        n_residuals,
        address_as(operands.out, like),
        own.width,
    )
    x = address_as(operands.x, like)
    if n <= ROW_LIMIT:
        multiply_rows(x, n, layer, floats_at(step.scratch))
    else:
        multiply_tiles(x, n, layer, step.scratch, step.threads)


@body
def _scratch_bytes(like, own, format, sizes):
    if sizes.n <= ROW_LIMIT:
        return 4 * rows_scratch(like, sizes.n, sizes.size)
    return tiles_scratch(like, sizes.n, sizes.size, sizes.threads)


LINEAR = Instruction("linear", LinearColumns._fields, _run, _scratch_bytes)
