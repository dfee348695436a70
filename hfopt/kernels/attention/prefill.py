"""Prefill attention: several new tokens a row, in blocks of keys with an online softmax
(https://arxiv.org/abs/2205.14135).

Queries lie along the lanes of vectors: a *tile* is up to 48 of them, the query heads of one key head at some
positions. So keys and values are read a number at a time, as they are, and the softmax needs nothing across lanes:

    scores[key, query] = sum over channels of keys[key, channel] queries[channel, query]
    sums[channel, query] = sum over keys of values[key, channel] weights[key, query]

In bfloat16 both products run on pairs of neighbours (channels, then keys), and weights are rounded to bfloat16.
An item of work is some tiles of one key head; threads take items until none is left. Each query meets the blocks of
keys in order, whatever the items are, so the bits depend on nothing else.
"""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.attention.bend import bend_scores, powers_of
from hfopt.kernels.attention.cache_view import holds, open_cache, valid_rows
from hfopt.kernels.attention.matrix_block import take_tiles
from hfopt.kernels.attention.pack import BLOCK, find_keys, pack_queries, pack_values, rounded
from hfopt.kernels.attention.scoring import RANKED, Scoring, sink_of, slope_of
from hfopt.kernels.attention.seen import Seen, first_key, hide, last_key, origin_of, sees_any, visible_part
from hfopt.kernels.attention.softmax import (
    LIMIT,
    SLOPE,
    STATS,
    TILE,
    TOP,
    TOTAL,
    add_infinite,
    add_values,
    score_keys,
    weigh_keys,
)
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, next_index, parallel_for, threads_for, usable_threads
from hfopt.kernels.simd import matrix
from hfopt.kernels.simd.constants import LINE, LOWEST, ONE, ZERO
from hfopt.kernels.simd.memory import load, load_scalar, store, store_part, store_scalar
from hfopt.kernels.simd.pointer import (
    address_as,
    address_of,
    as_packed,
    as_units,
    floats_at,
    integers_at,
    pointer,
    shifted,
)
from hfopt.kernels.simd.tile import transpose_block, units_ratio
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import splat

_ITEM_FLOATS = 3 << 16  # of the queries and sums of an item, which stay in an L2 cache
_ITEMS = 4  # of a thread at least, if there are as many tiles: threads should end together
_PARALLEL_SIZE = 1 << 17  # multiply-adds; below, more threads cost more than they save


class _Plan(NamedTuple):
    """How the work is split."""

    n_tiles: Any  # of a row and key head
    n_parts: Any  # items that they make
    threads: Any
    room: Any  # floats of scratch of a thread


@body
def finish_tile(sums, stats, seen, n_heads, row, kv_head, group, q_begin, q_end, width, size, rows, out):
    """out = sums / totals; 0 for a query that saw no key. rows: room for 16 rows."""
    padded = rounded(size, LANES)
    for column in range(0, width, LANES):
        for channel in range(0, padded, LANES):
            source = shifted(sums, channel * width + column)
            transpose_block(source, width, shifted(rows, channel), padded)
        for i in range(min(q_end - q_begin - column, LANES)):
            position, head = (q_begin + column + i) // group, (q_begin + column + i) % group
            total = load_scalar(stats, TOTAL * TILE + column + i)
            inverse = ONE / total
            # a query may also have seen keys of which none has a weight: NaN is the answer then
            if total == ZERO and not sees_any(seen, row, position):
                inverse = ZERO
            token = (row * seen.n_new + position) * n_heads + kv_head * group + head
            target = shifted(out, token * size)
            for k in range(0, size, LANES):
                store_part(target, k, min(size - k, LANES), load(rows, i * padded + k) * splat(inverse))


@body
def start_tile(qkv, scoring, power, first_head, group, q_begin, q_end, width, size, sums, stats):
    """Sums and statistics of a tile that has seen nothing but sinks; power: by which its scores are weighed."""
    for place in range(0, rounded(size, LANES) * width, LANES):
        store(sums, place, splat(ZERO))
    for i in range(width):
        q = min(q_begin + i, q_end - 1)
        head = first_head + q % group
        sink = sink_of(scoring, head, qkv)
        store_scalar(stats, TOP * TILE + i, LOWEST if sink == LOWEST else sink / power)
        store_scalar(stats, TOTAL * TILE + i, ZERO if sink == LOWEST else ONE)
        store_scalar(stats, LIMIT * TILE + i, np.float32(q // group - q_begin // group))
        store_scalar(stats, SLOPE * TILE + i, slope_of(scoring, head))


@body
def tile_place(tile, n_queries):
    """(first query, end of its queries, lanes) of a tile."""
    q_begin = tile * TILE
    q_end = min(q_begin + TILE, n_queries)
    return q_begin, q_end, rounded(q_end - q_begin, LANES)


@body
def scratch(n_tiles, size, p):
    """Floats of scratch of an item: (queries, sums and statistics of n_tiles tiles; scores, keys, values; rows)."""
    units = rounded(size, LANES * units_ratio(p)) // units_ratio(p)
    channels = rounded(size, LANES)
    keys = BLOCK * units_ratio(p)
    return (
        n_tiles * TILE * units,
        n_tiles * TILE * channels,
        n_tiles * TILE * STATS,
        keys * TILE,
        keys * units,
        BLOCK * channels,
        LANES * channels,
    )


@body
def attend_item(qkv, qkv_row, cache, seen, scoring, n_heads, row, kv_head, begin, end, room, out):
    """One item: tiles begin to end of one row and key head. room: as `scratch` says."""
    size, n_new, scales = cache.size, seen.n_new, cache.prefix.scales
    group = n_heads // cache.n_kv_heads
    n_queries, n_past = n_new * group, seen.n_keys - n_new
    per_unit = units_ratio(qkv)
    units, channels = rounded(size, LANES * per_unit) // per_unit, rounded(size, LANES)
    sizes = scratch(end - begin, size, qkv)
    sums = shifted(room, sizes[0])
    stats = shifted(sums, sizes[1])
    scores = shifted(stats, sizes[2])
    key_room = shifted(scores, sizes[3])
    value_room = shifted(key_room, sizes[4])
    rows = shifted(value_room, sizes[5])
    queries, weights, values = as_units(room, qkv), as_units(scores, qkv), as_units(value_room, qkv)
    key_rows, query_rows = as_packed(key_room, qkv), as_packed(rows, qkv)

    powers = powers_of(scoring)
    origin = origin_of(seen, row) if scoring.ranked == RANKED else 0
    for tile in range(begin, end):
        q_begin, q_end, width = tile_place(tile, n_queries)
        place = (tile - begin) * TILE
        target = shifted(queries, place * units)
        pack_queries(
            qkv,
            qkv_row,
            n_new,
            row,
            kv_head,
            group,
            q_begin,
            q_end,
            width,
            size,
            powers.sign,
            query_rows,
            target,
        )
        own_sums, own_stats = shifted(sums, place * channels), shifted(stats, place * STATS)
        heads = kv_head * group, group
        start_tile(qkv, scoring, powers.rest, *heads, q_begin, q_end, width, size, own_sums, own_stats)

    step = BLOCK * per_unit
    last = last_key(seen, (tile_place(end - 1, n_queries)[1] - 1) // group)
    for first in range(first_key(seen, begin * TILE // group) // step * step, last, step):
        n = min(last - first, step)
        packed, finite = False, True
        keys, stride = key_rows, size
        for tile in range(begin, end):
            q_begin, q_end, width = tile_place(tile, n_queries)
            t_begin, t_end = q_begin // group, (q_end - 1) // group + 1
            part = visible_part(seen, row, t_begin, t_end, first, n)
            if part.end == 0:
                continue
            if not packed:
                keys, stride = find_keys(cache, scales, row, kv_head, first, n, size, key_rows)
                finite = pack_values(cache, scales, row, kv_head, first, n, size, False, values)
                if not finite:
                    pack_values(cache, scales, row, kv_head, first, n, size, True, values)
                packed = True
            place = (tile - begin) * TILE
            own_sums, own_stats = shifted(sums, place * channels), shifted(stats, place * STATS)
            own, offset = part.end, first - n_past - t_begin
            block = as_units(keys, qkv)
            score_keys(shifted(queries, place * units), width, block, stride // per_unit, size, own, scores)
            bend_scores(scores, width, own, powers, scoring, offset, first - origin, own_stats)
            limits = shifted(own_stats, LIMIT * TILE)
            hide(scores, width, part, seen, row, group, q_begin, q_end, first, offset, limits)
            weigh_keys(scores, width, own, powers.rest, weights, own_sums, size, own_stats)
            add_values(weights, width, own, values, size, own_sums)
            if not finite:
                add_infinite(weights, width, own, cache, scales, row, kv_head, first, size, own_sums)

    for tile in range(begin, end):
        q_begin, q_end, width = tile_place(tile, n_queries)
        place = (tile - begin) * TILE
        own_sums, own_stats = shifted(sums, place * channels), shifted(stats, place * STATS)
        finish_tile(
            own_sums, own_stats, seen, n_heads, row, kv_head, group, q_begin, q_end, width, size, rows, out
        )


@body
def _attend_task(worker, counter, plan, qkv, qkv_row, n_rows, cache, seen, scoring, n_heads, room, out):
    n_sequences = n_rows * cache.n_kv_heads
    n_parts, n_tiles = plan.n_parts, plan.n_tiles
    here = shifted(room, worker * plan.room)
    if matrix.has_tiles(qkv):
        take_tiles()
    while True:
        item = next_index(counter)
        if item >= n_parts * n_sequences:
            break
        # the last positions see most keys: long items first, so that short ones fill up the end
        part, index = n_parts - 1 - item // n_sequences, item % n_sequences
        row, kv_head = index // cache.n_kv_heads, index % cache.n_kv_heads
        begin, end = part * n_tiles // n_parts, (part + 1) * n_tiles // n_parts
        attend_item(qkv, qkv_row, cache, seen, scoring, n_heads, row, kv_head, begin, end, here, out)
    if matrix.has_tiles(qkv):
        matrix.release()


@body
def _plan(like, n_rows, n_new, n_heads, n_kv_heads, size, threads):
    n_sequences = n_rows * n_kv_heads
    n_tiles = (n_new * (n_heads // n_kv_heads) + TILE - 1) // TILE
    threads = max(min(threads, n_sequences * n_tiles), 1)
    most = max(_ITEM_FLOATS // (2 * TILE * size), 1)
    item_tiles = min(n_sequences * n_tiles // (_ITEMS * threads) + 1, most)
    n_parts = (n_tiles + item_tiles - 1) // item_tiles
    sizes = scratch((n_tiles + n_parts - 1) // n_parts, size, like)
    n_floats = sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4] + sizes[5] + sizes[6]  # whole cache lines
    return _Plan(n_tiles, n_parts, threads, n_floats)


@body
def plan_tokens(like, cache, n_rows, n_new, n_heads, threads):
    """How `attend_tokens` is to do its work, on no more than so many threads; like: a pointer as to the queries."""
    n_keys = cache.prefix.n_tokens + cache.suffix.n_tokens
    work = n_rows * n_new * n_heads * n_keys * cache.size
    threads = min(threads, threads_for(threads, work, _PARALLEL_SIZE))
    return _plan(like, n_rows, n_new, n_heads, cache.n_kv_heads, cache.size, threads)


@body
def _scratch_of(plan):
    return LINE + 4 * plan.threads * plan.room


@body
def most_scratch(like, n_rows, n_new, n_heads, n_kv_heads, size, threads):
    """Bytes of scratch of `attend_tokens` on up to so many threads, whatever the number of keys."""
    most = 0
    for n in range(1, threads + 1):  # fewer have longer items
        most = max(most, _scratch_of(_plan(like, n_rows, n_new, n_heads, n_kv_heads, size, n)))
    return most


@body
def attend_tokens(plan, cache, qkv, qkv_row, n_rows, n_heads, seen, scoring, room, out):
    """`decode.attend_rows` for several new tokens a row, the last ones of the row's keys.

    Pointers to qkv [n_rows n_new, qkv_row], queries first, and out [n_rows n_new, n_heads size]; address of
    `most_scratch` bytes, on a 64-byte boundary. scoring: a `Scoring` with the window of `seen`.
    """
    counter = integers_at(room)
    counter[0] = 0
    arguments = (
        counter,
        plan,
        qkv,
        qkv_row,
        n_rows,
        cache,
        seen,
        scoring,
        n_heads,
        floats_at(room + LINE),
        out,
    )
    parallel_for(_attend_task, plan.threads, plan.threads, arguments)


@launch
def attend_prefill(
    like,
    held,
    qkv,
    qkv_row,
    n_rows,
    n_new,
    record,
    prefix_len,
    suffix_len,
    prefix_row,
    table,
    skipped,
    kind,
    ahead,
    mask,
    scale,
    softcap,
    slopes,
    sinks,
    window,
    ranked,
    n_heads,
    out,
):
    """As `decode.attend_decode` for n_new tokens a row, the last ones of the row's keys.

    qkv [n_rows n_new, qkv_row], queries first; kind and ahead: as in `Seen`, of mask, uint8 [n_rows, n_new, keys behind the
    skipped ones]; out [n_rows n_new, n_heads size].
    """
    qkv, out = address_as(qkv, pointer(like)), address_as(out, pointer(like))
    rows = pointer(prefix_row), pointer(table), table.shape[1]
    cache = open_cache(pointer(held), pointer(record), prefix_len, suffix_len, *rows, skipped)
    if not holds(pointer(record), prefix_len, skipped) or not valid_rows(cache, n_rows):
        return 1
    plan = plan_tokens(qkv, cache, n_rows, n_new, n_heads, usable_threads())
    seen = Seen(kind, pointer(mask), mask.shape[2], n_new, prefix_len + suffix_len - skipped, window, ahead)
    scoring = Scoring(np.float32(scale), np.float32(softcap), slopes, sinks, window, ranked)
    room = np.empty(_scratch_of(plan) // 8 + 9, np.int64)
    scratch = (address_of(pointer(room)) + LINE - 1) // LINE * LINE
    attend_tokens(plan, cache, qkv, qkv_row, n_rows, n_heads, seen, scoring, scratch, out)
    room[0] = 0  # the last use of the scratch: it must live until here
    return 0
