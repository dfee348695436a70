"""A chunk of keys of decode attention in tile registers (`simd.matrix`): the unfinished softmax of up to 16 queries.

    scores[key, query] = sum over channels of keys[key, channel] queries[channel, query]
    sums[query, channel] = sum over keys of weights[query, key] values[key, channel]

Keys are read where they are, 16 at a time, and values are brought into pairs of keys on the way. Queries lie along the lanes
in between, so that the softmax needs nothing across lanes. Each number is that of one query, so its bits are the same
however many there are beside it.
"""

from hfopt.kernels.attention.blocks import MAX_KEYS, query_of
from hfopt.kernels.attention.elements import BLOCK, again_of, ask_ahead
from hfopt.kernels.attention.lanes import load_quads, partner, store_pair_quads
from hfopt.kernels.attention.pack import copy_row
from hfopt.kernels.attention.partials import MAX, SUM
from hfopt.kernels.attention.scoring import RANKED, bias_factor, slope_of
from hfopt.kernels.attention.tile import store_pair, weight_of, where_up_to
from hfopt.kernels.attention.values import put_in_order, put_pairs
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.simd import matrix
from hfopt.kernels.simd.constants import LINE, LOWEST, ONE, ZERO
from hfopt.kernels.simd.functions import quick_tanh
from hfopt.kernels.simd.memory import bfloat16, load, load_scalar, store, store_scalar
from hfopt.kernels.simd.pointer import address_of, as_units, floats_at, shifted
from hfopt.kernels.simd.tile import stack_floats, transpose_block
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import added, fence, fma, lane, larger, splat, where_part

QUERIES = 16  # that are worked on together
_TILE = 16 * LANES  # floats or pairs of one
_PAIRS = 16  # of keys of a tile of weights, two blocks
_FEW = 4  # queries of which a vector has four keys


@body
def _ask(address, n_bytes, ahead, again):
    """`elements.ask_ahead` for all lines of some bytes."""
    for line in range(0, n_bytes, LINE):
        ask_ahead(address + line, ahead, again)


@body
def _score(blocks, queries, units, scores):
    """scores [keys, 16 queries], while the values of these keys are asked for."""
    stride, head, out = 4 * units, address_of(queries), address_of(scores)
    again = again_of(blocks.keys, blocks.n_blocks, BLOCK * stride)
    for block in range(0, blocks.n_blocks, 4):
        n = min(blocks.n_blocks - block, 4)
        matrix.clear(0)
        matrix.clear(1)
        matrix.clear(2)
        matrix.clear(3)
        for chunk in range(0, stride, LINE):
            for i in range(n):
                key = blocks.keys[block + i]
                _ask(key + chunk * BLOCK, LINE * BLOCK, blocks.to_values, again)
            matrix.load(6, head + chunk * BLOCK, LINE)
            matrix.load(4, blocks.keys[block] + chunk, stride)
            matrix.multiply(0, 4, 6)
            if n > 1:
                matrix.load(5, blocks.keys[block + 1] + chunk, stride)
                matrix.multiply(1, 5, 6)
            if n > 2:
                matrix.load(4, blocks.keys[block + 2] + chunk, stride)
                matrix.multiply(2, 4, 6)
            if n > 3:
                matrix.load(5, blocks.keys[block + 3] + chunk, stride)
                matrix.multiply(3, 5, 6)
        target = out + 4 * block * _TILE
        matrix.store(0, target, LINE)
        if n > 1:
            matrix.store(1, target + 4 * _TILE, LINE)
        if n > 2:
            matrix.store(2, target + 8 * _TILE, LINE)
        if n > 3:
            matrix.store(3, target + 12 * _TILE, LINE)


@body
def _bend(problem, slopes, scores, distances, n):
    """Scores times their scale, and what else they go through."""
    outer, is_ranked = problem.outer, problem.scoring.ranked == RANKED
    has_slopes, factor, slope = problem.scoring.slopes != 0, bias_factor(problem.scoring), load(slopes, 0)
    for key in range(n):
        value = load(scores, key * LANES) * splat(problem.scale)
        if outer > ZERO:
            value = quick_tanh(value) * splat(outer)
        if has_slopes:
            distance = splat(load_scalar(distances, key))
            if is_ranked:
                value = fma(bfloat16(slope * distance), splat(factor), value)
            else:
                value = fma(slope, distance, value)
        store(scores, key * LANES, value)


@body
def _weigh(scores, scale, n, pairs):
    """pairs [pair of keys, 16 queries] = 2^(scale * score - the largest of its query) of n keys; returns the largest scores
    and the sums of weights, of each query in its lane.
    """
    top, other = splat(LOWEST), splat(LOWEST)
    for key in range(0, n - 1, 2):
        top = larger(load(scores, key * LANES) * splat(scale), top)
        other = larger(load(scores, (key + 1) * LANES) * splat(scale), other)
    if n % 2 == 1:
        top = larger(load(scores, (n - 1) * LANES) * splat(scale), top)
    top = larger(other, top)
    # all scores may be -inf: these weights have to be 0 beside those of other chunks
    shift = where_up_to(top, splat(LOWEST), splat(ZERO), top)
    # of every fourth key, as `_weigh_few` has them
    zero = splat(ZERO)
    first, second, third, fourth = zero, zero, zero, zero
    for key in range(0, n // 4 * 4, 4):
        place = key * LANES
        low = weight_of(fence(load(scores, place) * splat(scale)) - shift, pairs)
        high = weight_of(fence(load(scores, place + LANES) * splat(scale)) - shift, pairs)
        store_pair(pairs, key // 2, LANES, 0, low, high)
        first, second = added(first, low), added(second, high)
        low = weight_of(fence(load(scores, place + 2 * LANES) * splat(scale)) - shift, pairs)
        high = weight_of(fence(load(scores, place + 3 * LANES) * splat(scale)) - shift, pairs)
        store_pair(pairs, key // 2 + 1, LANES, 0, low, high)
        third, fourth = added(third, low), added(fourth, high)
    n_left, place = n % 4, n // 4 * 4 * LANES
    if n_left > 0:
        low = weight_of(fence(load(scores, place) * splat(scale)) - shift, pairs)
        first, high = added(first, low), zero
        if n_left > 1:
            high = weight_of(fence(load(scores, place + LANES) * splat(scale)) - shift, pairs)
            second = added(second, high)
        store_pair(pairs, n // 4 * 2, LANES, 0, low, high)
    if n_left > 2:
        low = weight_of(fence(load(scores, place + 2 * LANES) * splat(scale)) - shift, pairs)
        store_pair(pairs, n // 4 * 2 + 1, LANES, 0, low, zero)
        third = added(third, low)
    return top, added(added(first, second), added(third, fourth))


@body
def _weigh_few(scores, scale, n, pairs):
    """`_weigh` of up to 4 queries, with the same bits: four keys in a vector. Lanes of others have what they may."""
    top = splat(LOWEST)
    for key in range(0, n, 4):
        value = load_quads(scores, key * LANES) * splat(scale)
        value = where_part(min(4 * (n - key), LANES), value, splat(LOWEST))
        store(scores, key * LANES, value)
        top = larger(value, top)
    top = larger(top, partner(top, 4))
    top = larger(top, partner(top, 8))
    shift = where_up_to(top, splat(LOWEST), splat(ZERO), top)
    total = splat(ZERO)
    for key in range(0, n, 4):
        weight = weight_of(load(scores, key * LANES) - shift, pairs)
        weight = where_part(min(4 * (n - key), LANES), weight, splat(ZERO))
        store_pair_quads(pairs, key // 2 * LANES, weight)
        total = added(total, weight)
    total = added(total, partner(total, 4))
    return top, added(total, partner(total, 8))


@body
def _pair_values(blocks, block, column, stride, again, is_wide, room):
    """Two blocks of values from a column on as tiles of pairs of keys, zeros where there is one, while what is read next is
    asked for."""
    n = min(blocks.n_blocks - block, 2)
    for half in range(n):
        first, ahead = blocks.values[block + half] + column, blocks.to_next[block + half]
        for pair in range(BLOCK // 2):
            here, target = first + 2 * pair * stride, shifted(room, (half * BLOCK // 2 + pair) * LANES)
            ask_ahead(here, ahead, again)
            ask_ahead(here + stride, ahead, again)
            put_pairs(here, here + stride, target, shifted(target, _TILE))
            if is_wide:
                ask_ahead(here + LINE, ahead, again)
                ask_ahead(here + LINE + stride, ahead, again)
                target = shifted(target, 2 * _TILE)
                put_pairs(here + LINE, here + LINE + stride, target, shifted(target, _TILE))
    if n == 1:
        for tile in range(4 if is_wide else 2):
            for place in range(_TILE // 2, _TILE, LANES):
                store(room, tile * _TILE + place, splat(ZERO))


@body
def _add_values(blocks, weights, units, tiles, sums, partial, row, n_queries):
    """partial[query, :] = the weighted values, 64 channels at a time; tiles, sums: room for 4 tiles, and for all sums."""
    stride, own, paired = 4 * units, address_of(weights), address_of(tiles)
    again, size = again_of(blocks.values, blocks.n_blocks, BLOCK * stride), 4 * _TILE
    for block in range(0, blocks.n_blocks, 2):
        is_last = block + 2 >= blocks.n_blocks
        for column in range(0, stride, 2 * LINE):
            is_wide = column + LINE < stride
            # values are read in the order of memory, so that sums of more channels than registers have come and go
            there, stays = address_of(sums) + column // LINE * 2 * size, stride <= 2 * LINE
            if block == 0:
                matrix.clear(0)
                matrix.clear(1)
                matrix.clear(2)
                matrix.clear(3)
            elif not stays:
                matrix.load(0, there, LINE)
                matrix.load(1, there + size, LINE)
                matrix.load(2, there + 2 * size, LINE)
                matrix.load(3, there + 3 * size, LINE)
            _pair_values(blocks, block, column, stride, again, is_wide, tiles)
            matrix.load(4, own + block // 2 * size, LINE)
            matrix.load(5, paired, LINE)
            matrix.multiply(0, 4, 5)
            matrix.load(6, paired + size, LINE)
            matrix.multiply(1, 4, 6)
            if is_wide:
                matrix.load(5, paired + 2 * size, LINE)
                matrix.multiply(2, 4, 5)
                matrix.load(6, paired + 3 * size, LINE)
                matrix.multiply(3, 4, 6)
            if is_last or not stays:
                matrix.store(0, there, LINE)
                matrix.store(1, there + size, LINE)
                if is_wide:
                    matrix.store(2, there + 2 * size, LINE)
                    matrix.store(3, there + 3 * size, LINE)
    for tile in range(0, units // LANES * 2, 2):
        for i in range(n_queries):
            even = shifted(sums, tile * _TILE + i * LANES)
            put_in_order(even, shifted(even, _TILE), shifted(partial, i * row + tile * LANES))


@body
def attend_in_tiles(problem, blocks, distances, query, n_queries, room, partial, row):
    """As `chunk.attend_blocks`, of up to 16 queries, over keys and values that are bfloat16 as the queries are.

    The thread has tiles of 16 rows of 64 bytes. room: pointer to QUERIES (4 padded + 2 MAX_KEYS) elements.
    """
    size, padded = problem.cache.size, problem.padded
    units = padded // 2
    rows = floats_at(address_of(room))
    queries = shifted(rows, QUERIES * units)
    pairs = shifted(queries, QUERIES * units)
    weights = shifted(pairs, QUERIES * MAX_KEYS // 2)
    sums = shifted(weights, QUERIES * MAX_KEYS // 2)
    scores, slopes, tiles = stack_floats(16 * 256), stack_floats(16), stack_floats(4 * 256)
    for i in range(n_queries):
        copy_row(query_of(problem, blocks.kv_head, query + i), size, ONE, shifted(room, i * padded), padded)
        head = blocks.kv_head * problem.group + (query + i) % problem.group
        store_scalar(slopes, i, slope_of(problem.scoring, head))
    for unit in range(0, units, LANES):
        transpose_block(shifted(rows, unit), units, shifted(queries, unit * LANES), LANES)
    _score(blocks, queries, units, scores)
    units_of_pairs, scale, n = as_units(pairs, room), problem.scale, blocks.n
    if problem.outer > ZERO or problem.scoring.slopes != 0:
        _bend(problem, slopes, scores, distances, n)
        scale = ONE
    top, total = (
        _weigh_few(scores, scale, n, units_of_pairs)
        if n_queries <= _FEW
        else _weigh(scores, scale, n, units_of_pairs)
    )
    for i in range(n_queries):
        stats = shifted(partial, i * row + padded)
        store_scalar(stats, MAX, lane(top, i))
        store_scalar(stats, SUM, lane(total, i))
    # keys behind n have no weight
    for pair in range((n + 1) // 2, (n + 2 * _PAIRS - 1) // (2 * _PAIRS) * _PAIRS):
        store_pair(units_of_pairs, pair, LANES, 0, splat(ZERO), splat(ZERO))
    for block in range(0, blocks.n_blocks, 2):
        place = block // 2 * _TILE
        transpose_block(shifted(pairs, place), LANES, shifted(weights, place), LANES)
    _add_values(blocks, weights, units, tiles, sums, partial, row, n_queries)
