"""Decode attention: one new token a row over all keys, reached through the rows of the cache.

The keys are split into chunks. For each chunk, queries that read the same keys (the query heads of one key
head; in the trunk of the cache also the rows of one prompt) are worked on together, and leave an unfinished
softmax: the largest score, the sum of the exponentials, and the weighted sum of the values. A second pass
joins the chunks of each query, in order (https://arxiv.org/abs/2311.01282, with the indirect rows of
https://arxiv.org/abs/2401.05391).

Here are the plan and the items of work; what is done with a chunk is in `_decode_chunk`.
"""

from typing import Any, NamedTuple

import numpy as np

from ._attention_cache import Cache, key_of, open_cache, valid_rows
from ._attention_tile import weight_of
from ._decode_chunk import MAX, MOST_KEYS, SEEN, SUM, attend_chunk, room_of
from ._decode_tile import address_of
from ._jit import launch
from ._parallel import body, next_index, parallel_for, threads_for
from ._pointer import (
    address_as,
    as_units,
    floats_at,
    integers_at,
    load,
    load_scalar,
    pointer,
    shifted,
    store_part,
    store_scalar,
)
from ._simd import LANES
from ._tile import units_ratio
from ._vector import fma, lane, splat

_LEAST_KEYS = 64  # of a chunk
_CHUNK_BYTES = 1 << 17  # of the keys of a chunk, which stay in the L2 cache of a core with their values
_ITEMS = 128  # chunks that keep many threads busy to the end
_PARALLEL_SIZE = 1 << 17  # multiply-adds; below, more threads cost more than they save
_NOTHING = np.float32(-np.inf)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_LOG2_E = np.float32(1.4426950408889634)


class _Plan(NamedTuple):
    """How the work is cut, which gives the sizes of the scratch; see `plan_rows`."""

    chunk: Any  # keys
    trunk_chunks: Any
    branch_chunks: Any
    padded: Any  # channels of a head, with zeros up to whole vectors of units
    n_items: Any
    threads: Any
    room: Any  # elements for each thread
    partials: Any  # floats


class _Problem(NamedTuple):
    """What all items of work share. An item is a chunk of keys of one key head, for all rows that read it."""

    q: Any  # pointer to the queries of row 0
    q_row: Any  # elements from there to row 1
    n_rows: Any
    group: Any  # query heads of a key head
    cache: Cache
    mask: Any  # address of the bytes, or 0
    scale: Any  # for powers of 2 instead of e
    plan: _Plan
    order: Any  # row numbers, sorted by trunk row; "place" is a place in it
    starts: Any  # trunk row p is read by the rows order[starts[p]:starts[p + 1]]
    partials: Any  # float32 [n_kv_heads, places, group, chunks, padded + 16], see MAX


# ---- an item of work -------------------------------------------------------------------------------------------------


@body
def trunk_item(problem, index):
    """(key head, physical row, chunk) of one of the items of the trunk, which are the first ones."""
    n_chunks, n_rows = problem.plan.trunk_chunks, problem.cache.trunk.n_rows
    stream = index // n_chunks
    return stream // n_rows, stream % n_rows, index - stream * n_chunks


@body
def attend_item(problem, index, following, room):
    """Item number `index`, while those keys of item `following` that lie in the trunk are asked for."""
    cache, plan = problem.cache, problem.plan
    n_trunk_items = cache.n_kv_heads * cache.trunk.n_rows * plan.trunk_chunks
    next_key = 0
    if following < n_trunk_items:
        kv_head, p, chunk = trunk_item(problem, following)
        next_key = address_of(key_of(cache.trunk, p, kv_head, chunk * plan.chunk, cache.size))
    if index < n_trunk_items:
        kv_head, p, chunk = trunk_item(problem, index)
        segment, begin, end = cache.trunk, problem.starts[p], problem.starts[p + 1]
    else:
        stream, chunk = (
            (index - n_trunk_items) // plan.branch_chunks,
            (index - n_trunk_items) % plan.branch_chunks,
        )
        segment, p, kv_head, begin = cache.branch, 0, stream % cache.n_kv_heads, stream // cache.n_kv_heads
        end = begin + 1
    in_trunk = index < n_trunk_items
    attend_chunk(problem, segment, in_trunk, p, kv_head, chunk, begin, end, next_key, room)


# ---- all items -------------------------------------------------------------------------------------------------------


@body
def join_chunks(partials, n_slots, step, size, stats, like, out):
    """out = the values weighted by the softmax over all slots of one query, `step` apart; 0 if no key is
    visible. stats: place of the statistics behind the values.
    """
    largest = _NOTHING
    seen = False
    for slot in range(n_slots):
        here = shifted(partials, slot * step + stats)
        if load_scalar(here, SEEN) > _ZERO:
            seen = True
            if load_scalar(here, MAX) > largest:
                largest = load_scalar(here, MAX)
    shift = _ZERO if largest == _NOTHING else largest
    total = _ZERO
    for slot in range(n_slots):
        here = shifted(partials, slot * step + stats)
        if load_scalar(here, SEEN) > _ZERO:
            weight = lane(weight_of(splat(load_scalar(here, MAX) - shift), like), 0)
            total += weight * load_scalar(here, SUM)
            store_scalar(here, MAX, weight)
    inverse = splat(_ONE / total)
    for column in range(0, size, LANES):
        value = splat(_ZERO)
        for slot in range(n_slots):
            here = shifted(partials, slot * step)
            if load_scalar(here, stats + SEEN) > _ZERO:
                weight = splat(load_scalar(here, stats + MAX))
                value = fma(weight, load(here, column), value)
        if seen:
            value = value * inverse
        store_part(out, column, min(size - column, LANES), value)


@body
def sort_by_trunk_row(trunk_row, n_rows, n_trunk_rows, order, starts):
    """order: row numbers sorted by trunk row; those of trunk row p are order[starts[p]:starts[p + 1]]."""
    place = 0
    for p in range(n_trunk_rows):
        starts[p] = place
        for row in range(n_rows):
            if trunk_row[row] == p:
                order[place] = row
                place += 1
    starts[n_trunk_rows] = place


@body
def _attend_task(worker, problem, counter, room):
    scratch = shifted(room, worker * problem.plan.room)
    index = next_index(counter)
    while index < problem.plan.n_items:
        following = next_index(counter)
        attend_item(problem, index, following, scratch)
        index = following


@body
def _join_task(index, problem, out):
    cache, plan = problem.cache, problem.plan
    n_queries = problem.n_rows * problem.group
    n_slots = plan.trunk_chunks + plan.branch_chunks
    kv_head, query = index // n_queries, index % n_queries
    out_row = plan.padded + LANES
    here = shifted(problem.partials, index * n_slots * out_row)
    head = kv_head * problem.group + query % problem.group
    row = problem.order[query // problem.group]
    target = shifted(out, (row * cache.n_kv_heads * problem.group + head) * cache.size)
    join_chunks(here, n_slots, out_row, cache.size, plan.padded, as_units(out, out), target)


@body
def _chunk_size(row_bytes, n_streams, n_keys):
    """Keys of a chunk: many, but no more than stay near, and so few that there are chunks for many threads."""
    chunk = MOST_KEYS
    while chunk > _LEAST_KEYS and (
        chunk * row_bytes > _CHUNK_BYTES or n_streams * ((n_keys + chunk - 1) // chunk) < _ITEMS
    ):
        chunk //= 2
    return chunk


@body
def plan_rows(cache, n_rows, n_heads):
    """How `attend_rows` is to do its work, on as many threads as may be used now."""
    trunk, branch, size = cache.trunk, cache.branch, cache.size
    ratio = units_ratio(trunk.keys)
    chunk = _chunk_size(size * 4 // ratio, cache.n_kv_heads * trunk.n_rows, trunk.n_tokens)
    trunk_chunks = (trunk.n_tokens + chunk - 1) // chunk
    branch_chunks = (branch.n_tokens + chunk - 1) // chunk
    padded = (size + LANES * ratio - 1) // (LANES * ratio) * (LANES * ratio)
    n_items = cache.n_kv_heads * (trunk.n_rows * trunk_chunks + n_rows * branch_chunks)
    work = n_rows * n_heads * (trunk.n_tokens + branch.n_tokens) * size
    return _Plan(
        chunk,
        trunk_chunks,
        branch_chunks,
        padded,
        n_items,
        threads_for(n_items, work, _PARALLEL_SIZE),
        room_of(chunk, padded),
        n_rows * n_heads * (trunk_chunks + branch_chunks) * (padded + LANES),
    )


@body
def scratch_bytes(plan, cache, n_rows):
    """Bytes of the scratch of `attend_rows`."""
    n_elements, n_integers = plan.threads * plan.room, n_rows + cache.trunk.n_rows + 2
    return n_elements * 4 // units_ratio(cache.trunk.keys) + plan.partials * 4 + n_integers * 8


@body
def attend_rows(plan, cache, q, q_row, n_rows, n_heads, mask, scale, scratch, out):
    """out[r, head] = softmax(scale * q[r, head] . keys of row r) values of row r; 0 for a row without
    visible keys.

    The cache must name valid rows. Pointers to q, rows `q_row` elements apart, and to out [n_rows, n_heads size];
    addresses of mask, uint8 [n_rows, keys] or 0, and of scratch, on a 64-byte boundary.
    """
    # the parts of the scratch are multiples of 64 bytes but for the last ones
    room = address_as(scratch, q)
    partials = scratch + plan.threads * plan.room * (4 // units_ratio(q))
    counter = partials + plan.partials * 4
    order, starts = integers_at(counter + 8), integers_at(counter + 8 * (1 + n_rows))
    sort_by_trunk_row(cache.trunk_row, n_rows, cache.trunk.n_rows, order, starts)
    integers_at(counter)[0] = 0
    problem = _Problem(
        q,
        q_row,
        n_rows,
        n_heads // cache.n_kv_heads,
        cache,
        mask,
        scale * _LOG2_E,
        plan,
        order,
        starts,
        floats_at(partials),
    )
    parallel_for(_attend_task, plan.threads, plan.threads, (problem, integers_at(counter), room))
    parallel_for(_join_task, plan.threads, n_rows * n_heads, (problem, out))


@launch
def attend_decode(
    like, qkv, n_rows, record, trunk_len, branch_len, trunk_row, table, mask, scale, n_heads, out
):
    """`attend_rows`; returns 0, or 1 and does nothing if the cache names rows that it has not.

    Addresses of qkv [n_rows, (n_heads + 2 n_kv_heads) size], queries first, and of out [n_rows, n_heads size], of the
    type of `like` as the cache of the `cache_record`, float32 or bfloat16 bits. Rows and table as in `cache.Appended`;
    mask uint8 [n_rows, 1, keys], empty if all are seen.
    """
    q, out = address_as(qkv, pointer(like)), address_as(out, pointer(like))
    rows = pointer(trunk_row), pointer(table), table.shape[1]
    cache = open_cache(q, pointer(record), trunk_len, branch_len, *rows)
    if not valid_rows(cache, n_rows):
        return 1
    plan = plan_rows(cache, n_rows, n_heads)
    room = np.empty((scratch_bytes(plan, cache, n_rows) + 7) // 8 + 8, np.int64)
    scratch = (address_of(pointer(room)) + 63) // 64 * 64
    hidden = address_of(pointer(mask)) if mask.size > 0 else 0
    q_row = (n_heads + 2 * cache.n_kv_heads) * cache.size
    attend_rows(plan, cache, q, q_row, n_rows, n_heads, hidden, np.float32(scale), scratch, out)
    room[0] = 0  # the last use of the scratch: it must live until here
    return 0
