"""A tile of queries against a block of keys in tile registers (`simd.matrix`): scores and weighted values.

Keys are read where they are, 16 at a time, as rows of 32 channels; of values, a row has the 16 pairs of keys of a channel.
"""

from hfopt.kernels.attention.pack import BLOCK
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.simd import matrix
from hfopt.kernels.simd.constants import ZERO
from hfopt.kernels.simd.memory import store
from hfopt.kernels.simd.pointer import address_of, floats_at
from hfopt.kernels.simd.tile import stack_floats
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import splat

_LINE = matrix.LINE
_CHUNK = 16  # units of channels of a row of keys, and pairs of keys of a row of values


@body
def take_tiles():
    """Give this thread tiles, all of 16 rows of 64 bytes. `matrix.release` gives them back."""
    matrix.configure(address_of(stack_floats(16)), matrix.ROWS, matrix.ROWS, matrix.ROWS, 0, 0)


@body
def score_in_tiles(queries, width, keys, stride, size, n, scores):
    """As `softmax.score_keys`; keys are readable up to a multiple of 16 of them, and of 32 channels, 0 behind the last."""
    units = (size + 1) // 2
    n_chunks, row, key_row = (units + _CHUNK - 1) // _CHUNK, 4 * width, 4 * stride
    for j in range(0, n, matrix.ROWS):
        first, target = address_of(keys) + j * key_row, address_of(scores) + j * row
        matrix.clear(0)
        matrix.clear(1)
        matrix.clear(2)
        for chunk in range(n_chunks):
            query = address_of(queries) + chunk * _CHUNK * row
            matrix.load(6, first + chunk * _LINE, key_row)
            matrix.load(3, query, row)
            matrix.multiply(0, 6, 3)
            if width > LANES:
                matrix.load(4, query + _LINE, row)
                matrix.multiply(1, 6, 4)
            if width > 2 * LANES:
                matrix.load(5, query + 2 * _LINE, row)
                matrix.multiply(2, 6, 5)
        matrix.store(0, target, row)
        if width > LANES:
            matrix.store(1, target + _LINE, row)
        if width > 2 * LANES:
            matrix.store(2, target + 2 * _LINE, row)


@body
def add_in_tiles(weights, width, n, values, size, sums):
    """As `softmax.add_values`, of values [channel // 16, pair // 16, channel % 16, pair % 16]. They are 0 or those of other
    keys behind n, up to 16 pairs; weights there are set to 0."""
    n_pairs, row = (n + 1) // 2, 4 * width
    is_long = n_pairs > _CHUNK
    empty = floats_at(address_of(weights))
    for place in range(n_pairs * width, (2 if is_long else 1) * _CHUNK * width, LANES):
        store(empty, place, splat(ZERO))
    for channel in range(0, size, matrix.ROWS):
        panel = address_of(values) + 4 * channel * BLOCK
        matrix.load(6, panel, _LINE)
        if is_long:
            matrix.load(7, panel + matrix.ROWS * _LINE, _LINE)
        for column in range(0, width, LANES):
            target = address_of(sums) + 4 * (channel * width + column)
            weight = address_of(weights) + 4 * column
            matrix.load(0, target, row)
            matrix.load(3, weight, row)
            matrix.multiply(0, 6, 3)
            if is_long:
                matrix.load(4, weight + _CHUNK * row, row)
                matrix.multiply(0, 7, 4)
            matrix.store(0, target, row)
