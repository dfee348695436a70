"""The cache as the bodies of attention read it: through pointers, and the rows that the rows of a batch name."""

from typing import Any, NamedTuple

from hfopt.kernels.attention.cache_record import (
    ADDRESS,
    COLUMNS,
    HEAD,
    HEAD_DIM,
    KV_HEADS,
    PREFIX,
    ROW,
    ROWS,
    SCALES,
    START,
    SUFFIX,
    TO_VALUES,
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
    n_readable: Any  # columns from the first key to the last of its head


class Cache(NamedTuple):
    """As in `cache.Appended`, from the first token on that is seen."""

    prefix: Segment
    suffix: Segment
    prefix_row: Any  # pointers to int32
    table: Any
    table_row: Any  # elements from a row to the next
    n_kv_heads: Any
    size: Any  # channels of a head


@body
def _segment(like, record, part, first, n_tokens):
    n_rows, n_kv_heads, columns = record[part + ROWS], record[KV_HEADS], record[part + COLUMNS]
    column = first - record[part + START]
    keys = shifted(address_as(record[part + ADDRESS], like), column * record[HEAD_DIM])
    scales = scales_at(record[part + SCALES] + 4 * column, like)
    to_value_scales = n_rows * n_kv_heads * columns
    sizes = record[part + TO_VALUES], record[part + ROW], record[part + HEAD], n_rows, n_tokens
    return Segment(keys, *sizes, scales, to_value_scales, n_kv_heads, columns, columns - column)


@body
def holds(record, prefix_len, skipped):
    """Whether a layer still has all tokens behind so many."""
    in_prefix = min(skipped, prefix_len)
    return record[PREFIX + START] <= in_prefix and record[SUFFIX + START] <= skipped - in_prefix


@body
def open_cache(like, record, prefix_len, suffix_len, prefix_row, table, table_row, skipped):
    """The cache of a `cache_record`, a pointer to int64; like: a pointer of its element type. skipped: tokens, the oldest
    ones, that are not looked at, and that it need not hold any more.
    """
    in_prefix = min(skipped, prefix_len)
    in_suffix = skipped - in_prefix
    return Cache(
        _segment(like, record, PREFIX, in_prefix, prefix_len - in_prefix),
        _segment(like, record, SUFFIX, in_suffix, suffix_len - in_suffix),
        prefix_row,
        shifted(table, in_suffix),
        table_row,
        record[KV_HEADS],
        record[HEAD_DIM],
    )


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
def names_keys(segment, size):
    """Whether rows are keys, as in `record_of_keys`: tokens that follow each other in one row do so in memory."""
    return segment.row == size


@body
def names_all(cache):
    """Whether there are no other keys than those that rows name."""
    return cache.prefix.n_tokens == 0 and names_keys(cache.suffix, cache.size)


@body
def key_of(segment, row, kv_head, token, size):
    """Pointer to a key."""
    return shifted(segment.keys, row * segment.row + kv_head * segment.head + token * size)


@body
def scale_of(segment, row, kv_head, token):
    """Place of the scale of a key among the `scales`."""
    return (row * segment.n_heads + kv_head) * segment.columns + token
