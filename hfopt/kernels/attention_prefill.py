"""Prefill attention: several new tokens a row, in blocks with an online softmax
(https://arxiv.org/abs/2205.14135).

One item of work is a block of positions of one row, for all query heads of one key head. Blocks of 64 keys
are widened to float32 and turned, so that both products run on register tiles of 6 queries. Each query
meets the blocks of keys in order, whatever the items are, so the bits depend on nothing else.
"""

import numpy as np

from ._attention_tile import multiply_tile, where_bytes
from ._jit import launch
from ._parallel import body, parallel_for, threads_for
from ._simd import (
    LANES,
    absolute,
    exp,
    fma,
    lane,
    load,
    load_part,
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
from ._tile import stack_floats, transpose_block
from .attention import valid_rows

ALL, CAUSAL, BYTES = range(3)

TILE = 6  # queries of one register tile; with KEYS, a literal below
KEYS = 64
CHAIN = 32  # channels that are summed in a row
_BLOCK = 21  # tiles of one item, shared by the query heads of a key head
_PARALLEL_SIZE = 1 << 17  # multiply-adds; below, more threads cost more than they save
STATS = 3  # numbers kept of each query: largest score, sum of exponentials, whether a key was seen
_MAX, _SUM, _SEEN = range(3)
_NOTHING = np.float32(-np.inf)
_INFINITY = np.float32(np.inf)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@body
def widen_row(source, size, target):
    """target = source as float32, zeros up to a multiple of 16; returns the largest magnitude or NaN."""
    largest = splat(_ZERO)
    k = 0
    while k + LANES <= size:
        value = load(source, k)
        store(target, k, value)
        largest = maximum(largest, absolute(value))
        k += LANES
    if k < size:
        value = load_part(source, k, size - k)
        store(target, k, value)
        largest = maximum(largest, absolute(value))
    return max_lanes(largest)


@body
def clear(target, n):
    """Zeros to n floats, a multiple of 16."""
    for k in range(0, n, LANES):
        store(target, k, splat(_ZERO))


@body
def key_of(cache, row, kv_head, token):
    """Pointer to token `token` of a physical row of keys."""
    _, _, n_kv_heads, capacity, size = cache.shape
    return shifted(pointer(cache), ((row * n_kv_heads + kv_head) * capacity + token) * size)


@body
def pack_block(trunk, branch, trunk_len, trunk_row, table, row, kv_head, first, n, keys, values, rows):
    """n <= 64 keys from token `first` on as keys[channel, 64], their values as values[64, channel], float32.

    rows: room for 16 rows. Returns whether all values are finite.
    """
    size = trunk.shape[4]
    padded = (size + LANES - 1) // LANES * LANES
    largest = _ZERO
    for start in range(0, n, LANES):
        for j in range(LANES):
            token = first + start + j
            here = shifted(rows, j * padded)
            target = shifted(values, (start + j) * padded)
            if start + j >= n:
                clear(here, padded)
                clear(target, padded)
            else:
                if token < trunk_len:
                    key = key_of(trunk, trunk_row[row], kv_head, token)
                    value = shifted(key, trunk.size // 2)
                else:
                    token -= trunk_len
                    key = key_of(branch, table[row, token], kv_head, token)
                    value = shifted(key, branch.size // 2)
                widen_row(key, size, here)
                magnitude = widen_row(value, size, target)
                if magnitude > largest or magnitude != magnitude:
                    largest = magnitude
        for channel in range(0, padded, LANES):
            transpose_block(shifted(rows, channel), padded, shifted(keys, channel * KEYS + start), KEYS)
    return largest < _INFINITY


@body
def visible_keys(kind, mask, row, position, n_new, n_keys, first, n):
    """Number of leading keys of a block to look at; 0 if the query at `position` sees none of n."""
    if kind == CAUSAL:
        return max(min(n_keys - n_new + position + 1 - first, n), 0)
    if kind == BYTES:
        seen = 0
        for k in range(first, first + n):
            seen |= mask[row, position, k]
        if seen == 0:
            return 0
    return n


@body
def soften_row(scores, scale, visible, kind, mask, place, sums, stats):
    """One row of 64 products becomes exp(scale * product - largest so far); weighted sums and statistics so
    far are rescaled.

    sums: (pointer, channels); place: of the mask bytes of this row and block.
    """
    top = splat(_NOTHING)
    for k in range(0, KEYS, LANES):
        value = load(scores, k) * splat(scale)
        if kind == BYTES:
            value = where_bytes(mask, place + k, visible - k, value, splat(_NOTHING))
        elif k + LANES > visible:
            value = where_part(visible - k, value, splat(_NOTHING))
        store(scores, k, value)
        top = maximum(top, value)
    before = load_scalar(stats, _MAX)
    largest = max_lanes(top)
    if largest <= before or before != before:
        largest = before
    # all scores so far may be -inf: their exponentials have to be 0 beside those to come
    shift = _ZERO if largest == _NOTHING else largest
    total = splat(_ZERO)
    for k in range(0, KEYS, LANES):
        value = exp(load(scores, k) - splat(shift))
        store(scores, k, value)
        total = total + value
    factor = _ONE
    if largest != before:
        factor = lane(exp(splat(before - shift)), 0)
        target, padded = sums
        for k in range(0, padded, LANES):
            store(target, k, load(target, k) * splat(factor))
    store_scalar(stats, _MAX, largest)
    store_scalar(stats, _SUM, load_scalar(stats, _SUM) * factor + sum_lanes(total))
    store_scalar(stats, _SEEN, _ONE)


@body
def add_values(weights, n, values, padded, finite, sums):
    """sums[i] += weights[i, :n] values[:n] for a tile of rows; if not finite, without those of weight 0."""
    if finite:
        column = 0
        while column < padded:
            here = shifted(sums, column)
            if padded - column >= 4 * LANES:
                multiply_tile(weights, KEYS, shifted(values, column), padded, n, here, padded, 6, 4, True)
                column += 4 * LANES
            else:
                multiply_tile(weights, KEYS, shifted(values, column), padded, n, here, padded, 6, 1, True)
                column += LANES
        return
    for i in range(TILE):
        for j in range(n):
            weight = load_scalar(weights, i * KEYS + j)
            if weight != _ZERO:
                for k in range(0, padded, LANES):
                    place = i * padded + k
                    store(sums, place, fma(splat(weight), load(values, j * padded + k), load(sums, place)))


@body
def attend_tile(
    q,
    scale,
    keys,
    values,
    finite,
    padded,
    n,
    kind,
    mask,
    row,
    position,
    n_valid,
    n_new,
    n_keys,
    first,
    sums,
    stats,
):
    """A tile of 6 queries, at positions from `position` on, against one packed block of n keys."""
    scores = stack_floats(6 * 64)
    most = 0
    for i in range(n_valid):
        most = max(most, visible_keys(kind, mask, row, position + i, n_new, n_keys, first, n))
    if most == 0:
        return
    for channel in range(0, padded, CHAIN):
        n_channels = min(CHAIN, padded - channel)
        here = shifted(keys, channel * KEYS)
        multiply_tile(shifted(q, channel), padded, here, KEYS, n_channels, scores, KEYS, 6, 4, channel > 0)
    for i in range(TILE):
        here = shifted(scores, i * KEYS)
        visible = 0
        if i < n_valid:
            visible = visible_keys(kind, mask, row, position + i, n_new, n_keys, first, n)
        if visible == 0:
            clear(here, KEYS)
        else:
            place = ((row * n_new) + position + i) * n_keys + first
            target = shifted(sums, i * padded), padded
            soften_row(here, scale, visible, kind, pointer(mask), place, target, shifted(stats, i * STATS))
    add_values(scores, most, values, padded, finite, sums)


@body
def finish_row(sums, stats, size, out):
    """out = weighted sums / sum of exponentials; 0 for a query that saw no key."""
    inverse = splat(_ONE / load_scalar(stats, _SUM) if load_scalar(stats, _SEEN) > _ZERO else _ZERO)
    for column in range(0, size, LANES):
        store_part(out, column, min(size - column, LANES), load(sums, column) * inverse)


@body
def block_size(n_heads, n_kv_heads, n_new):
    """Positions of one item, a multiple of the tile."""
    tiles = max(_BLOCK // (n_heads // n_kv_heads), 3)
    return min(tiles, (n_new + TILE - 1) // TILE) * TILE


@body
def attend_positions(
    qkv,
    n_new,
    trunk,
    branch,
    trunk_len,
    branch_len,
    trunk_row,
    table,
    kind,
    mask,
    scale,
    n_heads,
    row,
    kv_head,
    begin,
    room,
    out,
):
    """One item: positions from `begin` on of one row, for the queries of one key head. room: scratch."""
    _, _, n_kv_heads, _, size = trunk.shape
    group = n_heads // n_kv_heads
    positions = block_size(n_heads, n_kv_heads, n_new)
    padded = (size + LANES - 1) // LANES * LANES
    n_keys = trunk_len + branch_len
    n_valid = min(positions, n_new - begin)
    queries = room
    sums = shifted(queries, group * positions * padded)
    keys = shifted(sums, group * positions * padded)
    values = shifted(keys, KEYS * padded)
    rows = shifted(values, KEYS * padded)
    stats = shifted(rows, LANES * padded)
    for head in range(group):
        for t in range(positions):
            place = head * positions + t
            here = shifted(queries, place * padded)
            if t < n_valid:
                token = (row * n_new + begin + t) * qkv.shape[1]
                source = shifted(pointer(qkv), token + (kv_head * group + head) * size)
                widen_row(source, size, here)
            else:
                clear(here, padded)
            store_scalar(stats, STATS * place + _MAX, _NOTHING)
            store_scalar(stats, STATS * place + _SUM, _ZERO)
            store_scalar(stats, STATS * place + _SEEN, _ZERO)
    clear(sums, group * positions * padded)

    end = n_keys
    if kind == CAUSAL:
        end = n_keys - n_new + begin + n_valid
    for first in range(0, end, KEYS):
        n = min(end - first, KEYS)
        most = 0
        for t in range(n_valid):
            most = max(most, visible_keys(kind, mask, row, begin + t, n_new, n_keys, first, n))
        if most > 0:
            finite = pack_block(
                trunk, branch, trunk_len, trunk_row, table, row, kv_head, first, n, keys, values, rows
            )
            for place in range(0, group * positions, TILE):
                t = place % positions
                if t < n_valid:
                    attend_tile(
                        shifted(queries, place * padded),
                        scale,
                        keys,
                        values,
                        finite,
                        padded,
                        n,
                        kind,
                        mask,
                        row,
                        begin + t,
                        min(n_valid - t, TILE),
                        n_new,
                        n_keys,
                        first,
                        shifted(sums, place * padded),
                        shifted(stats, STATS * place),
                    )
    for head in range(group):
        for t in range(n_valid):
            place = head * positions + t
            token = (row * n_new + begin + t) * n_heads * size
            target = shifted(pointer(out), token + (kv_head * group + head) * size)
            finish_row(shifted(sums, place * padded), shifted(stats, STATS * place), size, target)


@body
def _attend_task(
    worker,
    n_workers,
    n_items,
    qkv,
    n_new,
    trunk,
    branch,
    trunk_len,
    branch_len,
    trunk_row,
    table,
    kind,
    mask,
    scale,
    n_heads,
    room,
    out,
):
    n_kv_heads = trunk.shape[2]
    positions = block_size(n_heads, n_kv_heads, n_new)
    n_blocks = (n_new + positions - 1) // positions
    for item in range(worker, n_items, n_workers):
        index = item // n_blocks
        # later positions see more keys: turning the order from head to head gives each worker its share
        block = (item + index) % n_blocks
        attend_positions(
            qkv,
            n_new,
            trunk,
            branch,
            trunk_len,
            branch_len,
            trunk_row,
            table,
            kind,
            mask,
            scale,
            n_heads,
            index // n_kv_heads,
            index % n_kv_heads,
            block * positions,
            shifted(pointer(room), worker * room.shape[1]),
            out,
        )


@launch
def attend_prefill(
    qkv, n_new, trunk, branch, trunk_len, branch_len, trunk_row, table, kind, mask, scale, n_heads, out
):
    """As `attention.attend_decode` for n_new tokens a row, the last ones of the row's keys.

    qkv [n_rows n_new, (n_heads + 2 n_kv_heads) size]; kind: ALL keys are seen, CAUSAL: those up to the
    token itself, or BYTES: what mask, uint8 [n_rows, n_new, keys], says; out [n_rows n_new, n_heads size].
    """
    n_rows = qkv.shape[0] // n_new
    n_kv_heads, size = trunk.shape[2], trunk.shape[4]
    if not valid_rows(trunk_row, trunk.shape[1], table, branch_len, branch.shape[1]):
        return 1
    positions = block_size(n_heads, n_kv_heads, n_new)
    n_blocks = (n_new + positions - 1) // positions
    n_items = n_rows * n_kv_heads * n_blocks
    n_queries = n_heads // n_kv_heads * positions
    padded = (size + LANES - 1) // LANES * LANES
    work = qkv.shape[0] * n_heads * (trunk_len + branch_len) * size
    threads = threads_for(n_items, work, _PARALLEL_SIZE)
    room = np.empty(
        (threads, 2 * n_queries * padded + (2 * KEYS + LANES) * padded + STATS * n_queries), np.float32
    )
    arguments = (
        threads,
        n_items,
        qkv,
        n_new,
        trunk,
        branch,
        trunk_len,
        branch_len,
        trunk_row,
        table,
        kind,
        mask,
        scale,
        n_heads,
        room,
        out,
    )
    parallel_for(_attend_task, threads, threads, arguments)
    return 0
