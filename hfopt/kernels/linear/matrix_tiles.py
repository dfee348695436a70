"""Linear layers of many rows in tile registers: 32 rows of weights by 32 of x at a time.

The products of a panel (32 output columns, `linear.panels`) with two tiles of x are four tiles of sums. As many rows of x as
an L2 cache has room for, up to 2,048 features of them, stay there while panels pass, which are read where they are.
"""

from typing import Any, NamedTuple

from hfopt.kernels.jit.parallel import body, next_share, parallel_for, usable_threads
from hfopt.kernels.linear.blocks import columns_of, finish_inlined, weight_rows
from hfopt.kernels.linear.matrix_rows import FEATURES, pack_chunk, packed_bytes, packed_rows, tile_bytes
from hfopt.kernels.linear.panels import count_panels, half_panel
from hfopt.kernels.simd import matrix, tile
from hfopt.kernels.simd.memory import load, prefetch
from hfopt.kernels.simd.pointer import address_of, bytes_at, floats_at, integers_at, item_bytes, shifted

_ROWS = matrix.ROWS
_LINE = matrix.LINE
TILE = _ROWS * _LINE  # bytes
CHUNKS = 64  # at a time
PAIRS = 8  # of tiles of x at a time, if they have so many chunks: 1 MB
_MOST_PAIRS = 64
_PANELS = 16  # most of a group: the same part of x is read for all of them
# tiles: sums of the first 16 rows of weights and of the others, with 16 rows of x, and with 16 more; weights; x
_SUMS, _X = 0b1111, 0b11000000


class _Work(NamedTuple):
    """What a worker does with all groups of panels and parts of the rows; addresses."""

    room: Any  # for panels that are packed, and sums
    n_workers: Any
    n_together: Any  # panels of a group
    n_panels: Any


class _Panel(NamedTuple):
    """Some chunks of two times 16 rows of weights; addresses and bytes."""

    first: Any
    second: Any
    stride: Any  # from row to row
    step: Any  # from chunk to chunk


@body
def _most_pairs(n_chunks):
    """Of tiles of x at a time."""
    return PAIRS if n_chunks >= CHUNKS else min(PAIRS * CHUNKS // n_chunks, _MOST_PAIRS)


@body
def panels_together(n_panels, n_workers):
    """Panels of a group, so that no thread waits long for the last one."""
    return max(1, min(_PANELS, n_panels // (4 * n_workers)))


@body
def begin_sums(sums, goes_on):
    """Tiles 0 to 3 are what `keep_sums` left at an address, or 0."""
    if goes_on:
        matrix.load(0, sums, _LINE)
        matrix.load(1, sums + TILE, _LINE)
        matrix.load(2, sums + 2 * TILE, _LINE)
        matrix.load(3, sums + 3 * TILE, _LINE)
    else:
        matrix.clear(0)
        matrix.clear(1)
        matrix.clear(2)
        matrix.clear(3)


@body
def keep_sums(sums):
    """Write tiles 0 to 3 to an address."""
    matrix.store(0, sums, _LINE)
    matrix.store(1, sums + TILE, _LINE)
    matrix.store(2, sums + 2 * TILE, _LINE)
    matrix.store(3, sums + 3 * TILE, _LINE)


@body
def room_bytes():
    """Of a worker: a packed or unpacked panel, and the sums of a group, which wait for the next chunks.

    Sums [panels, pairs, 4 tiles].
    """
    return CHUNKS * 2 * TILE + _PANELS * PAIRS * 4 * TILE


@body
def panels_scratch(n_rows, size, threads):
    """Bytes of scratch that `multiply_panels` needs on so many threads."""
    return packed_bytes(n_rows, size) + threads * room_bytes()


@body
def _pack_half(weights, size, count, first, last, room):
    """Chunks of up to 16 rows of weights as tiles; 0 for rows and features that there are not."""
    item = item_bytes(weights)
    for chunk in range(first, last):
        n_bytes = min(size - chunk * FEATURES, FEATURES) * item
        for row in range(_ROWS):
            source = bytes_at(address_of(weights) + (row * size + chunk * FEATURES) * item)
            target = bytes_at(room + (2 * (chunk - first) * _ROWS + row) * _LINE)
            for place in range(_LINE):
                target[place] = source[place] if row < count and place < n_bytes else 0


@body
def _panel(layer, panel, first, last, room):
    """Chunks of a panel, where they are; of one that is not whole, packed in the room."""
    number, row, count = half_panel(layer, panel, 0)
    other_number, other_row, other_count = half_panel(layer, panel, 1)
    weights, other = weight_rows(layer, number, row), weight_rows(layer, other_number, other_row)
    size, item = layer.size, item_bytes(weights)
    if count == _ROWS and other_count == _ROWS and last * FEATURES <= size:
        start = first * FEATURES * item
        return _Panel(address_of(weights) + start, address_of(other) + start, size * item, _LINE)
    _pack_half(weights, size, count, first, last, room)
    _pack_half(other, size, other_count, first, last, room + TILE)
    return _Panel(room, room + TILE, _LINE, 2 * TILE)


@body
def _ask(panel, chunk, row, end):
    """Asks for a chunk of some of the 32 rows of a panel."""
    for each in range(row, end):
        half = (
            panel.first + each * panel.stride
            if each < _ROWS
            else panel.second + (each - _ROWS) * panel.stride
        )
        prefetch(bytes_at(half + chunk * panel.step), 0)


@body
def _multiply(panel, x, y, n_chunks, sums, goes_on, following, row, end):
    """sums (+)= products of a panel with the tiles of x at two addresses: [2 tiles of x, 2 halves]. Rows from `row` to `end`
    of the following panel are asked for.
    """
    begin_sums(sums, goes_on)
    for chunk in range(n_chunks):
        _ask(following, chunk, row, end)
        place = chunk * panel.step
        matrix.load(6, x + chunk * TILE, _LINE)
        matrix.load(4, panel.first + place, panel.stride)
        matrix.multiply(0, 4, 6)
        matrix.load(5, panel.second + place, panel.stride)
        matrix.multiply(1, 5, 6)
        matrix.load(7, y + chunk * TILE, _LINE)
        matrix.multiply(2, 4, 7)
        matrix.multiply(3, 5, 7)
    keep_sums(sums)


@body
def _finish_panel(layer, panel, row, n_rows, sums):
    """Epilogue of a panel for the rows of two tiles of x."""
    first, second = tile.stack_floats(256), tile.stack_floats(256)
    for there in range(2):
        start = row + there * _ROWS
        if start < n_rows:
            own = floats_at(sums + there * 2 * TILE)
            tile.transpose_block(own, _ROWS, first, _ROWS)
            tile.transpose_block(shifted(own, 256), _ROWS, second, _ROWS)
            for half in range(1 if layer.gated else 0, 2):
                number, column, count = half_panel(layer, panel, half)
                if count > 0:
                    columns = columns_of(layer, number, column)
                    for place in range(min(n_rows - start, _ROWS)):
                        value = load(second if half == 1 else first, place * _ROWS)
                        finish_inlined(layer, columns, start + place, value, load(first, place * _ROWS))


@body
def _group(packed, layer, first_panel, last_panel, first_pair, last_pair, room):
    """Some panels for some rows."""
    sums = room + CHUNKS * 2 * TILE
    n_pairs = last_pair - first_pair
    for first in range(0, packed.n_chunks, CHUNKS):
        last = min(first + CHUNKS, packed.n_chunks)
        for each in range(first_panel, last_panel):
            panel = _panel(layer, each, first, last, room)
            # of a matrix that goes on behind it
            step = 2 * _ROWS * panel.stride
            following = _Panel(panel.first + step, panel.second + step, panel.stride, panel.step)
            for pair in range(n_pairs):
                tiles = 2 * (first_pair + pair)
                x = packed.address + tiles * tile_bytes(packed) + first * TILE
                y = x + tile_bytes(packed) if (tiles + 1) * _ROWS < packed.n_rows else x
                own = sums
                if packed.n_chunks > CHUNKS:
                    own = sums + ((each - first_panel) * PAIRS + pair) * 4 * TILE
                row, end = 2 * _ROWS * pair // n_pairs, 2 * _ROWS * (pair + 1) // n_pairs
                _multiply(panel, x, y, last - first, own, first > 0, following, row, end)
                if last == packed.n_chunks:
                    _finish_panel(layer, each, tiles * _ROWS, packed.n_rows, own)


@body
def _worker(worker, counter, packed, layer, work):
    """Shares of all groups of panels, of all parts of the rows, as long as there are any."""
    config = tile.stack_floats(16)
    n_pairs = (packed.n_rows + 2 * _ROWS - 1) // (2 * _ROWS)
    most = _most_pairs(packed.n_chunks)
    n_parts = (n_pairs + most - 1) // most
    n_groups = (work.n_panels + work.n_together - 1) // work.n_together
    room = work.room + worker * room_bytes()
    matrix.configure(address_of(config), _ROWS, _ROWS, _ROWS, _SUMS, _X)
    while True:
        start, end = next_share(counter, n_groups * n_parts, work.n_workers)
        if start == end:
            break
        for index in range(start, end):
            # what other rows need of a group, too, is then still in a cache
            group = index // n_parts
            panel, part = group * work.n_together, index - group * n_parts
            last_panel = min(panel + work.n_together, work.n_panels)
            first_pair, last_pair = part * n_pairs // n_parts, (part + 1) * n_pairs // n_parts
            _group(packed, layer, panel, last_panel, first_pair, last_pair, room)
    matrix.release()


@body
def multiply_panels(x, n_rows, layer, scratch, threads):
    """layer.out = epilogue(x W^T + b) for many rows of bfloat16 at x; scratch: address of `panels_scratch` bytes, at a
    multiple of 64.
    """
    n_workers = min(usable_threads(), threads)
    counter, packed = integers_at(scratch), packed_rows(scratch + _LINE, n_rows, layer.size)
    n_tiles = (n_rows + _ROWS - 1) // _ROWS
    parallel_for(pack_chunk, n_workers, n_tiles * packed.n_chunks, (x, layer.size, packed))
    n_panels = count_panels(layer)
    n_together = panels_together(n_panels, n_workers)
    work = _Work(packed.address + n_tiles * tile_bytes(packed), n_workers, n_together, n_panels)
    counter[0] = 0
    parallel_for(_worker, n_workers, n_workers, (counter, packed, layer, work))
