"""Linear layers of many rows: packed panels of weights and register tiles.

A *panel* is 32 output columns, two blocks of `linear`: two that follow each other, or with `gated` the same 16 columns
of both matrices.
"""

from typing import Any, NamedTuple

import numpy as np

from . import _tile
from ._jit import launch
from ._parallel import body, next_share, parallel_for, usable_threads
from ._pointer import as_units, load, pointer, shifted
from ._simd import LANES
from .linear import SIZE, Linear, columns_of, count_blocks, field_of, find_block, finish, weight_rows

# 14 rows x 2 vectors of sums, 2 of weights and one of x fill the 32 vector registers of AVX-512
TILE_COLUMNS = 2 * LANES
# Packed weights at a time: 4 panels x 512 units x 32 columns x 4 bytes stay in an L2 cache (256 KB), and the part of x that
# they meet (14 rows x 512 units, 28 KB) in an L1 cache; x is read once for every 128 columns.
PANELS = 4
PANEL_UNITS = 512


class _Tiles(NamedTuple):
    """x as `_pack_tile` packs it."""

    packed: Any
    n_units: Any  # of a row
    n_rows: Any  # of x
    tile_rows: Any  # of one register tile


class _Scratch(NamedTuple):
    """What each worker has of its own."""

    panels: Any  # units for the packed panels [workers, PANELS * PANEL_UNITS * 32]
    sums: Any  # float32 [workers, PANELS * tiles * tile_rows * 32]


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
    per_unit = _tile.units_ratio(source)
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
def _half_panel(layer, panel, half):
    """(matrix, first row, rows) behind 16 of the 32 columns of a panel; 0 rows behind the last block."""
    if layer.gated:
        matrix, first = half, panel * LANES
    else:
        index = 2 * panel + half
        if index >= count_blocks(layer):
            return 0, 0, 0
        matrix, first = find_block(layer, index)
    return matrix, first, min(field_of(layer, matrix, SIZE) - first, LANES)


@body
def _finish_tile(layer, panel, sums, first_row, n_rows):
    """Epilogue of the rows of one tile; with `gated` the halves of a panel are gate and up."""
    for half in range(1 if layer.gated else 0, 2):
        matrix, first, n_columns = _half_panel(layer, panel, half)
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
                matrix, row, n_columns = _half_panel(layer, panel, half)
                source = weight_rows(layer, matrix, row)
                target = shifted(room, (panel - group.panel) * PANEL_UNITS * TILE_COLUMNS + half * LANES)
                _pack(source, n_columns, n_columns, layer.size, first, last, target, LANES, TILE_COLUMNS)
        for tile in range(group.tile, group.last_tile):
            x = shifted(tiles.packed, tile * (n_units * tile_rows + LANES) + first * tile_rows)
            for panel in range(group.panel, group.last_panel):
                w = shifted(room, (panel - group.panel) * PANEL_UNITS * TILE_COLUMNS)
                here = shifted(sums, ((panel - group.panel) * n_tiles + tile - group.tile) * tile_sums)
                if tile_rows == 14:
                    _tile.outer_tile(x, w, last - first, here, 14, 2, first > 0)
                elif tile_rows == 13:
                    _tile.outer_tile(x, w, last - first, here, 13, 2, first > 0)
                else:
                    _tile.outer_tile(x, w, last - first, here, 8, 2, first > 0)
                if last == n_units:
                    row = tile * tile_rows
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
def split_tiles(n_tiles, n_panels, n_threads):
    """(panels of a group, parts that the tiles of x are split into) so that the last groups leave no thread idle for long.

    Small groups read x more often, and weights are packed anew for each part.
    """
    group = max(1, min(PANELS, n_panels // (8 * n_threads)))
    return group, min(n_tiles, max(1, 4 * n_threads // n_panels))


@body
def _worker(worker, counter, tiles, layer, scratch):
    """Shares of all panels of all parts of the rows, as long as there are any, with scratch of its own."""
    n_panels = (count_blocks(layer) + (0 if layer.gated else 1)) // (1 if layer.gated else 2)
    n_tiles = (tiles.n_rows + tiles.tile_rows - 1) // tiles.tile_rows
    n_workers = scratch.panels.shape[0]
    n_together, n_parts = split_tiles(n_tiles, n_panels, n_workers)
    n_groups = (n_panels + n_together - 1) // n_together
    room = as_units(shifted(pointer(scratch.panels), worker * scratch.panels.shape[1]), layer.out)
    sums = shifted(pointer(scratch.sums), worker * scratch.sums.shape[1])
    while True:
        start, end = next_share(pointer(counter), n_groups * n_parts, n_workers)
        if start == end:
            break
        for index in range(start, end):
            part = index // n_groups
            panel = (index - part * n_groups) * n_together
            first_tile, last_tile = part * n_tiles // n_parts, (part + 1) * n_tiles // n_parts
            group = _Group(panel, min(panel + n_together, n_panels), first_tile, last_tile)
            _multiply_group(tiles, layer, group, room, sums)


@launch
def linear_tiles(x, table, gated, code, residuals, out, packed, panels, sums, tile_rows):
    """out = epilogue(x W^T + b) for many rows, x and out being arrays; other arguments as in `linear_rows`, and scratch.

    tile_rows: rows of one register tile; see `tile_scratch`.
    """
    n_rows, size = x.shape
    n_tiles = (n_rows + tile_rows - 1) // tile_rows
    per_unit = _tile.units_ratio(pointer(x))
    n_units = (size + per_unit - 1) // per_unit
    tiles = _Tiles(as_units(pointer(packed), pointer(x)), n_units, n_rows, tile_rows)
    parallel_for(_pack_tile, min(usable_threads(), n_tiles), n_tiles, (pointer(x), size, tiles))
    n_workers = panels.shape[0]
    counter = np.zeros(1, np.int64)
    addresses, n_residuals = pointer(residuals), residuals.shape[0]
    target, width = pointer(out), out.shape[1]
    layer = Linear(size, pointer(table), table.shape[0], gated, code, addresses, n_residuals, target, width)
    workers = min(usable_threads(), n_workers)
    parallel_for(_worker, workers, n_workers, (counter, tiles, layer, _Scratch(panels, sums)))


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
