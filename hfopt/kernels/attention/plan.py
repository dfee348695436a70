"""How decode attention cuts its work, and the scratch that it needs for it, which does not grow with the context.

A stream is what queries read one after the other: the keys and values of one key head in one physical row of the prefix,
or in the suffix of one row. It has chunks of keys, and spans of consecutive chunks, which are the items of work. Their
number is bounded, and no cut depends on the number of threads.
"""

from typing import Any, NamedTuple

from hfopt.kernels.attention.blocks import MAX_KEYS
from hfopt.kernels.attention.cache_view import names_all
from hfopt.kernels.attention.matrix_chunk import QUERIES
from hfopt.kernels.jit.parallel import body, threads_for
from hfopt.kernels.simd.constants import LINE
from hfopt.kernels.simd.pointer import item_bytes
from hfopt.kernels.simd.types import LANES

_MIN_KEYS = 64  # of a chunk
_CHUNK_BYTES = 1 << 17  # of the keys of a chunk, which stay in the L2 cache of a core with their values
_ITEMS = 128  # items that keep many threads busy to the end
_PARALLEL_SIZE = 1 << 17  # bytes or multiply-adds; below, more threads cost more than they save
DONE, JOINED = (
    8,
    9,
)  # counters: items that are done, and queries that are joined, behind the items that are taken


class Cut(NamedTuple):
    """Of a stream of the prefix or the suffix."""

    n_chunks: Any
    n_spans: Any


class Plan(NamedTuple):
    """See `plan_rows`."""

    chunk: Any  # keys
    prefix: Cut
    suffix: Cut
    suffix_heads: Any  # key heads whose keys of a chunk of the suffix are read one after the other
    n_items: Any
    threads: Any


class PrefixCut(NamedTuple):
    """Of the prefix, with the size of its chunks."""

    chunk: Any
    cut: Cut


class Layout(NamedTuple):
    """Of the scratch, in bytes: counters, order of the rows and where it has another row of the prefix, partials, rooms."""

    padded: Any  # channels of a head, with zeros up to whole vectors of units
    chunk: Any  # most keys of one
    order: Any  # where it is
    partials: Any
    rooms: Any  # one for each thread
    room: Any  # size of one
    n_bytes: Any


def layout(n_rows, n_steps, n_heads, n_kv_heads, head_dim, item_size, threads, are_named):
    """For as many keys as there may be, and n_steps steps at once.

    item_size: bytes of an element; are_named: `names_all`.
    """
    units = 4 // item_size * LANES
    padded = (head_dim + units - 1) // units * units
    chunk = MAX_KEYS
    while chunk > _MIN_KEYS and chunk * head_dim * item_size > _CHUNK_BYTES:
        chunk //= 2
    order = 2 * LINE
    partials = order + ((2 * n_rows + 1) * 8 + LINE - 1) // LINE * LINE
    partial = (padded + LANES) * 4
    n_streams = n_kv_heads * n_rows
    n_spans = (_ITEMS + n_kv_heads - 1) // n_kv_heads + (_ITEMS + n_streams - 1) // n_streams
    if are_named:
        n_spans = max(n_spans, (_ITEMS + n_rows - 1) // n_rows)
    rooms = partials + n_rows * n_steps * n_heads * n_spans * partial
    # keys and values that were gathered; queries and their weights, twice where they are in tiles, and sums
    elements = 2 * chunk * padded + QUERIES * (4 * padded + 2 * MAX_KEYS)
    room = QUERIES * partial + elements * item_size
    return Layout(padded, chunk, order, partials, rooms, room, rooms + threads * room)


def scratch_bytes(n_rows, n_heads, n_kv_heads, head_dim, item_size, threads):
    """Bytes with which `decode.attend_rows` does on so many threads over keys that are not named, whatever their number.

    item_size: bytes of an element, 4 or 2.
    """
    return layout(n_rows, 1, n_heads, n_kv_heads, head_dim, item_size, threads, False).n_bytes


layout_of = body(layout)


def part_floats(head_dim, item_size):
    """float32 numbers of a part of a query, see `partials`; item_size: 2 for pairs in a unit, which are
    those of bfloat16, 4 for other queries."""
    units = 4 // item_size * LANES
    return (head_dim + units - 1) // units * units + LANES


part_size = body(part_floats)


@body
def sort_by_prefix_row(prefix_row, n_rows, order, starts):
    """order: row numbers sorted by prefix row; order[starts[g]:starts[g + 1]] have the same one. Returns how many."""
    for row in range(n_rows):
        place = row
        while place > 0 and prefix_row[order[place - 1]] > prefix_row[row]:
            order[place] = order[place - 1]
            place -= 1
        order[place] = row
    n_groups = 0
    for place in range(n_rows):
        if place == 0 or prefix_row[order[place]] != prefix_row[order[place - 1]]:
            starts[n_groups] = place
            n_groups += 1
    starts[n_groups] = n_rows
    return n_groups


@body
def _cut(n_tokens, chunk, n_streams):
    n_chunks = (n_tokens + chunk - 1) // chunk
    return Cut(n_chunks, min(n_chunks, (_ITEMS + n_streams - 1) // n_streams))


@body
def cut_prefix(n_tokens, n_streams, chunk):
    """Of so many keys, in chunks of at most `chunk`."""
    # many keys, but so few that there are chunks for many threads
    while chunk > _MIN_KEYS and n_streams * ((n_tokens + chunk - 1) // chunk) < _ITEMS:
        chunk //= 2
    return PrefixCut(chunk, _cut(n_tokens, chunk, n_streams))


@body
def steps_alike(cache, n_rows, chunk, most):
    """How many steps, each of one key more and the first of them over this cache, `attend_rows` may make at once, up to
    `most`: those that cut its prefix alike, if nothing is in the suffix and no rows share their prefix.
    """
    if cache.suffix.n_tokens > 0:
        return 1
    for row in range(n_rows):
        for other in range(row):
            if cache.prefix_row[row] == cache.prefix_row[other]:
                return 1
    n_streams, n_tokens, n = cache.n_kv_heads * n_rows, cache.prefix.n_tokens, 1
    first = cut_prefix(n_tokens, n_streams, chunk)
    while n < most and cut_prefix(n_tokens + n, n_streams, chunk) == first:
        n += 1
    return n


@body
def plan_rows(cache, n_rows, n_steps, n_groups, n_heads, chunk, threads):
    """How `attend_rows` is to do its work; n_groups: of rows that share their prefix; at most `chunk` keys and so many
    threads."""
    prefix, suffix = cache.prefix, cache.suffix
    n_streams, suffix_heads = cache.n_kv_heads * n_groups, 1
    if names_all(cache):
        # all heads of a block of keys lie side by side: few keys, so that soon the next head is read
        suffix_heads, chunk = cache.n_kv_heads, min(chunk, _MIN_KEYS)
    chunk, of_prefix = cut_prefix(prefix.n_tokens, n_streams, chunk)
    n_suffix_streams = cache.n_kv_heads // suffix_heads * n_rows
    of_suffix = _cut(suffix.n_tokens, chunk, n_suffix_streams)
    n_items = n_streams * of_prefix.n_spans + n_suffix_streams * of_suffix.n_spans
    n_multiply_adds = n_rows * n_steps * n_heads * (prefix.n_tokens + suffix.n_tokens) * cache.size
    n_read = n_streams * prefix.n_tokens + cache.n_kv_heads * n_rows * suffix.n_tokens
    work = max(n_multiply_adds, n_read * cache.size * 2 * item_bytes(prefix.keys))
    threads = min(threads, threads_for(n_items, work, _PARALLEL_SIZE))
    return Plan(chunk, of_prefix, of_suffix, suffix_heads, n_items, threads)
