"""The cache as the bodies of attention read it: through pointers, and the rows that the rows of a batch name."""

from typing import Any, NamedTuple

from ._parallel import body
from ._pointer import address_as, shifted
from .cache_record import ADDRESS, BRANCH, COLUMNS, HEAD_DIM, KV_HEADS, ROWS, TRUNK


class Segment(NamedTuple):
    """The trunk or the branch, in elements."""

    keys: Any  # pointer to the first
    to_values: Any  # from a key to its value
    row: Any  # size of a physical row
    head: Any  # and of one of its heads
    n_rows: Any
    n_tokens: Any


class Cache(NamedTuple):
    """As in `cache.Appended`."""

    trunk: Segment
    branch: Segment
    trunk_row: Any  # pointers to int32
    table: Any
    table_row: Any  # elements from a row to the next
    n_kv_heads: Any
    size: Any  # channels of a head


@body
def _segment(like, record, part, n_tokens):
    n_rows, n_kv_heads = record[part + ROWS], record[KV_HEADS]
    head = record[part + COLUMNS] * record[HEAD_DIM]
    keys = address_as(record[part + ADDRESS], like)
    return Segment(keys, n_rows * n_kv_heads * head, n_kv_heads * head, head, n_rows, n_tokens)


@body
def open_cache(like, record, trunk_len, branch_len, trunk_row, table, table_row):
    """The cache of a `cache_record`, a pointer to int64; like: a pointer of its element type."""
    return Cache(
        _segment(like, record, TRUNK, trunk_len),
        _segment(like, record, BRANCH, branch_len),
        trunk_row,
        table,
        table_row,
        record[KV_HEADS],
        record[HEAD_DIM],
    )


@body
def valid_rows(cache, n_rows):
    """Whether all rows of the cache that the first n_rows name exist."""
    wrong = 0
    for row in range(n_rows):
        p = cache.trunk_row[row]
        wrong |= p < 0
        wrong |= p >= cache.trunk.n_rows
        for t in range(cache.branch.n_tokens):
            p = cache.table[row * cache.table_row + t]
            wrong |= p < 0
            wrong |= p >= cache.branch.n_rows
    return wrong == 0


@body
def key_of(segment, row, kv_head, token, size):
    """Pointer to a key."""
    return shifted(segment.keys, row * segment.row + kv_head * segment.head + token * size)
