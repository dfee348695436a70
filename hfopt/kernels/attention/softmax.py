"""One tile of queries against one block of keys: scores, weights of the online softmax, weighted values.

Queries lie along the lanes of vectors, so arrays are [key or channel, width] with `width` queries: 16, 32 or 48.
"""

import numpy as np

from hfopt.kernels.attention.matrix_block import add_in_tiles, score_in_tiles
from hfopt.kernels.attention.pack import BLOCK, ROWS, is_finite, rounded, scales_of, token_of
from hfopt.kernels.attention.tile import (
    any_below,
    load_row,
    multiply_tile,
    store_pair,
    weight_of,
    where_up_to,
)
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.simd.constants import LOWEST, ONE, ZERO
from hfopt.kernels.simd.matrix import has_tiles
from hfopt.kernels.simd.memory import load, load_scalar, store
from hfopt.kernels.simd.pointer import shifted
from hfopt.kernels.simd.tile import units_ratio
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import absolute, fence, fma, larger, splat

TILE = 48  # queries: 3 vectors; the last tile of a head may have 1 or 2
# of each query: largest score, sum of weights, position in its tile, slope of the bias
TOP, TOTAL, LIMIT, SLOPE, STATS = range(5)
# units of channels that are summed in a row: for float32, which has more digits to lose, a quarter of them, but not
# fewer than 16
_CHAIN, _CHAIN_OF_PAIRS = 16, 64
# up to there a scaled score, rounded, is less than 1 from what it was
_ROUNDED_BY_LITTLE = np.float32(1 << 24)
_PART = 128  # units of channels whose queries stay in an L1 cache, while keys pass by


@body
def multiply(a, a_row, a_step, b, size, out, width, accumulate):
    """`multiply_tile` of 8 rows for a tile of `width` queries."""
    if width == 48:
        multiply_tile(a, a_row, a_step, b, size, out, 8, 3, accumulate)
    elif width == 32:
        multiply_tile(a, a_row, a_step, b, size, out, 8, 2, accumulate)
    else:
        multiply_tile(a, a_row, a_step, b, size, out, 8, 1, accumulate)


@body
def score_keys(queries, width, keys, stride, size, n, scores):
    """scores[j, :] = products of n keys, `stride` units apart, with the packed queries of a tile."""
    if has_tiles(keys):
        score_in_tiles(queries, width, keys, stride, size, n, scores)
        return
    chain = max(_CHAIN, size // 4) if units_ratio(keys) == 1 else _CHAIN_OF_PAIRS
    units = rounded(size, units_ratio(keys)) // units_ratio(keys)
    n_parts = (units + _PART - 1) // _PART
    for part in range(n_parts):
        begin, end = part * units // n_parts, (part + 1) * units // n_parts
        n_chains = (end - begin + chain - 1) // chain
        for j in range(0, n, ROWS):
            for c in range(n_chains):
                first = begin + c * (end - begin) // n_chains
                last = begin + (c + 1) * (end - begin) // n_chains
                here, key = shifted(queries, first * width), shifted(keys, j * stride + first)
                multiply(key, stride, 1, here, last - first, shifted(scores, j * width), width, first > 0)


@body
def _scale_alike(scores, width, n, column, scale, shift):
    """What to multiply the n scores of a column by before `shift`, the largest product, is taken off: `scale`.

    1 where that is so large that it was rounded by more than weights can make up for: scores become products, rounded alike.
    """
    far = absolute(shift)
    if not any_below(splat(_ROUNDED_BY_LITTLE), far):
        return splat(scale)
    for place in range(column, n * width, width):
        score = load(scores, place)
        store(scores, place, where_up_to(far, splat(_ROUNDED_BY_LITTLE), score, fence(score * splat(scale))))
    return where_up_to(far, splat(_ROUNDED_BY_LITTLE), splat(scale), splat(ONE))


@body
def weigh_keys(scores, width, n, scale, weights, sums, size, stats):
    """weights = 2^(scale * score - the largest so far), in place of the scores; sums and statistics are scaled to fit."""
    tops, totals = shifted(stats, TOP * TILE), shifted(stats, TOTAL * TILE)
    for column in range(0, width, LANES):
        before = load(tops, column)
        top, other = before, before
        for j in range(0, n - 1, 2):
            top = larger(load(scores, j * width + column), top)
            other = larger(load(scores, (j + 1) * width + column), other)
        if n % 2 == 1:
            top = larger(load(scores, (n - 1) * width + column), top)
        top = larger(other, top)
        # all scores so far may be -inf: their weights have to be 0 beside those to come
        shift = where_up_to(top, splat(LOWEST), splat(ZERO), fence(top * splat(scale)))
        total = load(totals, column)
        if any_below(before, top):
            # rounded as the shift was that it had then: keys of all blocks must be weighed alike
            factor = weight_of(fence(before * splat(scale)) - shift, weights)
            total = total * factor
            for place in range(column, size * width, width):
                store(sums, place, load(sums, place) * factor)
            store(tops, column, top)
        by = _scale_alike(scores, width, n, column, scale, shift)
        shift = splat(ZERO) - shift
        even, odd = splat(ZERO), splat(ZERO)
        for pair in range(n // 2):
            place = 2 * pair * width + column
            low = weight_of(fma(load(scores, place), by, shift), weights)
            high = weight_of(fma(load(scores, place + width), by, shift), weights)
            store_pair(weights, pair, width, column, low, high)
            even = even + low
            odd = odd + high
        if n % 2 == 1:
            low = weight_of(fma(load(scores, (n - 1) * width + column), by, shift), weights)
            store_pair(weights, n // 2, width, column, low, splat(ZERO))
            even = even + low
        store(totals, column, total + (even + odd))


@body
def add_values(weights, width, n, values, size, sums):
    """sums += the packed values of n keys, weighted."""
    if has_tiles(values):
        add_in_tiles(weights, width, n, values, size, sums)
        return
    depth = rounded(n, units_ratio(values)) // units_ratio(values)
    for channel in range(0, size, ROWS):
        panel = shifted(values, channel // LANES * LANES * BLOCK + channel % LANES)
        multiply(panel, 1, LANES, weights, depth, shifted(sums, channel * width), width, True)


@body
def add_infinite(weights, width, n, cache, scales, row, kv_head, first, size, sums):
    """sums += those of the weighted values that are not finite, where the weight is not 0."""
    for j in range(n):
        _, value = token_of(cache, row, kv_head, first + j)
        _, factor = scales_of(cache, scales, row, kv_head, first + j)
        for k in range(size):
            number = load_scalar(value, k) * factor
            if not is_finite(number):
                for column in range(0, width, LANES):
                    weight = load_row(weights, j, width, column)
                    more = where_up_to(weight, splat(ZERO), splat(ZERO), weight * splat(number))
                    place = k * width + column
                    store(sums, place, load(sums, place) + more)
