"""Queries, keys and values in the order in which the register tiles of prefill attention read them."""

from hfopt.kernels.attention.cache_view import key_of, scale_of
from hfopt.kernels.attention.tile import store_pair, where_up_to
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.simd import matrix
from hfopt.kernels.simd.constants import LARGEST, ONE, ZERO
from hfopt.kernels.simd.memory import load, load_part, load_scalar, prefetch, store
from hfopt.kernels.simd.pointer import address_of, floats_at, item_bytes, pointer_as, shifted
from hfopt.kernels.simd.tile import transpose_block, units_ratio
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import absolute, fma, max_lanes, maximum, splat, sum_lanes

BLOCK = 32  # units of keys: one in float32, two in bfloat16; their scores stay in an L1 cache
ROWS = 8  # keys, or channels of values, of a register tile: with 3 vectors 24 sums


@body
def rounded(n, step):
    """n, rounded up to a multiple of step."""
    return (n + step - 1) // step * step


@body
def is_finite(number):
    """Neither infinite nor NaN."""
    return abs(number) <= LARGEST


@body
def copy_row(source, size, factor, target, padded):
    """target = factor * source, and zeros up to `padded`, a multiple of 16."""
    for k in range(0, padded, LANES):
        value = load(source, k) if k + LANES <= size else load_part(source, k, max(size - k, 0))
        store(target, k, value * splat(factor))


@body
def absmax(x, size):
    """Largest absolute value of a vector; NaN if there is one."""
    largest = splat(ZERO)
    for k in range(0, size, LANES):
        value = load(x, k) if k + LANES <= size else load_part(x, k, size - k)
        largest = maximum(absolute(value), largest)
    return max_lanes(largest)


@body
def token_of(cache, row, kv_head, token):
    """Pointers to the key and the value of a token of a logical row."""
    segment, place = cache.prefix, cache.prefix_row[row]
    if token >= segment.n_tokens:
        token -= segment.n_tokens
        segment, place = cache.suffix, cache.table[row * cache.table_row + token]
    key = key_of(segment, place, kv_head, token, cache.size)
    return key, shifted(key, segment.to_values)


@body
def scales_of(cache, scales, row, kv_head, token):
    """Scales of the key and the value of a token of a logical row; 1 if scales is None, so that there are no codes."""
    if scales is None:
        return ONE, ONE
    segment, place = cache.prefix, cache.prefix_row[row]
    if token >= segment.n_tokens:
        token -= segment.n_tokens
        segment, place = cache.suffix, cache.table[row * cache.table_row + token]
    first = scale_of(segment, place, kv_head, token)
    return load_scalar(segment.scales, first), load_scalar(segment.scales, first + segment.to_value_scales)


@body
def pack_queries(
    qkv, qkv_row, n_new, row, kv_head, group, q_begin, q_end, width, size, factor, rows, queries
):
    """queries[channel, i] = factor * query q_begin + i of a key head, for i < width; units of pairs of channels in
    bfloat16.

    The query heads of a position are neighbours; behind q_end the last query is repeated. rows: room for 16 rows.
    """
    per_unit = units_ratio(rows)
    padded = rounded(size, LANES * per_unit)
    for column in range(0, width, LANES):
        for i in range(LANES):
            q = min(q_begin + column + i, q_end - 1)
            token = (row * n_new + q // group) * qkv_row
            source = shifted(qkv, token + (kv_head * group + q % group) * size)
            copy_row(source, size, factor, shifted(rows, i * padded), padded)
        for unit in range(0, padded // per_unit, LANES):
            target = shifted(queries, unit * width + column)
            transpose_block(shifted(rows, unit * per_unit), padded, target, width)


@body
def find_keys(cache, scales, row, kv_head, first, n, size, room):
    """(pointer to the keys of n tokens from `first` on, elements from one to the next), readable up to as many as products
    are made of: in the cache where they lie in a row, else copied to `room`, times their scales."""
    prefix = cache.prefix
    n_read, step = rounded(n, ROWS), units_ratio(room)
    if matrix.has_tiles(room):
        n_read, step = rounded(n, matrix.ROWS), LANES * step
    # of codes, which are smaller, copies are made, times their scales, and of float16, which is widened
    if item_bytes(prefix.keys) == item_bytes(room):
        fits = first + n <= prefix.n_tokens and first + n_read <= prefix.n_readable
        if fits and size % step == 0:
            return pointer_as(token_of(cache, row, kv_head, first)[0], room), size
    stride = rounded(size, LANES * units_ratio(room))
    for j in range(n_read):
        token = first + min(j, n - 1)
        key, _ = token_of(cache, row, kv_head, token)
        factor, _ = scales_of(cache, scales, row, kv_head, token)
        copy_row(key, size, factor, shifted(room, j * stride), stride)
    return room, stride


@body
def pack_values(cache, scales, row, kv_head, first, n, size, clean, values):
    """values[channel // 16, j, channel % 16] = values of n tokens from `first` on; 32 units for j, which are pairs of
    tokens in bfloat16. scales: None if the cache holds no codes.

    For tile registers each 16 x 16 units of that are transposed, and 0 behind the last token. With `clean`, 0 for what is
    not finite. Returns whether all are finite.
    """
    probe = splat(ZERO)
    ahead = BLOCK * units_ratio(values) * size
    line = 16 * units_ratio(values)
    for j in range(0, n, 2):
        key, value = token_of(cache, row, kv_head, first + j)
        for k in range(0, 2 * size, line):
            prefetch(key, ahead + k)
            prefetch(value, ahead + k)
        _, after = token_of(cache, row, kv_head, first + min(j + 1, n - 1))
        _, low_factor = scales_of(cache, scales, row, kv_head, first + j)
        _, high_factor = scales_of(cache, scales, row, kv_head, first + min(j + 1, n - 1))
        for k in range(0, size, LANES):
            if k + LANES <= size:
                low, high = load(value, k), load(after, k)
            else:
                low, high = load_part(value, k, size - k), load_part(after, k, size - k)
            if scales is not None:
                low, high = low * splat(low_factor), high * splat(high_factor)
            if clean:
                low = where_up_to(absolute(low), splat(LARGEST), low, splat(ZERO))
                high = where_up_to(absolute(high), splat(LARGEST), high, splat(ZERO))
            # 0 times what is not finite is NaN
            probe = fma(low, splat(ZERO), fma(high, splat(ZERO), probe))
            store_pair(shifted(values, k * BLOCK), j // 2, LANES, 0, low, high)
    if matrix.has_tiles(values):
        n_pairs = (n + 1) // 2
        for k in range(0, rounded(size, LANES) * BLOCK, LANES * BLOCK):
            panel = shifted(values, k)
            for place in range(n_pairs * LANES, rounded(n_pairs, LANES) * LANES, LANES):
                store(floats_at(address_of(panel)), place, splat(ZERO))
            for place in range(0, n_pairs * LANES, LANES * LANES):
                transpose_block(shifted(panel, place), LANES, shifted(panel, place), LANES)
    return sum_lanes(probe) == ZERO
