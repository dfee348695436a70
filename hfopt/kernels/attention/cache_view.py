"""The cache as the bodies of attention read it: through pointers, and the rows that the rows of a batch name."""

from typing import Any, NamedTuple

from hfopt.kernels.attention.cache_record import (
    ADDRESS,
    COLUMNS,
    HEAD_DIM,
    KV_HEADS,
    PREFIX,
    ROWS,
    SCALES,
    SUFFIX,
)
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.simd.pointer import address_as, scales_at, shifted


class Segment(NamedTuple):
    """The prefix or the suffix, in elements."""

    keys: Any  # pointer to the first; codes are int8
    to_values: Any  # from a key to its value
    row: Any  # size of a physical row
    head: Any  # and of one of its heads
    n_rows: Any
    n_tokens: Any
    scales: Any  # pointer to that of the first key; None if there are no codes
    to_value_scales: Any  # from that of a key to that of its value
    n_heads: Any
    columns: Any


class Cache(NamedTuple):
    """As in `cache.Appended`."""

    prefix: Segment
    suffix: Segment
    prefix_row: Any  # pointers to int32
    table: Any
    table_row: Any  # elements from a row to the next
    n_kv_heads: Any
    size: Any  # channels of a head


@body
def _segment(like, record, part, n_tokens):
    n_rows, n_kv_heads = record[part + ROWS], record[KV_HEADS]
    head = record[part + COLUMNS] * record[HEAD_DIM]
    keys, scales = address_as(record[part + ADDRESS], like), scales_at(record[part + SCALES], like)
    to_values = n_rows * n_kv_heads * head
    to_value_scales = n_rows * n_kv_heads * record[part + COLUMNS]
    sizes = to_values, n_kv_heads * head, head, n_rows, n_tokens
    return Segment(keys, *sizes, scales, to_value_scales, n_kv_heads, record[part + COLUMNS])


@body
def open_cache(like, record, prefix_len, suffix_len, prefix_row, table, table_row):
    """The cache of a `cache_record`, a pointer to int64; like: a pointer of its element type."""
    return Cache(
        _segment(like, record, PREFIX, prefix_len),
        _segment(like, record, SUFFIX, suffix_len),
        prefix_row,
        table,
        table_row,
        record[KV_HEADS],
        record[HEAD_DIM],
    )


@body
def _behind(segment, n, size):
    """The segment without its first n tokens."""
    scales = segment.scales
    if scales is not None:
        scales = shifted(scales, n)
    sizes = segment.to_values, segment.row, segment.head, segment.n_rows, segment.n_tokens - n
    keys = shifted(segment.keys, n * size)
    return Segment(keys, *sizes, scales, segment.to_value_scales, segment.n_heads, segment.columns)


@body
def cache_behind(cache, n):
    """The cache without its first n tokens, up to all there are."""
    n_prefix = min(n, cache.prefix.n_tokens)
    n_suffix = n - n_prefix
    prefix, suffix = _behind(cache.prefix, n_prefix, cache.size), _behind(cache.suffix, n_suffix, cache.size)
    table = shifted(cache.table, n_suffix)
    return Cache(prefix, suffix, cache.prefix_row, table, cache.table_row, cache.n_kv_heads, cache.size)


@body
def valid_rows(cache, n_rows):
    """Whether all rows of the cache that the first n_rows name exist."""
    wrong = 0
    for row in range(n_rows):
        p = cache.prefix_row[row]
        wrong |= p < 0
        wrong |= p >= cache.prefix.n_rows
        for t in range(cache.suffix.n_tokens):
            p = cache.table[row * cache.table_row + t]
            wrong |= p < 0
            wrong |= p >= cache.suffix.n_rows
    return wrong == 0


@body
def key_of(segment, row, kv_head, token, size):
    """Pointer to a key."""
    return shifted(segment.keys, row * segment.row + kv_head * segment.head + token * size)


@body
def scale_of(segment, row, kv_head, token):
    """Place of the scale of a key among the `scales`."""
    return (row * segment.n_heads + kv_head) * segment.columns + token
