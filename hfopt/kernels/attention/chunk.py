"""A chunk of keys of decode attention: the unfinished softmax of all queries that read it.

While the keys of a chunk are read its values are asked for, and with them the next chunk's keys, so that the
memory is never idle.
"""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.jit.parallel import body, inlined
from hfopt.kernels.simd.pointer import (
    address_of,
    as_units,
    bytes_at,
    floats_at,
    load,
    load_part,
    load_scalar,
    pointer_as,
    prefetch,
    shifted,
    store,
    store_part,
    store_scalar,
)
from hfopt.kernels.simd.tile import stack_addresses, stack_floats, units_ratio
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import absolute, fma, lane, larger, splat

from .blocks import MOST_KEYS, list_blocks, rows_alike, stack_factors
from .cache_view import key_of
from .elements import BLOCK, takes_integers
from .lanes import (
    largest_weight,
    load_key_factors,
    pack_digits,
    pack_query,
    partner,
    store_integers,
    where_keys,
)
from .pack import absmax, copy_row
from .scores import score_tile
from .tile import weight_of, where_up_to
from .values import tile_columns, weigh_tile

MAX, SUM, SEEN = range(3)  # behind the weighted values of a query and chunk
_TILE = 4  # queries of a tile, if there are more than one
TOGETHER = 8  # queries that are worked on together, in two tiles
_LINE = 64  # bytes of a cache line
_BLOCKS = 2  # blocks of long values, of which one pass takes some columns, and which the L1 cache holds
_NOTHING = np.float32(-np.inf)
_LARGEST = np.finfo(np.float32).max
_SHORT = np.float32(32767.0)
_SUM = np.float32(2147483520.0)  # below 2^31
_CODE = np.float32(127.0)
_NAN = np.float32(np.nan)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


class Item(NamedTuple):
    """A span of chunks of a stream."""

    segment: Any
    in_trunk: Any
    row: Any  # physical, in the trunk
    kv_head: Any
    begin: Any  # places of the rows that read it: begin ... end
    end: Any
    first: Any  # chunk
    last: Any  # chunk behind it
    slot: Any  # of the partials of a query


class _Blocks(NamedTuple):
    """Keys and values of a key head, in blocks."""

    kv_head: Any
    like: Any  # a pointer to their elements
    keys: Any  # addresses
    values: Any
    n_blocks: Any
    n: Any  # keys
    to_values: Any  # bytes from keys to what is read next
    to_next: Any  # and from values


@body
def weigh_scores(scores, n_vectors, width, n, scale, factors, like, weights, next_line):
    """weights = 2^(scale * scores - max) for n keys of a tile of queries; maxima, sums, and largest weights, each in all
    lanes of its query.

    like: units of a weight; weights may be the scores. factors: see `attend_blocks`; keys' are applied to scores, and those
    of values to the weights, after these are summed up; largest weights are found of these. next_line: address of what is
    read next, asked for here, as nothing else is read.
    """
    ahead = bytes_at(next_line)
    top = splat(_NOTHING)
    n_whole = n // width
    for v in range(n_whole):
        value = load(scores, v * LANES) * splat(scale)
        if factors is not None:
            value = value * load_key_factors(factors, v * width, width)
            prefetch(ahead, v * _LINE)
        store(scores, v * LANES, value)
        top = larger(value, top)
    for v in range(n_whole, n_vectors):
        value = load(scores, v * LANES) * splat(scale)
        if factors is not None:
            value = value * load_key_factors(factors, v * width, width)
        value = where_keys(n - v * width, width, value, splat(_NOTHING))
        store(scores, v * LANES, value)
        top = larger(value, top)
    top = larger(top, partner(top, 1))
    top = larger(top, partner(top, 2))
    if width > 4:
        top = larger(top, partner(top, 4))
        top = larger(top, partner(top, 8))
    # all scores may be -inf: these weights have to be 0 beside those of other chunks
    shift = where_up_to(top, splat(_NOTHING), splat(_ZERO), top)
    total, largest = splat(_ZERO), splat(_ZERO)
    for v in range(n_vectors):
        value = weight_of(load(scores, v * LANES) - shift, like)
        total = total + value
        if factors is not None:
            value = value * load_key_factors(factors, MOST_KEYS + v * width, width)
            largest = largest_weight(value, largest)
            prefetch(ahead, (n_vectors + v) * _LINE)
        store(weights, v * LANES, value)
    total = total + partner(total, 1)
    total = total + partner(total, 2)
    if width > 4:
        total = total + partner(total, 4)
        total = total + partner(total, 8)
    return top, total, largest


@body
def round_query(source, size, padded, out):
    """out[padded] = source / factor as 16-bit integers, so large that no product with codes overflows; returns the factor.

    NaN for a query that is not finite.
    """
    most = absmax(source, size)
    limit = min(_SHORT, np.floor(_SUM / (_CODE * np.float32(size))))
    is_finite = most <= _LARGEST
    scale = splat(min(limit / most, _LARGEST) if is_finite else _ZERO)
    for k in range(0, padded, LANES):
        value = load(source, k) if k + LANES <= size else load_part(source, k, max(size - k, 0))
        value = where_up_to(absolute(value), splat(_LARGEST), value, splat(_ZERO))
        store_integers(out, k, value * scale)
    return most / limit if is_finite else _NAN


@body
def round_weights(weights, largest, n_vectors, width, out):
    """out = weights / factors of a tile as 16-bit integers, in their order; the factors, each in all lanes of its query.

    So small that the sum of a chunk's products with codes does not overflow. NaN for weights that hold NaN.
    """
    top = largest_weight(largest, partner(largest, 1))
    top = largest_weight(top, partner(top, 2))
    if width > 4:
        top = largest_weight(top, partner(top, 4))
        top = largest_weight(top, partner(top, 8))
    # infinite for weights of 0, for which any number will do; the other way round for NaN
    scale = splat(_SHORT) / top
    scale = where_up_to(scale, splat(_LARGEST), scale, splat(_ZERO))
    for v in range(n_vectors):
        store_integers(out, v * LANES, load(weights, v * LANES) * scale)
    return top * splat(_ONE / _SHORT)


@inlined
def weigh_values(weights, factors, queries, like, values, n_blocks, units, ahead, out, out_row, n_valid):
    """out[i, :] = sum over keys of weights[key, i] values[key, :] for the first n_valid queries of a tile.

    like: a pointer to elements of the values; factors: see `weigh_tile`.
    """
    p = as_units(weights, weights)
    ratio = units_ratio(weights)
    columns = tile_columns(p, 2) if queries == 1 else tile_columns(p, 1)
    step = n_blocks if units * ratio <= columns else _BLOCKS
    for block in range(0, n_blocks, step):
        n = min(n_blocks - block, step)
        here = shifted(values, block)
        w = as_units(shifted(weights, block * queries * LANES), weights)
        more = block > 0
        at = 0
        while at < units:
            left = (units - at) * ratio
            to = shifted(out, at * ratio)
            if queries == 1 and left >= columns:
                weigh_tile(w, factors, like, here, n, units, at, ahead, to, out_row, n_valid, more, 1, 2)
                at += columns // ratio
            elif queries == 1 and left >= tile_columns(p, 1):
                weigh_tile(w, factors, like, here, n, units, at, ahead, to, out_row, n_valid, more, 1, 1)
                at += tile_columns(p, 1) // ratio
            elif queries == 1:
                weigh_tile(w, factors, like, here, n, units, at, ahead, to, out_row, n_valid, more, 1, 0)
                at += LANES
            elif left >= columns:
                weigh_tile(w, factors, like, here, n, units, at, ahead, to, out_row, n_valid, more, 4, 1)
                at += columns // ratio
            else:
                weigh_tile(w, factors, like, here, n, units, at, ahead, to, out_row, n_valid, more, 4, 0)
                at += LANES


@body
def query_of(problem, kv_head, number):
    """Pointer to a query of a key head, numbered over all places."""
    place, member = number // problem.group, number % problem.group
    head = kv_head * problem.group + member
    return shifted(problem.q, problem.order[place] * problem.q_row + head * problem.cache.size)


@inlined
def attend_blocks(problem, blocks, factors, query, n_queries, room, partial, row):
    """Unfinished softmax of n_queries <= 8 queries of a key head, from number `query` on, over some blocks.

    factors: scales of the keys, and MOST_KEYS behind them of the values; None if they are no codes. partial: where the first
    one is left, and `row` floats behind it the next.
    """
    size, padded = problem.cache.size, problem.padded
    scores = stack_floats(8 * 256)
    packed = room
    weights = shifted(packed, TOGETHER * padded)
    filled = shifted(weights, TOGETHER * MOST_KEYS)
    queries = 1 if n_queries == 1 else _TILE
    tiles = (n_queries + _TILE - 1) // _TILE
    width = LANES // queries
    units = padded // units_ratio(room)
    steps = units // width
    n_blocks, n, like = blocks.n_blocks, blocks.n, blocks.like
    query_factors, weight_factors = stack_floats(2 * 16), stack_floats(2 * 16)
    for i in range(n_queries):
        source = query_of(problem, blocks.kv_head, query + i)
        is_packed = False
        if factors is not None:
            is_packed = takes_integers(room, like)
            if is_packed:
                factor = splat(round_query(source, size, padded, filled))
                store_part(query_factors, i * width, width, factor)
                source = filled
        if size != padded and not is_packed:
            copy_row(source, size, _ONE, filled, padded)
            source = filled
        target = as_units(shifted(packed, i // _TILE * _TILE * padded), packed)
        if queries == 1:
            pack_query(source, steps, target, 0, 1)
        elif is_packed:
            pack_digits(source, steps, target, i % _TILE)
        else:
            pack_query(source, steps, target, i % _TILE, 4)

    q = as_units(packed, packed)
    n_vectors = n_blocks * queries
    span = n_vectors * LANES
    if queries == 1:
        score_tile(
            q, query_factors, steps, like, blocks.keys, n_blocks, units, blocks.to_values, scores, span, 1, 1
        )
    elif tiles == 1:
        score_tile(
            q, query_factors, steps, like, blocks.keys, n_blocks, units, blocks.to_values, scores, span, 4, 1
        )
    else:
        score_tile(
            q, query_factors, steps, like, blocks.keys, n_blocks, units, blocks.to_values, scores, span, 4, 2
        )
    for tile in range(tiles):
        first = tile * _TILE
        w = shifted(weights, tile * span)
        here, like_weights = shifted(scores, tile * span), as_units(weights, weights)
        is_rounded = False
        if factors is not None:
            is_rounded = takes_integers(room, like)
        following = blocks.values[0] + blocks.to_next
        scoring = n_vectors, width, n, problem.scale, factors, like_weights
        if is_rounded:
            top, total, largest = weigh_scores(here, *scoring, here, following)
            store(weight_factors, tile * LANES, round_weights(here, largest, n_vectors, width, w))
        else:
            top, total, _ = weigh_scores(here, *scoring, w, following)
        for i in range(min(n_queries - first, _TILE)):
            stats = shifted(partial, (first + i) * row + padded)
            store_scalar(stats, MAX, lane(top, i * width))
            store_scalar(stats, SUM, lane(total, i * width))
    for tile in range(tiles):
        first = tile * _TILE
        w, here = shifted(weights, tile * span), shifted(partial, first * row)
        n_left, ahead = n_queries - first, blocks.to_next
        own_factors, kind = shifted(weight_factors, tile * LANES), (queries, like)
        weigh_values(w, own_factors, *kind, blocks.values, n_blocks, units, ahead, here, row, n_left)


@inlined
def merge_partial(fresh, partial, size, like):
    """Adds the unfinished softmax `fresh` of other keys of a query to `partial`. like: units of a weight."""
    here, there = shifted(fresh, size), shifted(partial, size)
    largest, known, seen = load_scalar(here, MAX), load_scalar(there, MAX), load_scalar(there, SEEN) > _ZERO
    if seen and not largest > known:
        largest = known
    shift = _ZERO if largest == _NOTHING else largest
    new = weight_of(splat(load_scalar(here, MAX) - shift), like)
    total = lane(new, 0) * load_scalar(here, SUM)
    if seen:
        old = weight_of(splat(known - shift), like)
        total += lane(old, 0) * load_scalar(there, SUM)
        for column in range(0, size, LANES):
            store(partial, column, fma(old, load(partial, column), new * load(fresh, column)))
    else:
        for column in range(0, size, LANES):
            store(partial, column, new * load(fresh, column))
    store_scalar(there, MAX, largest)
    store_scalar(there, SUM, total)
    store_scalar(there, SEEN, _ONE)


@inlined
def attend_chunk(problem, item, chunk, next_key, room):
    """One chunk of a span, for all rows that read it; next_key: address of the key that is read after that, or 0."""
    plan, size, segment = problem.plan, problem.cache.size, item.segment
    first = chunk * plan.chunk
    n = min(segment.n_tokens - first, plan.chunk)
    keys, values = stack_addresses(16), stack_addresses(16)
    partial_size = problem.padded + LANES
    fresh = floats_at(address_of(room))
    held = shifted(room, TOGETHER * partial_size * units_ratio(room))
    scratch = shifted(held, 2 * plan.chunk * problem.padded)
    held = pointer_as(held, segment.keys)
    factors = stack_factors(segment.scales)
    here = address_of(key_of(segment, item.row, item.kv_head, first, size))
    to_values = address_of(shifted(segment.keys, segment.to_values)) - address_of(segment.keys)
    to_next = next_key - here - to_values if next_key != 0 else 0
    begin, end = item.begin, item.end
    together = max(end - begin, 1) if rows_alike(problem, begin, end, first, n) else 1
    n_slots = plan.trunk.n_spans + plan.branch.n_spans
    row = n_slots * partial_size
    for place in range(begin, end, together):
        n_seen = list_blocks(problem, item, segment.scales, place, first, n, keys, values, held, factors)
        n_blocks = (n_seen + BLOCK - 1) // BLOCK
        kinds = item.kv_head, segment.keys
        blocks = _Blocks(*kinds, keys, values, n_blocks, n_seen, to_values, to_next)
        query, last = place * problem.group, (place + together) * problem.group
        while query < last:
            partial = (item.kv_head * problem.n_rows * problem.group + query) * row + item.slot * partial_size
            partial = shifted(problem.partials, partial)
            count = min(last - query, TOGETHER)
            if chunk == item.first:
                for i in range(count):
                    store_scalar(
                        shifted(partial, i * row + problem.padded), SEEN, _ONE if n_seen > 0 else _ZERO
                    )
                if n_seen > 0:
                    attend_blocks(problem, blocks, factors, query, count, scratch, partial, row)
            elif n_seen > 0:
                attend_blocks(problem, blocks, factors, query, count, scratch, fresh, partial_size)
                for i in range(count):
                    source, target = shifted(fresh, i * partial_size), shifted(partial, i * row)
                    merge_partial(source, target, problem.padded, as_units(room, room))
            query += count
