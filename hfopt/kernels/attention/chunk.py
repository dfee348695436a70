"""A chunk of keys of decode attention: the unfinished softmax of all queries that read it.

While the keys of a chunk are read its values are asked for, and with them the next chunk's keys, so that the
memory is never idle.
"""

from typing import Any, NamedTuple

from hfopt.kernels.attention.blocks import MAX_KEYS, list_blocks, query_of, rows_alike, stack_factors
from hfopt.kernels.attention.cache_view import key_of
from hfopt.kernels.attention.elements import BLOCK, takes_integers
from hfopt.kernels.attention.lanes import (
    pack_digits,
    pack_query,
)
from hfopt.kernels.attention.matrix_chunk import QUERIES, attend_in_tiles
from hfopt.kernels.attention.pack import copy_row
from hfopt.kernels.attention.partials import MAX, SEEN, SUM, merge_partial
from hfopt.kernels.attention.scores import score_tile
from hfopt.kernels.attention.scoring import RANKED, bias_factor, slope_of
from hfopt.kernels.attention.weights import Bent, round_query, round_weights, weigh_scores, weigh_values
from hfopt.kernels.jit.parallel import inlined
from hfopt.kernels.simd.constants import ONE, ZERO
from hfopt.kernels.simd.matrix import has_tiles
from hfopt.kernels.simd.memory import store, store_part, store_scalar
from hfopt.kernels.simd.pointer import (
    address_of,
    as_gathered,
    as_units,
    floats_at,
    item_bytes,
    pointer_as,
    shifted,
)
from hfopt.kernels.simd.tile import stack_addresses, stack_floats, units_ratio
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import lane, splat

_TILE = 4  # queries of a tile, if there are more than one
_TOGETHER = 8  # queries that are worked on together, in two tiles


class Item(NamedTuple):
    """A span of chunks of a stream."""

    segment: Any
    in_prefix: Any
    row: Any  # physical, in the prefix
    kv_head: Any  # the first one
    end_head: Any  # the one behind the last, whose keys of a chunk are read one after the other
    begin: Any  # places of the rows that read it: begin ... end
    end: Any
    first: Any  # chunk
    last: Any  # chunk behind it
    slot: Any  # of the partials of a query


class Following(NamedTuple):
    """Keys of the suffix that are read next."""

    place: Any
    kv_head: Any
    first: Any  # token
    end: Any  # token behind the last one; none is read if it is the first


class _Blocks(NamedTuple):
    """Keys and values of a key head, in blocks."""

    kv_head: Any
    like: Any  # a pointer to their elements, as tiles read them
    keys: Any  # addresses
    values: Any
    n_blocks: Any
    n: Any  # keys
    to_values: Any  # bytes from keys to what is read next
    to_next: Any  # and from values, of each block


@inlined
def attend_blocks(problem, blocks, factors, distances, query, n_queries, is_alone, room, partial, row):
    """Unfinished softmax of n_queries <= 8 queries of a key head, from number `query` on, over some blocks.

    is_alone: whether there is one, and it is not to be worked on in a tile, which sums in another order.

    factors: scales of the keys, and MAX_KEYS behind them of the values; None if they are no codes. distances: see
    `list_blocks`. partial: where the first one is left, and `row` floats behind it the next.
    """
    size, padded = problem.cache.size, problem.padded
    scores = stack_floats(8 * 256)
    packed = room
    weights = shifted(packed, _TOGETHER * padded)
    filled = shifted(weights, _TOGETHER * MAX_KEYS)
    queries = 1 if is_alone else _TILE
    tiles = (n_queries + _TILE - 1) // _TILE
    width = LANES // queries
    units = padded // units_ratio(room)
    steps = units // width
    n_blocks, n, like = blocks.n_blocks, blocks.n, blocks.like
    query_factors, weight_factors = stack_floats(2 * 16), stack_floats(2 * 16)
    slopes, has_slopes = stack_floats(2 * 16), problem.scoring.slopes != 0
    ranks = problem.scoring.ranked == RANKED, bias_factor(problem.scoring)
    for i in range(n_queries):
        if has_slopes:
            head = blocks.kv_head * problem.group + (query + i) % problem.group
            store_part(slopes, i * width, width, splat(slope_of(problem.scoring, head)))
        elements = query_of(problem, blocks.kv_head, query + i)
        source = pointer_as(elements, filled)
        is_packed = False
        if factors is not None:
            is_packed = takes_integers(room, like)
            if is_packed:
                factor = splat(round_query(elements, size, padded, filled))
                store_part(query_factors, i * width, width, factor)
                source = filled
        if (size != padded or item_bytes(elements) != item_bytes(filled)) and not is_packed:
            copy_row(elements, size, ONE, filled, padded)
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
        following = blocks.values[0] + blocks.to_next[0]
        bent = Bent(problem.outer, has_slopes, shifted(slopes, tile * LANES), distances, *ranks)
        scoring = n_vectors, width, n, problem.scale, factors, like_weights, bent
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
        n_left, aheads = n_queries - first, blocks.to_next
        own_factors, kind = shifted(weight_factors, tile * LANES), (queries, like)
        weigh_values(w, own_factors, *kind, blocks.values, n_blocks, units, aheads, here, row, n_left)


@inlined
def attend_chunk(problem, item, chunk, following, next_key, room):
    """One chunk of a span of the first head of an item, for all rows that read it.

    following: the `Following` in the suffix; next_key: address of the key that is read next in the prefix, or 0.
    """
    plan, size, segment = problem.plan, problem.cache.size, item.segment
    first = chunk * plan.chunk
    n = min(segment.n_tokens - first, plan.chunk)
    keys, values, aheads = stack_addresses(16), stack_addresses(16), stack_addresses(16)
    partial_size = problem.padded + LANES
    fresh = floats_at(address_of(room))
    held = shifted(room, QUERIES * partial_size * units_ratio(room))
    scratch = shifted(held, 2 * plan.chunk * problem.padded)
    held = as_gathered(held, segment.keys)
    factors, distances = stack_factors(segment.scales), stack_floats(2 * 256 + 16)
    begins = address_of(key_of(segment, item.row, item.kv_head, first, size))
    to_values = address_of(shifted(segment.keys, segment.to_values)) - address_of(segment.keys)
    to_next = next_key - begins - to_values if next_key != 0 else 0
    begin, end, n_places = item.begin, item.end, problem.n_rows * problem.n_steps
    together = max(end - begin, 1) if rows_alike(problem, begin, end, first, n) else 1
    n_slots = plan.prefix.n_spans + plan.suffix.n_spans
    row = n_slots * partial_size
    for place in range(begin, end, together):
        lists = keys, values, aheads, held, factors, distances
        n_seen = list_blocks(problem, item, segment.scales, place, first, n, following, to_next, *lists)
        n_blocks = (n_seen + BLOCK - 1) // BLOCK
        kinds = item.kv_head, held
        blocks = _Blocks(*kinds, keys, values, n_blocks, n_seen, to_values, aheads)
        query, last = place * problem.group, (place + together) * problem.group
        # a step alone would work on one query by itself
        of_step = problem.group if problem.n_steps > 1 else last - query
        in_tiles = has_tiles(held)
        most = QUERIES if in_tiles else _TOGETHER
        has_last_alone = of_step % most == 1
        while query < last:
            partial = (item.kv_head * n_places * problem.group + query) * row + item.slot * partial_size
            partial = shifted(problem.partials, partial)
            n_left = of_step - (query - place * problem.group) % of_step if has_last_alone else last - query
            count = min(n_left, most)
            is_alone = has_last_alone and count == 1
            is_first = chunk == item.first
            here, step = (partial, row) if is_first else (fresh, partial_size)
            if is_first:
                for i in range(count):
                    store_scalar(
                        shifted(partial, i * row + problem.padded), SEEN, ONE if n_seen > 0 else ZERO
                    )
            if n_seen > 0:
                if in_tiles and not is_alone:
                    attend_in_tiles(problem, blocks, distances, query, count, scratch, here, step)
                else:
                    attend_blocks(
                        problem, blocks, factors, distances, query, count, is_alone, scratch, here, step
                    )
            if n_seen > 0 and not is_first:
                for i in range(count):
                    source, target = shifted(fresh, i * partial_size), shifted(partial, i * row)
                    merge_partial(source, target, problem.padded, as_units(room, room))
            query += count
