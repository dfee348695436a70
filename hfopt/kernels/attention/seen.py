"""Which keys several new tokens see: by order, by the bytes of a mask, by a window."""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.attention.scoring import first_seen
from hfopt.kernels.attention.tile import where_bytes, where_up_to
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.simd.constants import LOWEST, ONE, ZERO
from hfopt.kernels.simd.memory import load, store
from hfopt.kernels.simd.tile import stack_floats, transpose_block
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import splat, sum_lanes

ALL, CAUSAL, BYTES = range(3)


class Seen(NamedTuple):
    """Which keys the new tokens see."""

    kind: Any  # ALL, CAUSAL: those up to the token itself, or BYTES
    bytes: Any  # pointer to uint8 [n_rows, n_new, n_keys], 0 for what is hidden
    mask_row: Any  # bytes from a token to the next
    n_new: Any
    n_keys: Any
    window: Any  # of these, keys up to the last one by order that a token sees at most; 0: all
    ahead: Any  # keys behind its own that a token sees at most, of kind CAUSAL


class Part(NamedTuple):
    """The keys of a block that some positions see."""

    end: Any  # behind the last one that any may see; 0 if there is none
    early: Any  # those before are in front of the window of a position
    late: Any  # and those from there on behind a position
    masked: Any  # whether bytes hide any


@body
def count_seen(seen, row, begin, end, first, n):
    """How many bytes of the mask are not 0, for positions begin to end and n keys from `first` on."""
    total = splat(ZERO)
    for position in range(begin, end):
        start = (row * seen.n_new + position) * seen.mask_row + first
        for j in range(0, n, LANES):
            total = total + where_bytes(seen.bytes, start + j, n - j, splat(ONE), splat(ZERO))
    return sum_lanes(total)


@body
def end_by_order(seen, position):
    """The one behind the last key that a position sees of kind CAUSAL, if there are as many; not positive if there are more
    new tokens than keys and it is one of the first."""
    return seen.n_keys - seen.n_new + seen.ahead + position + 1


@body
def first_key(seen, position):
    """The first key that a position may see."""
    if seen.window == 0:
        return 0
    return max(end_by_order(seen, position) - seen.window, 0)


@body
def last_key(seen, position):
    """The one behind the last key that a position may see."""
    return min(end_by_order(seen, position), seen.n_keys) if seen.kind == CAUSAL else seen.n_keys


@body
def visible_part(seen, row, begin, end, first, n):
    """What positions begin to end see of n keys from `first` on."""
    early, late, masked = 0, n, False
    if seen.kind == CAUSAL:
        late = max(min(n, last_key(seen, begin) - first), 0)
        n = max(min(n, last_key(seen, end - 1) - first), 0)
    if seen.window > 0:
        early = max(min(n, first_key(seen, end - 1) - first), 0)
        if first + n <= first_key(seen, begin):
            n = 0
    if seen.kind == BYTES and n > 0:
        count = count_seen(seen, row, begin, end, first, n)
        masked = count != np.float32((end - begin) * n)
        n = n if count > ZERO else 0
    return Part(n, early, late, masked)


@body
def sees_any(seen, row, position):
    """Whether a position sees a key."""
    first = first_key(seen, position)
    if seen.kind != BYTES:
        return first < last_key(seen, position)
    return count_seen(seen, row, position, position + 1, first, seen.n_keys - first) > ZERO


@body
def origin_of(seen, row):
    """The first key that the last position of a row sees."""
    if seen.kind != BYTES:
        return 0
    return first_seen(seen.bytes, ((row + 1) * seen.n_new - 1) * seen.mask_row, seen.n_keys)


@body
def _hide_early(scores, width, n, offset, limits):
    """-inf to the first n scores of a query where j + offset is less than its limit."""
    for j in range(n):
        for place in range(j * width, (j + 1) * width, LANES):
            limit = load(limits, place - j * width)
            score = where_up_to(limit, splat(np.float32(j + offset)), load(scores, place), splat(LOWEST))
            store(scores, place, score)


@body
def _hide_late(scores, width, begin, n, offset, limits):
    """-inf to scores begin to n of a query for which j + offset is more than its limit."""
    for j in range(begin, n):
        for place in range(j * width, (j + 1) * width, LANES):
            limit = load(limits, place - j * width)
            score = where_up_to(splat(np.float32(j + offset)), limit, load(scores, place), splat(LOWEST))
            store(scores, place, score)


@body
def _hide_masked(scores, width, n, seen, row, group, q_begin, q_end, first):
    """-inf to the scores of n keys from `first` on that are hidden by a byte."""
    by_query = stack_floats(256)
    by_key = stack_floats(256)
    for column in range(0, width, LANES):
        for start in range(0, n, LANES):
            for i in range(LANES):
                q = min(q_begin + column + i, q_end - 1)
                place = (row * seen.n_new + q // group) * seen.mask_row + first + start
                store(by_query, i * LANES, where_bytes(seen.bytes, place, n - start, splat(ONE), splat(ZERO)))
            transpose_block(by_query, LANES, by_key, LANES)
            for j in range(min(n - start, LANES)):
                place = (start + j) * width + column
                is_seen = load(by_key, j * LANES)
                store(scores, place, where_up_to(splat(ONE), is_seen, load(scores, place), splat(LOWEST)))


@body
def hide(scores, width, part, seen, row, group, q_begin, q_end, first, offset, limits):
    """-inf to the scores of a block from key `first` on that queries q_begin to q_end do not see.

    limits: of each query, the position; offset: what added to the place of a key in the block makes it comparable.
    """
    offset -= seen.ahead
    if part.masked:
        _hide_masked(scores, width, part.end, seen, row, group, q_begin, q_end, first)
    if part.late < part.end:
        _hide_late(scores, width, part.late, part.end, offset, limits)
    if part.early > 0:
        _hide_early(scores, width, min(part.early, part.end), offset + seen.window - 1, limits)
