"""Decode attention: one new token a row over all keys, reached through the rows of the cache.

The keys are split into chunks. For each chunk, queries that read the same keys (the query heads of one key
head; in the trunk of the cache also the rows of one prompt) are worked on together, and leave an unfinished
softmax: the largest score, the sum of the exponentials, and the weighted sum of the values. A second pass
joins the chunks of each query, in order (https://arxiv.org/abs/2311.01282, with the indirect rows of
https://arxiv.org/abs/2401.05391).

Blocks of 16 keys are read where they are, if they follow each other and all are seen. Others (those of the
branch, and those of which a mask hides some) are gathered first, without what is hidden, so that NaN or Inf
there cannot reach a result. While the keys of a chunk are read its values are asked for, and with them the
next chunk's keys, so that the memory is never idle.
"""

from typing import Any, NamedTuple

import numpy as np

from ._attention_cache import Cache, key_of, open_cache, valid_rows
from ._attention_tile import weight_of, where_up_to
from ._decode_tile import (
    BLOCK,
    address_of,
    pack_query,
    partner,
    score_tile,
    seen_keys,
    set_address,
    stack_addresses,
    tile_columns,
    weigh_tile,
    where_keys,
)
from ._jit import launch
from ._parallel import body, next_index, parallel_for, threads_for
from ._pointer import (
    address_as,
    as_units,
    bytes_at,
    floats_at,
    integers_at,
    load,
    load_part,
    load_scalar,
    pointer,
    shifted,
    store,
    store_part,
    store_scalar,
)
from ._simd import LANES
from ._tile import stack_floats, units_ratio
from ._vector import fma, lane, larger, splat

_MOST_KEYS, _LEAST_KEYS = 256, 64  # of a chunk; 256 is also a literal below, in the sizes of stacks
_CHUNK_BYTES = 1 << 17  # of the keys of a chunk, which stay in the L2 cache of a core with their values
_ITEMS = 256  # chunks that keep many threads busy to the end
_TILE = 4  # queries of a tile, if there are more than one
_TILES = 2  # tiles that are worked on together
_BLOCKS = 2  # blocks of long values, of which one pass takes some columns, and which the L1 cache holds
_PARALLEL_SIZE = 1 << 17  # multiply-adds; below, more threads cost more than they save
_MAX, _SUM, _SEEN = range(3)  # behind the weighted values of a query and chunk
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
    partials: Any  # float32 [n_kv_heads, chunks, places, group, padded + 16], see _MAX


# ---- a chunk ---------------------------------------------------------------------------------------------------------


@body
def copy_row(source, size, target, padded):
    """target = source, and zeros up to `padded`, a multiple of 16."""
    for k in range(0, padded, LANES):
        if k + LANES <= size:
            store(target, k, load(source, k))
        else:
            store(target, k, load_part(source, k, max(size - k, 0)))


@body
def weigh_scores(scores, n_vectors, width, n, scale, weights):
    """weights = 2^(scale * scores - max) for n keys of a tile of queries; (maxima, sums), each in all lanes
    of its query.
    """
    top = splat(_NOTHING)
    for v in range(n_vectors):
        value = load(scores, v * LANES) * splat(scale)
        if n - v * width < width:
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
    total = splat(_ZERO)
    for v in range(n_vectors):
        value = weight_of(load(scores, v * LANES) - shift, as_units(weights, weights))
        store(weights, v * LANES, value)
        total = total + value
    total = total + partner(total, 1)
    total = total + partner(total, 2)
    if width > 4:
        total = total + partner(total, 4)
        total = total + partner(total, 8)
    return top, total


@body
def weigh_values(weights, queries, values, n_blocks, units, ahead, out, out_row, n_valid):
    """out[i, :] = sum over keys of weights[key, i] values[key, :] for the first n_valid queries of a tile."""
    p = as_units(weights, weights)
    ratio = units_ratio(weights)
    columns = tile_columns(p, 1, 1) if queries == 1 else tile_columns(p, 4, 1)
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
                weigh_tile(w, here, n, units, at, ahead, to, out_row, n_valid, more, 1, 1)
                at += columns // ratio
            elif queries == 1:
                weigh_tile(w, here, n, units, at, ahead, to, out_row, n_valid, more, 1, 0)
                at += LANES
            elif left >= columns:
                weigh_tile(w, here, n, units, at, ahead, to, out_row, n_valid, more, 4, 1)
                at += columns // ratio
            else:
                weigh_tile(w, here, n, units, at, ahead, to, out_row, n_valid, more, 4, 0)
                at += LANES


@body
def attend_blocks(problem, kv_head, query, n_queries, keys, values, n_blocks, n, ahead, room, partial):
    """Unfinished softmax of n_queries <= 8 queries of a key head over n keys.

    query: number of the first one, over all places; keys, values: addresses of blocks; ahead: bytes from keys
    to what is read next, and from values.
    """
    size, padded = problem.cache.size, problem.plan.padded
    scores = stack_floats(8 * 256)
    packed = room
    weights = shifted(packed, _TILES * _TILE * padded)
    filled = shifted(weights, _TILES * _TILE * _MOST_KEYS)
    queries = 1 if n_queries == 1 else _TILE
    tiles = (n_queries + _TILE - 1) // _TILE
    width = LANES // queries
    units = padded // units_ratio(room)
    steps = units // width
    place = query // problem.group
    member = query - place * problem.group
    for i in range(n_queries):
        head = kv_head * problem.group + member
        source = shifted(problem.q, problem.order[place] * problem.q_row + head * size)
        member += 1
        if member == problem.group:
            member = 0
            place += 1
        if size != padded:
            copy_row(source, size, filled, padded)
            source = filled
        target = as_units(shifted(packed, i // _TILE * _TILE * padded), packed)
        if queries == 1:
            pack_query(source, steps, target, 0, 1)
        else:
            pack_query(source, steps, target, i % _TILE, 4)

    q = as_units(packed, packed)
    to_values, to_next = ahead
    n_vectors = n_blocks * queries
    span = n_vectors * LANES
    if queries == 1:
        score_tile(q, steps, keys, n_blocks, units, to_values, scores, span, 1, 1)
    elif tiles == 1:
        score_tile(q, steps, keys, n_blocks, units, to_values, scores, span, 4, 1)
    else:
        score_tile(q, steps, keys, n_blocks, units, to_values, scores, span, 4, 2)
    out_row = padded + LANES
    for tile in range(tiles):
        first = tile * _TILE
        w = shifted(weights, tile * span)
        top, total = weigh_scores(shifted(scores, tile * span), n_vectors, width, n, problem.scale, w)
        for i in range(min(n_queries - first, _TILE)):
            stats = shifted(partial, (first + i) * out_row + padded)
            store_scalar(stats, _MAX, lane(top, i * width))
            store_scalar(stats, _SUM, lane(total, i * width))
            store_scalar(stats, _SEEN, _ONE)
    for tile in range(tiles):
        first = tile * _TILE
        w, here = shifted(weights, tile * span), shifted(partial, first * out_row)
        weigh_values(w, queries, values, n_blocks, units, to_next, here, out_row, n_queries - first)


# ---- an item of work -------------------------------------------------------------------------------------------------


@body
def seen_of(problem, place, first, count):
    """Bits of `count` <= 16 keys, those that the row at a place sees; first: token number of the first."""
    if problem.mask == 0:
        return (1 << count) - 1
    n_keys = problem.cache.trunk.n_tokens + problem.cache.branch.n_tokens
    return seen_keys(bytes_at(problem.mask), problem.order[place] * n_keys + first, count)


@body
def list_blocks(problem, segment, in_trunk, p, kv_head, place, first, n, keys, values, room):
    """Addresses of blocks of those of n keys from token `first` of a segment on that the row at a place sees.

    Returns how many keys these are, and writes hidden ones nowhere. room: for copies of n keys and values.
    """
    cache, size, padded = problem.cache, problem.cache.size, problem.plan.padded
    start = first if in_trunk else cache.trunk.n_tokens + first
    held_values = shifted(room, problem.plan.chunk * padded)
    n_blocks = 0
    n_held = 0
    for t in range(0, n, BLOCK):
        count = min(n - t, BLOCK)
        seen = seen_of(problem, place, start + t, count)
        if in_trunk and size == padded and seen == (1 << BLOCK) - 1:
            key = key_of(segment, p, kv_head, first + t, size)
            set_address(keys, n_blocks, address_of(key))
            set_address(values, n_blocks, address_of(shifted(key, segment.to_values)))
            n_blocks += 1
        elif seen != 0:
            for token in range(first + t, first + t + count):
                if seen >> (token - first - t) & 1:
                    row = p if in_trunk else cache.table[problem.order[place] * cache.table_row + token]
                    key = key_of(segment, row, kv_head, token, size)
                    copy_row(key, size, shifted(room, n_held * padded), padded)
                    value = shifted(key, segment.to_values)
                    copy_row(value, size, shifted(held_values, n_held * padded), padded)
                    n_held += 1
    n_seen = n_blocks * BLOCK + n_held
    while n_held % BLOCK != 0:
        copy_row(room, 0, shifted(room, n_held * padded), padded)
        copy_row(room, 0, shifted(held_values, n_held * padded), padded)
        n_held += 1
    for t in range(0, n_held, BLOCK):
        set_address(keys, n_blocks, address_of(shifted(room, t * padded)))
        set_address(values, n_blocks, address_of(shifted(held_values, t * padded)))
        n_blocks += 1
    return n_seen


@body
def rows_alike(problem, begin, end, first, n):
    """Whether the rows at places begin ... end see the same ones of n keys."""
    alike = True
    if problem.mask != 0:
        for t in range(first, first + n, BLOCK):
            count = min(first + n - t, BLOCK)
            seen = seen_of(problem, begin, t, count)
            for place in range(begin + 1, end):
                alike &= seen_of(problem, place, t, count) == seen
    return alike


@body
def attend_chunk(problem, segment, in_trunk, p, kv_head, chunk, begin, end, next_key, room):
    """One chunk of a physical row of the trunk, or of the branch of one row, for the rows at places begin ... end.

    next_key: address of the key that is read after that, or 0.
    """
    plan, size = problem.plan, problem.cache.size
    first = chunk * plan.chunk
    n = min(segment.n_tokens - first, plan.chunk)
    keys, values = stack_addresses(16), stack_addresses(16)
    scratch = shifted(room, 2 * plan.chunk * plan.padded)
    here = address_of(key_of(segment, p, kv_head, first, size))
    to_values = address_of(shifted(segment.keys, segment.to_values)) - address_of(segment.keys)
    to_next = next_key - here - to_values if next_key != 0 else 0
    slot = chunk if in_trunk else plan.trunk_chunks + chunk
    n_slots = plan.trunk_chunks + plan.branch_chunks
    together = max(end - begin, 1) if rows_alike(problem, begin, end, first, n) else 1
    out_row = plan.padded + LANES
    for place in range(begin, end, together):
        n_seen = list_blocks(problem, segment, in_trunk, p, kv_head, place, first, n, keys, values, room)
        n_blocks = (n_seen + BLOCK - 1) // BLOCK
        n_queries = together * problem.group
        query = 0
        while query < n_queries:
            number = place * problem.group + query
            partial = ((kv_head * n_slots + slot) * problem.n_rows * problem.group + number) * out_row
            partial = shifted(problem.partials, partial)
            count = min(n_queries - query, _TILES * _TILE)
            if n_seen > 0:
                ahead = to_values, to_next
                attend_blocks(
                    problem, kv_head, number, count, keys, values, n_blocks, n_seen, ahead, scratch, partial
                )
            else:
                for i in range(count):
                    store_scalar(shifted(partial, i * out_row + plan.padded), _SEEN, _ZERO)
            query += count


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
        begin, end = problem.starts[p], problem.starts[p + 1]
        attend_chunk(problem, cache.trunk, True, p, kv_head, chunk, begin, end, next_key, room)
    else:
        place = (index - n_trunk_items) // plan.branch_chunks
        chunk = (index - n_trunk_items) % plan.branch_chunks
        kv_head = place % cache.n_kv_heads
        place //= cache.n_kv_heads
        attend_chunk(problem, cache.branch, False, 0, kv_head, chunk, place, place + 1, next_key, room)


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
        if load_scalar(here, _SEEN) > _ZERO:
            seen = True
            if load_scalar(here, _MAX) > largest:
                largest = load_scalar(here, _MAX)
    shift = _ZERO if largest == _NOTHING else largest
    total = _ZERO
    for slot in range(n_slots):
        here = shifted(partials, slot * step + stats)
        if load_scalar(here, _SEEN) > _ZERO:
            weight = lane(weight_of(splat(load_scalar(here, _MAX) - shift), like), 0)
            total += weight * load_scalar(here, _SUM)
            store_scalar(here, _MAX, weight)
    inverse = splat(_ONE / total)
    for column in range(0, size, LANES):
        value = splat(_ZERO)
        for slot in range(n_slots):
            here = shifted(partials, slot * step)
            if load_scalar(here, stats + _SEEN) > _ZERO:
                weight = splat(load_scalar(here, stats + _MAX))
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
    here = shifted(problem.partials, (kv_head * n_slots * n_queries + query) * out_row)
    head = kv_head * problem.group + query % problem.group
    row = problem.order[query // problem.group]
    target = shifted(out, (row * cache.n_kv_heads * problem.group + head) * cache.size)
    step = n_queries * out_row
    join_chunks(here, n_slots, step, cache.size, plan.padded, as_units(out, out), target)


@body
def _chunk_size(row_bytes, n_streams, n_keys):
    """Keys of a chunk: many, but no more than stay near, and so few that there are chunks for many threads."""
    chunk = _MOST_KEYS
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
        2 * chunk * padded + _TILES * _TILE * (padded + _MOST_KEYS) + padded,
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
