"""Decode attention: one new token a row over all keys, reached through the rows of the cache.

The keys are split into chunks. For each chunk, queries that read the same keys (the query heads of one key
head; in the trunk of the cache also the rows of one prompt) are worked on together, and leave an unfinished
softmax: the largest score, the sum of the exponentials, and the weighted sum of the values. A second pass
joins the chunks of each query, in order (https://arxiv.org/abs/2311.01282, with the indirect rows of
https://arxiv.org/abs/2401.05391).

Masked keys are not even listed, so that NaN or Inf in them cannot reach a result.
"""

import numpy as np

from ._attention_tile import dot_scattered, get_offset, set_offset, stack_offsets, weigh_scattered
from ._jit import launch
from ._parallel import body, parallel_for, threads_for
from ._simd import (
    LANES,
    exp,
    fma,
    lane,
    load,
    load_scalar,
    max_lanes,
    maximum,
    pointer,
    shifted,
    splat,
    store,
    store_part,
    store_scalar,
    sum_lanes,
    where_part,
)
from ._tile import stack_floats

CHUNK = 256  # keys of one unfinished softmax; a literal below, in the size of a stack
_PARALLEL_SIZE = 1 << 17  # multiply-adds; below, more threads cost more than they save
_MAX, _SUM, _COUNT = range(3)  # behind the weighted values of a query and chunk
_NOTHING = np.float32(-np.inf)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@body
def valid_rows(trunk_row, n_trunk_rows, table, branch_len, n_branch_rows):
    """Whether all rows that the cache names exist."""
    wrong = 0
    for row in range(trunk_row.shape[0]):
        wrong |= trunk_row[row] < 0
        wrong |= trunk_row[row] >= n_trunk_rows
        for t in range(branch_len):
            wrong |= table[row, t] < 0
            wrong |= table[row, t] >= n_branch_rows
    return wrong == 0


@body
def score_keys(q, keys, offsets, n, size, scale, scores, stats):
    """scores = exp(scale * q . k - max) for n listed keys; the maximum, the sum and n go to stats."""
    top = splat(_NOTHING)
    for first in range(0, n, LANES):
        value = dot_scattered(q, keys, shifted(offsets, first), size) * splat(scale)
        if n - first < LANES:
            value = where_part(n - first, value, splat(_NOTHING))
        store(scores, first, value)
        top = maximum(top, value)
    largest = max_lanes(top)
    # all scores may be -inf: these exponentials have to be 0 beside those of other chunks
    shift = splat(_ZERO if largest == _NOTHING else largest)
    total = splat(_ZERO)
    for first in range(0, n, LANES):
        value = exp(load(scores, first) - shift)
        store(scores, first, value)
        total = total + value
    store_scalar(stats, _MAX, largest)
    store_scalar(stats, _SUM, sum_lanes(total))
    store_scalar(stats, _COUNT, np.float32(n))


@body
def _unfinished(partials, row, head, n_heads, slot, n_slots, stride):
    return shifted(partials, ((row * n_heads + head) * n_slots + slot) * stride)


@body
def attend_listed(
    qkv,
    width,
    rows,
    n_rows,
    n_heads,
    group,
    kv_head,
    size,
    keys,
    values,
    offsets,
    n,
    scale,
    partials,
    n_slots,
    slot,
    stride,
):
    """Unfinished softmax of some rows' queries of one key head over n <= 256 listed keys, into their slot."""
    scores = stack_floats(4 * 256)
    sums = stack_floats(4 * 64)
    n_queries = n_rows * group
    query = 0
    while query < n_queries:
        n_tile = 4 if n_queries - query >= 4 else 1
        for i in range(n_tile):
            row = get_offset(rows, (query + i) // group)
            head = kv_head * group + (query + i) % group
            unfinished = _unfinished(partials, row, head, n_heads, slot, n_slots, stride)
            stats = shifted(unfinished, stride - LANES)
            if n > 0:
                q = shifted(qkv, row * width + head * size)
                score_keys(q, keys, offsets, n, size, scale, shifted(scores, i * CHUNK), stats)
            else:
                store_scalar(stats, _COUNT, _ZERO)
        column = 0
        while column < size and n > 0:
            n_vectors = 4 if size - column >= 4 * LANES else 1
            count = min(size - column, LANES)
            here = shifted(values, column)
            if n_tile == 4 and n_vectors == 4:
                weigh_scattered(scores, CHUNK, here, offsets, n, count, sums, 4, 4)
            elif n_tile == 4:
                weigh_scattered(scores, CHUNK, here, offsets, n, count, sums, 4, 1)
            elif n_vectors == 4:
                weigh_scattered(scores, CHUNK, here, offsets, n, count, sums, 1, 4)
            else:
                weigh_scattered(scores, CHUNK, here, offsets, n, count, sums, 1, 1)
            for i in range(n_tile):
                row = get_offset(rows, (query + i) // group)
                head = kv_head * group + (query + i) % group
                unfinished = _unfinished(partials, row, head, n_heads, slot, n_slots, stride)
                for v in range(n_vectors):
                    place = v * LANES
                    store(unfinished, column + place, load(sums, i * n_vectors * LANES + place))
            column += n_vectors * LANES
        query += n_tile


@body
def join_chunks(partials, n_slots, size, stride, out):
    """out = the values weighted by the softmax over all slots of one query; 0 if no key is visible."""
    largest = _NOTHING
    seen = False
    for slot in range(n_slots):
        stats = shifted(partials, slot * stride + stride - LANES)
        if load_scalar(stats, _COUNT) > _ZERO:
            seen = True
            if load_scalar(stats, _MAX) > largest:
                largest = load_scalar(stats, _MAX)
    shift = _ZERO if largest == _NOTHING else largest
    total = _ZERO
    for slot in range(n_slots):
        stats = shifted(partials, slot * stride + stride - LANES)
        if load_scalar(stats, _COUNT) > _ZERO:
            weight = lane(exp(splat(load_scalar(stats, _MAX) - shift)), 0)
            total += weight * load_scalar(stats, _SUM)
            store_scalar(stats, _MAX, weight)
    inverse = splat(_ONE / total)
    for column in range(0, size, LANES):
        value = splat(_ZERO)
        for slot in range(n_slots):
            here = shifted(partials, slot * stride)
            if load_scalar(here, stride - LANES + _COUNT) > _ZERO:
                weight = splat(load_scalar(here, stride - LANES + _MAX))
                value = fma(weight, load(here, column), value)
        if seen:
            value = value * inverse
        store_part(out, column, min(size - column, LANES), value)


@body
def list_keys(first, n, base, row_stride, size, table, row, in_trunk, masked, mask, start, offsets):
    """Offsets of the visible ones of n keys of a logical row from token `first` on, and their number.

    The last one is repeated up to a multiple of 16. start: column of the mask that belongs to token 0.
    """
    count = 0
    for t in range(first, first + n):
        place = base + t * size
        if not in_trunk:
            place += table[row, t] * row_stride
        set_offset(offsets, count, place)
        if not masked or mask[row, 0, start + t] != 0:
            count += 1
    filled = count
    while filled % LANES and count > 0:
        set_offset(offsets, filled, get_offset(offsets, count - 1))
        filled += 1
    return count


@body
def sort_by_trunk_row(trunk_row, order, starts):
    """order: row numbers sorted by trunk row; those of trunk row p are order[starts[p]:starts[p + 1]]."""
    place = 0
    for p in range(starts.shape[0] - 1):
        starts[p] = place
        for row in range(trunk_row.shape[0]):
            if trunk_row[row] == p:
                order[place] = row
                place += 1
    starts[starts.shape[0] - 1] = place


@body
def attend_item(
    qkv,
    trunk,
    branch,
    trunk_len,
    branch_len,
    order,
    itself,
    starts,
    table,
    masked,
    mask,
    scale,
    n_heads,
    kv_head,
    item,
    partials,
):
    """One chunk of one trunk row, or of the branch of one row, for the queries of one key head."""
    _, n_trunk_rows, n_kv_heads, capacity, size = trunk.shape
    stride, trunk_slots, n_slots = _layout(size, trunk_len, branch_len)
    in_trunk = item < n_trunk_rows * trunk_slots
    if in_trunk:
        p = item // trunk_slots
        slot = item - p * trunk_slots
        chunk = slot
        cache, cache_rows, length, start = pointer(trunk), n_trunk_rows, trunk_len, 0
        rows, n_rows = shifted(pointer(order), starts[p]), starts[p + 1] - starts[p]
        base = (p * n_kv_heads + kv_head) * capacity * size
    else:
        item -= n_trunk_rows * trunk_slots
        p = item // (n_slots - trunk_slots)
        chunk = item - p * (n_slots - trunk_slots)
        slot = trunk_slots + chunk
        capacity = branch.shape[3]
        cache, cache_rows, length, start = pointer(branch), branch.shape[1], branch_len, trunk_len
        rows, n_rows = shifted(pointer(itself), p), 1
        base = kv_head * capacity * size
    row_stride = n_kv_heads * capacity * size
    first = chunk * CHUNK
    n_listed = min(length - first, CHUNK)
    offsets = stack_offsets(256)
    done = 0
    while done < n_rows:
        # rows of one prompt go together, unless each has a mask of its own
        n_together = 1 if masked else n_rows
        row = get_offset(rows, done)
        n = list_keys(
            first, n_listed, base, row_stride, size, table, row, in_trunk, masked, mask, start, offsets
        )
        attend_listed(
            pointer(qkv),
            qkv.shape[1],
            shifted(rows, done),
            n_together,
            n_heads,
            n_heads // n_kv_heads,
            kv_head,
            size,
            cache,
            shifted(cache, cache_rows * row_stride),
            offsets,
            n,
            scale,
            partials,
            n_slots,
            slot,
            stride,
        )
        done += n_together


@body
def _layout(size, trunk_len, branch_len):
    """(floats of one unfinished softmax, chunks of the trunk, all chunks)."""
    stride = (size + LANES - 1) // LANES * LANES + LANES
    trunk_slots = (trunk_len + CHUNK - 1) // CHUNK
    return stride, trunk_slots, trunk_slots + (branch_len + CHUNK - 1) // CHUNK


@body
def _attend_task(
    worker,
    n_workers,
    n_items,
    qkv,
    trunk,
    branch,
    trunk_len,
    branch_len,
    order,
    itself,
    starts,
    table,
    masked,
    mask,
    scale,
    n_heads,
    partials,
):
    for index in range(worker, trunk.shape[2] * n_items, n_workers):
        attend_item(
            qkv,
            trunk,
            branch,
            trunk_len,
            branch_len,
            order,
            itself,
            starts,
            table,
            masked,
            mask,
            scale,
            n_heads,
            index // n_items,
            index % n_items,
            pointer(partials),
        )


@body
def _join_task(worker, n_workers, n_queries, partials, n_slots, size, stride, out):
    for query in range(worker, n_queries, n_workers):
        here = shifted(pointer(partials), query * n_slots * stride)
        join_chunks(here, n_slots, size, stride, shifted(pointer(out), query * size))


@launch
def attend_decode(
    qkv, trunk, branch, trunk_len, branch_len, trunk_row, table, masked, mask, scale, n_heads, out
):
    """out[r, head] = softmax(scale * q[r, head] . keys of row r) values of row r; 0 for a row without
    visible keys.

    qkv [n_rows, (n_heads + 2 n_kv_heads) size]: queries first; the cache as in `cache.Appended`; mask uint8
    [n_rows, 1, keys] where `masked`; out [n_rows, n_heads size]. float32 or bfloat16 bits. Returns 0, or 1
    and does nothing if the cache names rows that it has not.
    """
    n_rows = qkv.shape[0]
    n_trunk_rows, n_kv_heads, size = trunk.shape[1], trunk.shape[2], trunk.shape[4]
    if not valid_rows(trunk_row, n_trunk_rows, table, branch_len, branch.shape[1]):
        return 1
    stride, trunk_slots, n_slots = _layout(size, trunk_len, branch_len)
    order = np.empty(n_rows, np.int64)
    itself = np.empty(n_rows, np.int64)
    for row in range(n_rows):
        itself[row] = row
    starts = np.empty(n_trunk_rows + 1, np.int64)
    sort_by_trunk_row(trunk_row, order, starts)
    partials = np.empty(n_rows * n_heads * n_slots * stride, np.float32)

    n_items = n_trunk_rows * trunk_slots + n_rows * (n_slots - trunk_slots)
    work = n_rows * n_heads * (trunk_len + branch_len) * size
    threads = threads_for(n_kv_heads * n_items, work, _PARALLEL_SIZE)
    arguments = (
        threads,
        n_items,
        qkv,
        trunk,
        branch,
        trunk_len,
        branch_len,
        order,
        itself,
        starts,
        table,
        masked,
        mask,
        scale,
        n_heads,
        partials,
    )
    parallel_for(_attend_task, threads, threads, arguments)
    join_arguments = (threads, n_rows * n_heads, partials, n_slots, size, stride, out)
    parallel_for(_join_task, threads, threads, join_arguments)
    return 0
