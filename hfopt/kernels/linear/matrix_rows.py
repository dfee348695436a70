"""Linear layers of few rows in tile registers: weights are read where they are, 16 rows of a matrix at a time.

Up to 16 rows of x cost what one does, as long as memory is what takes the time.
"""

from typing import Any, NamedTuple

from hfopt.kernels.jit.parallel import body, next_share, parallel_for, threads_for
from hfopt.kernels.linear.blocks import columns_of, count_blocks, find_block, finish, weight_rows
from hfopt.kernels.simd import matrix, tile
from hfopt.kernels.simd.memory import load, prefetch, store, store_part
from hfopt.kernels.simd.pointer import (
    address_of,
    as_units,
    bytes_at,
    floats_at,
    integers_at,
    item_bytes,
    shifted,
)

# of a chunk: 32 features, and 16 pairs of them
FEATURES, PAIRS = 32, 16
_ROWS = matrix.ROWS
_LINE = matrix.LINE
_AHEAD = 16  # chunks; the distance was measured
_PARALLEL_SIZE = 1 << 16  # features to pack, or multiply-adds; below, more threads cost more than they save
# tiles: sums of even and odd chunks for 16 rows of x, and for 16 more; x of even and odd chunks; weights of both
_SUMS, _X = 0b1111, 0b110000


class Packed(NamedTuple):
    """x as `pack_chunk` packs it."""

    address: Any
    n_rows: Any
    n_chunks: Any
    columns: Any  # rows of x in a tile: all, or 16


@body
def tile_bytes(packed):
    """Of all chunks of a tile of x."""
    return packed.n_chunks * PAIRS * 4 * packed.columns


@body
def pack_chunk(index, x, size, packed):
    """The pairs of a chunk of the rows of a tile, [16 pairs, columns]; 0 for rows and features that there are not."""
    rows, columns = tile.stack_floats(256), tile.stack_floats(256)
    place = index // packed.n_chunks
    chunk = index - place * packed.n_chunks
    first, feature = place * _ROWS, chunk * FEATURES
    n = min(packed.n_rows - first, _ROWS)
    target = floats_at(packed.address + place * tile_bytes(packed) + chunk * PAIRS * 4 * packed.columns)
    is_whole = feature + FEATURES <= size
    source = shifted(x, first * size + feature)
    if is_whole and n == _ROWS:
        tile.transpose_block(source, size, as_units(target, x), _ROWS)
        return
    units = as_units(rows, x)
    for row in range(packed.columns):
        if is_whole and row < n:
            tile.copy_chunk(source, row * size, units, row * PAIRS)
        else:
            for unit in range(PAIRS):
                valid = min(2, size - feature - 2 * unit) if row < n else 0
                tile.copy_unit(source, row * size + 2 * unit, valid, units, row * PAIRS + unit)
    if packed.columns == 1:
        store(target, 0, load(rows, 0))
        return
    tile.transpose_block(units, PAIRS, as_units(columns, x), _ROWS)
    # a row of 16 that reaches into the next one is written before it
    for pair in range(PAIRS - 1):
        store(target, pair * packed.columns, load(columns, pair * _ROWS))
    store_part(target, (PAIRS - 1) * packed.columns, packed.columns, load(columns, (PAIRS - 1) * _ROWS))


class _Sweep(NamedTuple):
    """16 rows of weights; addresses and bytes."""

    weights: Any
    stride: Any  # from row to row
    n_whole: Any  # chunks
    tail: Any  # of the weights behind them, as rows of a chunk, or 0
    following: Any  # where the next rows begin


@body
def _ask(sweep, chunk):
    """Asks for two chunks that come later, in these rows or the next ones."""
    later = chunk + _AHEAD
    where = sweep.weights + later * _LINE
    if later >= sweep.n_whole:
        where = sweep.following + (later - sweep.n_whole) * _LINE
    for row in range(_ROWS):
        line = bytes_at(where + row * sweep.stride)
        prefetch(line, 0)
        prefetch(line, _LINE)


@body
def _multiply_one(sweep, x, columns):
    """Sums of the products with a tile of x, in tiles 0 and 1."""
    width = 4 * columns
    step = PAIRS * width
    matrix.clear(0)
    matrix.clear(1)
    chunk = 0
    while chunk + 2 <= sweep.n_whole:
        _ask(sweep, chunk)
        weights, here = sweep.weights + chunk * _LINE, x + chunk * step
        matrix.load(6, weights, sweep.stride)
        matrix.load(4, here, width)
        matrix.multiply(0, 6, 4)
        matrix.load(7, weights + _LINE, sweep.stride)
        matrix.load(5, here + step, width)
        matrix.multiply(1, 7, 5)
        chunk += 2
    if chunk < sweep.n_whole:
        matrix.load(6, sweep.weights + chunk * _LINE, sweep.stride)
        matrix.load(4, x + chunk * step, width)
        matrix.multiply(0, 6, 4)
    if sweep.tail != 0:
        matrix.load(7, sweep.tail, _LINE)
        matrix.load(5, x + sweep.n_whole * step, width)
        if chunk < sweep.n_whole:
            matrix.multiply(1, 7, 5)
        else:
            matrix.multiply(0, 7, 5)


@body
def _multiply_two(sweep, x, y):
    """The same with two tiles of 16 rows; those of the second in tiles 2 and 3."""
    step = PAIRS * _LINE
    matrix.clear(0)
    matrix.clear(1)
    matrix.clear(2)
    matrix.clear(3)
    chunk = 0
    while chunk + 2 <= sweep.n_whole:
        _ask(sweep, chunk)
        weights, place = sweep.weights + chunk * _LINE, chunk * step
        matrix.load(6, weights, sweep.stride)
        matrix.load(4, x + place, _LINE)
        matrix.multiply(0, 6, 4)
        matrix.load(5, y + place, _LINE)
        matrix.multiply(2, 6, 5)
        matrix.load(7, weights + _LINE, sweep.stride)
        matrix.load(4, x + place + step, _LINE)
        matrix.multiply(1, 7, 4)
        matrix.load(5, y + place + step, _LINE)
        matrix.multiply(3, 7, 5)
        chunk += 2
    if chunk < sweep.n_whole:
        matrix.load(6, sweep.weights + chunk * _LINE, sweep.stride)
        matrix.load(4, x + chunk * step, _LINE)
        matrix.multiply(0, 6, 4)
        matrix.load(5, y + chunk * step, _LINE)
        matrix.multiply(2, 6, 5)
    if sweep.tail != 0:
        matrix.load(7, sweep.tail, _LINE)
        matrix.load(4, x + sweep.n_whole * step, _LINE)
        matrix.load(5, y + sweep.n_whole * step, _LINE)
        if chunk < sweep.n_whole:
            matrix.multiply(1, 7, 4)
            matrix.multiply(3, 7, 5)
        else:
            matrix.multiply(0, 7, 4)
            matrix.multiply(2, 7, 5)


@body
def _copy_tail(weights, stride, n_rows, n_bytes, room):
    """n_bytes of each row behind its whole chunks, and 0."""
    for row in range(n_rows):
        source, target = bytes_at(weights + row * stride), bytes_at(room + row * _LINE)
        for place in range(_LINE):
            target[place] = source[place] if place < n_bytes else 0


@body
def _transposed(even, odd, target):
    """target[column, row] = even[row, column] + odd[row, column]."""
    for row in range(_ROWS):
        store(even, row * _ROWS, load(even, row * _ROWS) + load(odd, row * _ROWS))
    tile.transpose_block(even, _ROWS, target, _ROWS)


@body
def _block_sums(packed, place, weights, size, n_rows, following, room, sums):
    """Products of up to 16 rows of weights with the tile of x at `place` and the next: [2, rows of x, 16]."""
    even, odd = tile.stack_floats(256), tile.stack_floats(256)
    item = item_bytes(weights)
    n_whole, tail = size // FEATURES, size % FEATURES
    first, stride = address_of(weights), size * item
    if tail > 0:
        _copy_tail(first + n_whole * _LINE, stride, n_rows, tail * item, room)
    sweep = _Sweep(first, stride, n_whole, room if tail > 0 else 0, address_of(following))
    x = packed.address + place * tile_bytes(packed)
    if (place + 1) * _ROWS < packed.n_rows:
        _multiply_two(sweep, x, x + tile_bytes(packed))
        matrix.store(2, address_of(even), _LINE)
        matrix.store(3, address_of(odd), _LINE)
        _transposed(even, odd, shifted(sums, _ROWS * _ROWS))
    else:
        _multiply_one(sweep, x, packed.columns)
    matrix.store(0, address_of(even), _LINE)
    matrix.store(1, address_of(odd), _LINE)
    _transposed(even, odd, sums)


@body
def _worker(worker, counter, n_workers, packed, layer):
    """Shares of all blocks, as long as there are any."""
    config, tail = tile.stack_floats(16), tile.stack_floats(256)
    sums, gate = tile.stack_floats(512), tile.stack_floats(512)
    n_blocks, size, n_configured = count_blocks(layer), layer.size, 0
    while True:
        start, end = next_share(counter, n_blocks, n_workers)
        if start == end:
            break
        for index in range(start, end):
            number, first = find_block(layer, index)
            columns = columns_of(layer, number, first)
            if columns.count != n_configured:
                n_configured = columns.count
                matrix.configure(address_of(config), n_configured, n_configured, packed.columns, _SUMS, _X)
            w = weight_rows(layer, number, first)
            following = weight_rows(layer, number, first + _ROWS)
            for row in range(0, packed.n_rows, 2 * _ROWS):
                place, count = row // _ROWS, columns.count
                if layer.gated:
                    other = weight_rows(layer, 0, first)
                    _block_sums(packed, place, other, size, count, w, address_of(tail), gate)
                    following = weight_rows(layer, 0, first + _ROWS)
                _block_sums(packed, place, w, size, count, following, address_of(tail), sums)
                for column in range(min(packed.n_rows - row, 2 * _ROWS)):
                    value = load(sums, column * _ROWS)
                    finish(
                        layer,
                        columns,
                        row + column,
                        value,
                        load(gate, column * _ROWS) if layer.gated else value,
                    )
    if n_configured > 0:
        matrix.release()


@body
def packed_bytes(n_rows, size):
    """Bytes of scratch for packed rows of x, at any address, and a counter before them."""
    n_tiles, n_chunks = (n_rows + _ROWS - 1) // _ROWS, (size + FEATURES - 1) // FEATURES
    return 2 * _LINE + n_tiles * n_chunks * PAIRS * 4 * min(n_rows, _ROWS)


@body
def packed_rows(address, n_rows, size):
    """Rows of x, to be packed at an address."""
    return Packed(address, n_rows, (size + FEATURES - 1) // FEATURES, min(n_rows, _ROWS))


@body
def multiply_in_tiles(x, n_rows, layer, scratch):
    """layer.out = epilogue(x W^T + b) for rows of bfloat16 at x; scratch: address of `packed_bytes`."""
    size = layer.size
    first = (scratch + _LINE - 1) // _LINE * _LINE
    counter, packed = integers_at(first), packed_rows(first + _LINE, n_rows, size)
    n_chunks = (n_rows + _ROWS - 1) // _ROWS * packed.n_chunks
    threads = threads_for(n_chunks, n_rows * size, _PARALLEL_SIZE)
    parallel_for(pack_chunk, threads, n_chunks, (x, size, packed))
    n_blocks = count_blocks(layer)
    threads = threads_for(n_blocks, n_rows * size * n_blocks * _ROWS, _PARALLEL_SIZE)
    counter[0] = 0
    parallel_for(_worker, threads, threads, (counter, threads, packed, layer))
