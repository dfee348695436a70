"""Decode attention: one new token a row over all keys, reached through the rows of the cache.

The keys are split into chunks. For each chunk, queries that read the same keys (the query heads of one key
head; in the prefix of the cache also the rows of one prompt) are worked on together, and leave an unfinished
softmax: the largest score, the sum of the exponentials, and the weighted sum of the values. Those of a span of chunks
are merged as it is read; in the end the spans of each query are joined, in order (https://arxiv.org/abs/2311.01282,
with the indirect rows of https://arxiv.org/abs/2401.05391).

Here are the items of work; how it is cut is in `plan`, what is done with a chunk in `chunk`.
"""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.attention.blocks import first_of
from hfopt.kernels.attention.cache_view import Cache, holds, key_of, names_all, open_cache, valid_rows
from hfopt.kernels.attention.chunk import Following, Item, attend_chunk
from hfopt.kernels.attention.matrix_block import take_tiles
from hfopt.kernels.attention.partials import join_partials, leave_part
from hfopt.kernels.attention.plan import (
    DONE,
    JOINED,
    Plan,
    layout_of,
    part_size,
    plan_rows,
    sort_by_prefix_row,
)
from hfopt.kernels.attention.scoring import Scoring, sink_of, skipped_keys
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import (
    arrive,
    arrived,
    body,
    inlined,
    next_index,
    next_share,
    parallel_for,
    usable_threads,
)
from hfopt.kernels.simd import matrix
from hfopt.kernels.simd.constants import LOG2_E, ONE, ZERO
from hfopt.kernels.simd.pointer import (
    address_as,
    address_of,
    as_packed,
    as_units,
    bytes_at,
    floats_at,
    integers_at,
    pointer,
    shifted,
)
from hfopt.kernels.simd.tile import units_ratio
from hfopt.kernels.simd.types import LANES

_PATIENCE = 5000  # looks at what the others have done


class _Problem(NamedTuple):
    """What all items of work share."""

    q: Any  # pointer to the queries of row 0
    q_row: Any  # elements from there to row 1
    q_step: Any  # and to the next step
    n_rows: Any
    n_steps: Any  # of each row, over one key more each
    n_keys: Any  # that the last one sees
    n_groups: Any  # of rows that share their prefix
    group: Any  # query heads of a key head
    cache: Cache
    mask: Any  # address of the bytes, or 0
    mask_row: Any  # bytes from a row to the next
    scoring: Scoring
    scale: Any  # for powers of 2 instead of e, or for tanh
    outer: Any  # factor behind tanh, for powers of 2; 0: there is none
    plan: Plan
    padded: Any  # channels of a head, with zeros up to whole vectors of units
    order: Any  # row numbers, sorted by prefix row; each has n_steps "places" that follow each other
    starts: Any  # order[starts[g]:starts[g + 1]] read one row of the prefix
    partials: Any  # float32 [n_kv_heads, places, group, spans, padded + 16], see MAX
    is_part: Any  # whether they are left as parts


# ---- an item of work -------------------------------------------------------------------------------------------------


@inlined
def item_of(problem, index):
    """Item number `index`; those of the prefix are the first ones."""
    cache, plan, starts = problem.cache, problem.plan, problem.starts
    n_prefix_items = cache.n_kv_heads * problem.n_groups * plan.prefix.n_spans
    if index < n_prefix_items:
        cut, segment, in_prefix = plan.prefix, cache.prefix, True
        stream = index // cut.n_spans
        span = slot = index - stream * cut.n_spans
        kv_head = stream // problem.n_groups
        group = stream - kv_head * problem.n_groups
        row, end_head = cache.prefix_row[problem.order[starts[group]]], kv_head + 1
        begin, end = starts[group] * problem.n_steps, starts[group + 1] * problem.n_steps
    else:
        cut, segment, in_prefix = plan.suffix, cache.suffix, False
        stream = (index - n_prefix_items) // cut.n_spans
        span = index - n_prefix_items - stream * cut.n_spans
        slot = plan.prefix.n_spans + span
        n_streams = cache.n_kv_heads // plan.suffix_heads
        begin = stream // n_streams
        kv_head, end, row = (stream - begin * n_streams) * plan.suffix_heads, begin + 1, 0
        end_head = kv_head + plan.suffix_heads
    first, last = span * cut.n_chunks // cut.n_spans, (span + 1) * cut.n_chunks // cut.n_spans
    return Item(segment, in_prefix, row, kv_head, end_head, begin, end, first, last, slot)


@inlined
def _first_key(problem, item, chunk):
    """Address of the first key of a chunk in the prefix, or 0."""
    if not item.in_prefix:
        return 0
    cache = problem.cache
    return address_of(key_of(item.segment, item.row, item.kv_head, chunk * problem.plan.chunk, cache.size))


@inlined
def _following(problem, item, index, after, follows):
    """What is read next, if that is in the suffix: head and chunk `index` of an item, or the first ones of that after it, if
    it follows.
    """
    n_heads, size, n_tokens = item.end_head - item.kv_head, problem.plan.chunk, item.segment.n_tokens
    chunk = index // n_heads
    if chunk < item.last:
        return Following(item.begin, item.kv_head + index - chunk * n_heads, chunk * size, n_tokens)
    first, is_read = after.first * size, follows and not after.in_prefix
    return Following(after.begin, after.kv_head, first, n_tokens if is_read else first)


@inlined
def attend_item(problem, item, after, follows, room):
    """All chunks of an item, while what is read next is asked for.

    after: the next item, if one follows, or any.
    """
    next_key = _first_key(problem, after, after.first) if follows else 0
    n_heads = item.end_head - item.kv_head
    for index in range(item.first * n_heads, item.last * n_heads):
        chunk = index // n_heads
        kv_head = item.kv_head + index - chunk * n_heads
        key = _first_key(problem, item, chunk + 1) if chunk + 1 < item.last else next_key
        one = Item(
            *(item.segment, item.in_prefix, item.row, kv_head, kv_head + 1, item.begin, item.end),
            *(item.first, item.last, item.slot),
        )
        attend_chunk(problem, one, chunk, _following(problem, item, index + 1, after, follows), key, room)


# ---- all items -------------------------------------------------------------------------------------------------------


@inlined
def _join(index, problem, out, out_row, out_step):
    cache, plan = problem.cache, problem.plan
    n_queries = problem.n_rows * problem.n_steps * problem.group
    n_slots = plan.prefix.n_spans + plan.suffix.n_spans
    kv_head, query = index // n_queries, index % n_queries
    partial_size = problem.padded + LANES
    here = shifted(problem.partials, index * n_slots * partial_size)
    head = kv_head * problem.group + query % problem.group
    first = first_of(problem, query // problem.group, out_row, out_step)
    if problem.is_part:
        part = shifted(floats_at(address_of(out)), first + head * partial_size)
        leave_part(here, n_slots, partial_size, problem.padded, part)
    else:
        target = shifted(out, first + head * cache.size)
        sink = sink_of(problem.scoring, head, problem.q)
        size, like = cache.size, as_units(out, out)
        join_partials(here, n_slots, partial_size, size, problem.padded, sink, like, target)


@body
def _attend_task(worker, problem, counters, rooms, room_size, out, out_row, out_step):
    """Takes items while there are any, and joins partials when all items are done.

    A second launch would wait for all threads. Here one that has no item left waits for a while only; the last one sees
    that it is, and joins what others have left.
    """
    room = as_packed(bytes_at(rooms + worker * room_size), problem.q)
    if matrix.has_tiles(problem.q):
        take_tiles()
    n_items, n_done = problem.plan.n_items, 0
    index = next_index(counters)
    while index < n_items:
        following = next_index(counters)
        after = item_of(problem, min(following, n_items - 1))
        attend_item(problem, item_of(problem, index), after, following < n_items, room)
        n_done += 1
        index = following
    if matrix.has_tiles(problem.q):
        matrix.release()
    done, joined = shifted(counters, DONE), shifted(counters, JOINED)
    arrive(done, n_done)
    n_looks = 0
    while arrived(done) < n_items and n_looks < _PATIENCE:
        n_looks += 1
    if arrived(done) == n_items:
        n_queries = problem.n_rows * problem.n_steps * problem.group * problem.cache.n_kv_heads
        first, end = next_share(joined, n_queries, problem.plan.threads)
        while first < end:
            for query in range(first, end):
                _join(query, problem, out, out_row, out_step)
            first, end = next_share(joined, n_queries, problem.plan.threads)


@body
def attend_rows(
    cache,
    q,
    q_row,
    q_step,
    n_rows,
    n_steps,
    n_heads,
    mask,
    mask_row,
    scoring,
    scratch,
    threads,
    out,
    out_row,
    out_step,
    is_part,
):
    """out[r, head] = softmax(scores of q[r, head] and the keys of row r) values of row r, scores as a `Scoring` says;
    0 for a row without visible keys.

    The cache must name valid rows, and begin with the window. Pointers to q, rows `q_row` elements apart, and to out,
    n_heads size in rows `out_row` apart; addresses of mask, uint8, rows `mask_row` apart, or 0, and of `scratch_bytes`
    for so many threads, on a 64-byte boundary.

    n_steps: each of one key more, `q_step` and `out_step` elements apart, the last one over this cache: no more than
    `plan.steps_alike` says. Each has the bits that it has alone.

    is_part: without sinks, as parts of a softmax over more keys, for `join_parts`: out has `part_size` float32 a head.
    """
    item_size = 4 // units_ratio(q)
    sizes = n_heads, cache.n_kv_heads, cache.size, item_size, threads
    places = layout_of(n_rows, n_steps, *sizes, names_all(cache))
    counters, order = integers_at(scratch), integers_at(scratch + places.order)
    starts = shifted(order, n_rows)
    n_groups = sort_by_prefix_row(cache.prefix_row, n_rows, order, starts)
    plan = plan_rows(cache, n_rows, n_steps, n_groups, n_heads, places.chunk, threads)
    counters[0] = counters[DONE] = counters[JOINED] = 0
    problem = _Problem(
        q,
        q_row,
        q_step,
        n_rows,
        n_steps,
        cache.prefix.n_tokens + cache.suffix.n_tokens,
        n_groups,
        n_heads // cache.n_kv_heads,
        cache,
        mask,
        mask_row,
        scoring,
        scoring.scale / scoring.softcap if scoring.softcap > ZERO else scoring.scale * np.float32(LOG2_E),
        scoring.softcap * np.float32(LOG2_E),
        plan,
        places.padded,
        order,
        starts,
        floats_at(scratch + places.partials),
        is_part,
    )
    shared = problem, counters, scratch + places.rooms, places.room, out, out_row, out_step
    parallel_for(_attend_task, plan.threads, plan.threads, shared)


@launch
def attend_decode(
    like,
    held,
    q,
    q_row,
    n_rows,
    record,
    prefix_len,
    suffix_len,
    prefix_row,
    table,
    skipped,
    mask,
    scale,
    softcap,
    slopes,
    sinks,
    window,
    ranked,
    n_heads,
    out,
    is_part,
):
    """`attend_rows`; returns 0, or 1 and does nothing if the cache names rows that it has not, or has not all tokens but the
    skipped ones.

    Addresses of q [n_rows, q_row], the queries first, and of out [n_rows, n_heads size], of the
    type of `like`; the cache of the `cache_record` is of that of `held`, the same, or int8 for
    codes. Rows, table and skipped as in `cache.Appended`; mask uint8 [n_rows, 1, keys behind the skipped ones, or more],
    empty if all are seen; scale and what follows it as in `Scoring`.
    """
    q, out = address_as(q, pointer(like)), address_as(out, pointer(like))
    rows = pointer(prefix_row), pointer(table), table.shape[1]
    before = skipped_keys(window, prefix_len + suffix_len - skipped, 1)
    cache = open_cache(pointer(held), pointer(record), prefix_len, suffix_len, *rows, skipped + before)
    if not holds(pointer(record), prefix_len, skipped) or not valid_rows(cache, n_rows):
        return 1
    threads, item_size = usable_threads(), 4 // units_ratio(q)
    sizes = n_heads, cache.n_kv_heads, cache.size, item_size, threads
    needed = layout_of(n_rows, 1, *sizes, names_all(cache)).n_bytes
    room = np.empty(needed // 8 + 9, np.int64)
    scratch = (address_of(pointer(room)) + 63) // 64 * 64
    seen = address_of(pointer(mask)) + before if mask.size > 0 else 0, mask.shape[2]
    scoring = Scoring(np.float32(scale), np.float32(softcap), slopes, sinks, window, ranked)
    size = part_size(cache.size, item_size) if is_part else cache.size
    problem = cache, q, q_row, 0, n_rows, 1, n_heads, *seen, scoring
    attend_rows(*problem, scratch, threads, out, n_heads * size, 0, is_part)
    room[0] = 0  # the last use of the scratch: it must live until here
    return 0


@launch
def join_parts(like, parts, n_parts, n_queries, n_heads, head_dim, sinks, out):
    """out = values weighted by the softmax over all parts of each query and its sink.

    Addresses of parts, float32 [n_queries, n_parts, `part_size`], which are overwritten, sinks [n_heads] or 0, and out
    [n_queries, head_dim], of the type of `like`. Query q is of head q % n_heads.
    """
    out, parts = address_as(out, pointer(like)), floats_at(parts)
    size = part_size(head_dim, 4 // units_ratio(out))
    scoring = Scoring(ONE, ZERO, 0, sinks, 0, 0)
    for query in range(n_queries):
        here, target = shifted(parts, query * n_parts * size), shifted(out, query * head_dim)
        sink = sink_of(scoring, query % n_heads, out)
        join_partials(here, n_parts, size, head_dim, size - LANES, sink, parts, target)
