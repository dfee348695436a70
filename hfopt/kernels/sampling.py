"""Choosing tokens: argmax, and log-softmax with top-k over beams.

A NaN counts as the largest value, and of equal values the first wins, as in torch.
"""

import numpy as np

from ._jit import launch
from ._parallel import body, parallel_for, threads_for
from ._simd import (
    LANES,
    exp,
    fence,
    lane,
    load,
    load_part,
    load_scalar,
    max_lanes,
    maximum,
    pointer,
    shifted,
    splat,
    sum_lanes,
    where_part,
)

BLOCK = 1024  # logits that are looked at again only if their largest one makes it necessary
_PARALLEL_SIZE = 1 << 16  # logits; below, more threads cost more than they save
_NOTHING = np.float32(-np.inf)
_ZERO = np.float32(0.0)


@body
def greater(a, b):
    """Whether a comes before b: it is larger, or a NaN beside a number."""
    return a > b or (a != a and b == b)


@body
def load_or_nothing(x, k, size):
    """16 values from x + k, -inf from `size` on."""
    if k + LANES <= size:
        return load(x, k)
    return where_part(size - k, load_part(x, k, size - k), splat(_NOTHING))


@body
def largest_of(x, first, last):
    """Largest of x[first:last], NaN if one is."""
    top = splat(_NOTHING)
    for k in range(first, last, LANES):
        top = maximum(top, load_or_nothing(x, k, last))
    return max_lanes(top)


@body
def argmax_row(x, size):
    """Index of the largest of `size` values."""
    best = _NOTHING
    place = 0
    for first in range(0, size, BLOCK):
        largest = largest_of(x, first, min(first + BLOCK, size))
        if greater(largest, best):
            best = largest
            place = first
    while place < size - 1:
        value = load_scalar(x, place)
        if value == best or value != value:
            break
        place += 1
    return place


@body
def _argmax_task(row, x, size, out):
    out[row] = argmax_row(shifted(pointer(x), row * size), size)


@launch
def argmax(x, out):
    """out[r] = index of the largest of x[r]; x [n, size] float32 or bfloat16 bits, out int64 [n]."""
    n_rows, size = x.shape
    parallel_for(_argmax_task, threads_for(n_rows, x.size, _PARALLEL_SIZE), n_rows, (x, size, out))


@body
def log_sum_exp(x, size, maxima):
    """(largest value, log of the sum of e^(value - largest)); the largest of each block goes to maxima."""
    largest = _NOTHING
    total = _ZERO
    for first in range(0, size, BLOCK):
        last = min(first + BLOCK, size)
        top = largest_of(x, first, last)
        maxima[first // BLOCK] = top
        if greater(top, largest):
            total *= lane(exp(splat(largest - top)), 0)
            largest = top
        # a block of nothing but -inf adds nothing, not even where no other value has been seen
        if top != _NOTHING:
            sums = splat(_ZERO)
            for k in range(first, last, LANES):
                sums = sums + exp(load_or_nothing(x, k, last) - splat(largest))
            total += sum_lanes(sums)
    return largest, np.log(total)


@body
def score_of(x, largest, log_sum, running):
    """log-softmax + running score, rounded after each operation as torch does."""
    return fence(fence(x - splat(largest)) - splat(log_sum)) + splat(running)


@body
def insert(value, place, scores, places, count, k):
    """Puts a value into a sorted list of `count` <= k, behind its equals; returns the new count."""
    if count == k:
        if not greater(value, scores[k - 1]):
            return count
        count -= 1
    i = count
    while i > 0 and greater(value, scores[i - 1]):
        scores[i] = scores[i - 1]
        places[i] = places[i - 1]
        i -= 1
    scores[i] = value
    places[i] = place
    return count + 1


@body
def top_k_row(x, size, running, k, maxima, scores, places):
    """The k <= size best of log_softmax(x) + running, sorted."""
    largest, log_sum = log_sum_exp(x, size, maxima)
    count = 0
    for first in range(0, size, BLOCK):
        last = min(first + BLOCK, size)
        best = lane(score_of(splat(maxima[first // BLOCK]), largest, log_sum, running), 0)
        if count < k or greater(best, scores[k - 1]):
            for start in range(first, last, LANES):
                values = score_of(load_or_nothing(x, start, last), largest, log_sum, running)
                if count < k or greater(max_lanes(values), scores[k - 1]):
                    for j in range(min(last - start, LANES)):
                        count = insert(lane(values, j), start + j, scores, places, count, k)


@body
def _top_k_task(row, x, size, running, k, maxima, scores, places):
    top_k_row(shifted(pointer(x), row * size), size, running[row], k, maxima[row], scores[row], places[row])


@launch
def log_softmax_top_k(x, running, k, n_beams, scores, places):
    """scores, places[b] = top k of (log_softmax(x[r]) + running[r]) over the n_beams rows r of group b,
    flattened.

    x [groups n_beams, size] float32 or bfloat16 bits; running float32 [groups n_beams]; scores float32,
    places int64 [groups, k], k <= n_beams size. A place is beam * size + token.
    """
    n_rows, size = x.shape
    row_k = min(k, size)
    maxima = np.empty((n_rows, (size + BLOCK - 1) // BLOCK), np.float32)
    row_scores = np.empty((n_rows, row_k), np.float32)
    row_places = np.empty((n_rows, row_k), np.int64)
    arguments = (x, size, running, row_k, maxima, row_scores, row_places)
    parallel_for(_top_k_task, threads_for(n_rows, x.size, _PARALLEL_SIZE), n_rows, arguments)
    for group in range(n_rows // n_beams):
        count = 0
        for beam in range(n_beams):
            row = group * n_beams + beam
            for i in range(row_k):
                place = beam * size + row_places[row, i]
                count = insert(row_scores[row, i], place, scores[group], places[group], count, k)
