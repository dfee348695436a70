"""Linear layers of few rows, whose weights are read where they are; `linear.tiles` has those of many rows."""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.linear.blocks import Linear, columns_of, count_blocks, find_block, finish, weight_rows
from hfopt.kernels.linear.matrix_rows import multiply_in_tiles, packed_bytes
from hfopt.kernels.simd import tile
from hfopt.kernels.simd.dot_tile import Chain, dot_tile
from hfopt.kernels.simd.matrix import has_tiles
from hfopt.kernels.simd.pointer import address_as, address_of, as_units, item_bytes, pointer, shifted
from hfopt.kernels.simd.types import LANES

ROW_LIMIT = 64  # most rows of `linear_rows`; a literal below, in the size of its stack
_SHORT_ROW = 48  # lines of 64 bytes, 3 KB
_CHAIN_LINES = 64  # lines of a row of w whose products are one chain of additions
_PARALLEL_SIZE = 1 << 16  # elements to pack, or multiply-adds; below, more threads cost more than they save


class _Rows(NamedTuple):
    """x as `_pack_chunks` packs it."""

    packed: Any
    n_packed: Any  # rows there
    n_rows: Any  # of x


@body
def _pack_chunks(row, x, n_rows, size, target, n_packed):
    """One row of x among n_packed, chunk by chunk (16 units of every row, then the next 16); see `dot_tile`.

    Rows from n_rows on, and what is behind the end of a row, become zero.
    """
    per_unit = tile.units_ratio(x)
    n_units = (size + per_unit - 1) // per_unit
    source = shifted(x, row * size)
    whole = size // (per_unit * LANES) if row < n_rows else 0
    for chunk in range(whole):
        tile.copy_chunk(source, chunk * LANES * per_unit, target, (chunk * n_packed + row) * LANES)
    for unit in range(whole * LANES, (n_units + LANES - 1) // LANES * LANES):
        valid = min(per_unit, size - unit * per_unit) if row < n_rows else 0
        place = (unit // LANES * n_packed + row) * LANES + unit % LANES
        tile.copy_unit(source, unit * per_unit, valid, target, place)


@body
def _packed_rows(n_rows):
    """Rows of packed x: tiles have 1, 2 or 4 rows, and up to 8 rows cost what memory costs in any case."""
    return n_rows if n_rows <= 2 else (n_rows + 3) // 4 * 4


@body
def _line_chunks(w):
    """Chunks of w in 64 bytes: 2 of float16."""
    return 4 // (item_bytes(w) * tile.units_ratio(w))


@body
def _steps(n_rows):
    """(chunks of all columns of a block that are worked on before the next ones, a part of a chain or all of it; lines that
    are asked for in advance).

    The part of x in use stays in the L1 cache; the distances were measured.
    """
    if n_rows <= 2:
        return _CHAIN_LINES, 64
    if n_rows > 32:
        return 8, 32
    return (32, 64) if n_rows == 4 else (16, 32)


@body
def _moved(chain, offset):
    """A chain of other rows or columns."""
    sums, links = shifted(chain.sums, offset), shifted(chain.links, offset)
    return Chain(sums, links, chain.has_sums, chain.goes_on, chain.stays_open)


@body
def _dot_columns(x, n_rows, w, size, chunks, tail, ahead, near, turn, jump, chain):
    """Products of all packed rows of x with eight rows of w for 1 or 2 rows of x, with four for more."""
    x_step = n_rows * LANES
    if n_rows == 1:
        dot_tile(x, x_step, w, size, chunks, tail, ahead, near, turn, jump, chain, 1, 8, 8, 8)
    elif n_rows == 2:
        dot_tile(x, x_step, w, size, chunks, tail, ahead, near, turn, jump, chain, 2, 8, 8, 8)
    elif n_rows == 4:
        dot_tile(x, x_step, w, size, chunks, tail, ahead, near, turn, jump, chain, 4, 4, 4, 4)
    else:
        # the requests are spread over the tiles, since a core can only wait for so many lines at a time
        asked = 0
        for row in range(0, n_rows, 4):
            x_here, out = shifted(x, row * LANES), _moved(chain, row * LANES * LANES)
            there, soon = shifted(ahead, asked % 4 * size), shifted(near, asked % 4 * size)
            if n_rows == 8 or (n_rows == 12 and row == 0):
                dot_tile(x_here, x_step, w, size, chunks, tail, there, soon, turn, jump, out, 4, 4, 2, 2)
                asked += 2
            else:
                dot_tile(x_here, x_step, w, size, chunks, tail, there, soon, turn, jump, out, 4, 4, 1, 1)
                asked += 1


@body
def _dot_in_order(x, size, w, n_columns, following, sums):
    """`_dot_block` for 1 row of x and short ones of w: in the order of memory, which a core's own prefetcher follows.

    Measured 6 to 19 % faster for rows of 1.5 KB, as fast for 4 KB, and slower for long ones.
    """
    width = LANES * tile.units_ratio(w)
    chunks = size // width
    end, distance, tail = n_columns * size, 16 * width * _line_chunks(w), size - chunks * width
    for column in range(n_columns):
        place, out = column * size, shifted(sums, column * LANES)
        w_here, behind = shifted(w, place), place + distance - end
        ahead = shifted(following, behind) if behind >= 0 else shifted(w_here, distance)
        chain = Chain(out, out, False, False, False)
        dot_tile(x, LANES, w_here, size, chunks, tail, ahead, ahead, chunks, 0, chain, 1, 1, 1, 0)


@body
def _dot_block(x, n_rows, size, w, n_columns, following, sums, links):
    """sums[i, j, :] = partial sums of x[i] . w[j] for all packed rows and up to 16 columns.

    Several rows of w pass at a time, and what comes later is asked for early, into the L2 cache: the same columns further
    on in these rows, and in the end the first ones of the block at `following`. What comes next is asked for once more.
    links: room like that of sums, for chains that are not complete.
    """
    width = LANES * tile.units_ratio(w)
    whole = size // width
    if n_rows == 1 and whole <= _SHORT_ROW * _line_chunks(w):
        _dot_in_order(x, size, w, n_columns, following, sums)
        return
    step, distance = _steps(n_rows)
    distance *= _line_chunks(w)
    whole_chain = _CHAIN_LINES * _line_chunks(w)
    if n_rows <= 2:
        step = whole_chain
    together = 8 if n_rows <= 2 else 4
    distance = min(distance, whole)
    jump = (address_of(following) - address_of(w)) // item_bytes(w) - whole * width
    first = 0
    while True:
        last = min(first + step, whole)
        tail = size - whole * width if last == whole else 0
        chunks, goes_on = last - first, first % whole_chain != 0
        stays_open = last % whole_chain != 0 and last < whole
        has_sums = first >= whole_chain and not stays_open
        chain = Chain(sums, links, has_sums, goes_on, stays_open)
        x_here = shifted(x, first * n_rows * LANES)
        turn = whole - first - distance
        column = 0
        while column < n_columns:
            w_here, out = shifted(w, column * size + first * width), _moved(chain, column * LANES)
            if column + together <= n_columns:
                ahead = shifted(w_here, distance * width)
                if column + together < n_columns:
                    near = shifted(w_here, together * size)
                elif last < whole:
                    near = shifted(w, last * width)
                else:
                    near = following
                _dot_columns(x_here, n_rows, w_here, size, chunks, tail, ahead, near, turn, jump, out)
                column += together
            else:
                for row in range(n_rows):
                    x_row, to = shifted(x_here, row * LANES), _moved(out, row * LANES * LANES)
                    x_step = n_rows * LANES
                    dot_tile(x_row, x_step, w_here, size, chunks, tail, w, w, 0, 0, to, 1, 1, 0, 0)
                column += 1
        first = last
        if first == whole:
            break


@body
def _rows_block(index, rows, layer):
    """One block of up to 64 rows, straight from the row-major weights."""
    sums = tile.stack_floats(64 * 16 * 16)
    gate = tile.stack_floats(64 * 16 * 16)
    links = tile.stack_floats(64 * 16 * 16)
    x, n_packed, size = rows.packed, rows.n_packed, layer.size
    matrix, first = find_block(layer, index)
    columns = columns_of(layer, matrix, first)
    w = weight_rows(layer, matrix, first)
    if layer.gated:
        _dot_block(x, n_packed, size, weight_rows(layer, 0, first), columns.count, w, gate, links)
        following = weight_rows(layer, 0, first + LANES)
    else:
        following = weight_rows(layer, matrix, first + LANES)
    _dot_block(x, n_packed, size, w, columns.count, following, sums, links)
    for row in range(rows.n_rows):
        value = tile.sum_rows(shifted(sums, row * LANES * LANES))
        other = tile.sum_rows(shifted(gate, row * LANES * LANES)) if layer.gated else value
        finish(layer, columns, row, value, other)


@body
def rows_scratch(x, n_rows, size):
    """float32 of scratch that `multiply_rows` needs."""
    if has_tiles(x):
        return (packed_bytes(n_rows, size) + 3) // 4
    per_unit = tile.units_ratio(x)
    return ((size + per_unit - 1) // per_unit + LANES) * _packed_rows(n_rows) + LANES


@body
def multiply_rows(x, n_rows, layer, scratch):
    """layer.out = epilogue(x W^T + b) for 1 to 64 rows at x; scratch: pointer to `rows_scratch` float32."""
    if has_tiles(x):
        multiply_in_tiles(x, n_rows, layer, address_of(scratch))
        return
    size, n_packed = layer.size, _packed_rows(n_rows)
    packed = as_units(shifted(scratch, tile.to_cache_line(scratch)), x)
    packing = (x, n_rows, size, packed, n_packed)
    parallel_for(_pack_chunks, threads_for(n_packed, n_rows * size, _PARALLEL_SIZE), n_packed, packing)
    n_blocks = count_blocks(layer)
    threads = threads_for(n_blocks, n_rows * size * n_blocks * LANES, _PARALLEL_SIZE)
    parallel_for(_rows_block, threads, n_blocks, (_Rows(packed, n_packed, n_rows), layer))


@launch
def linear_rows(like, x, n_rows, size, table, gated, code, residuals, out, width):
    """out = epilogue(x W^T + b) for 1 to 64 rows.

    Addresses of x [n_rows, size] and out [n_rows, width] of the type of `like`; table int64
    [matrices, 4]; residuals int64 addresses of arrays like out; code from `activation`.
    """
    x, out = address_as(x, pointer(like)), address_as(out, pointer(like))
    addresses, n_residuals = pointer(residuals), residuals.shape[0]
    layer = Linear(size, pointer(table), table.shape[0], gated, code, addresses, n_residuals, out, width)
    room = np.empty(rows_scratch(x, n_rows, size), np.float32)
    multiply_rows(x, n_rows, layer, pointer(room))
    room[0] = 0  # the last use of the scratch: it must live until here
