"""Choosing tokens: argmax, and log-softmax with top-k over beams.

A row of logits is cut into blocks of a fixed size, which the threads share out: few rows keep many threads busy, and
the bits do not depend on their number. What is known of each block then tells which few of them to look at again.

A NaN counts as the largest value, and of equal values the first wins, as in torch.
"""

import numpy as np
from numba import carray

from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.simd.constants import LOWEST, ZERO
from hfopt.kernels.simd.functions import exp
from hfopt.kernels.simd.memory import load, load_part, load_scalar, load_two
from hfopt.kernels.simd.pointer import address_as, floats_at, integers_at, pointer, shifted
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import (
    fence,
    lane,
    lanes_from,
    larger,
    max_lanes,
    maximum,
    splat,
    sum_lanes,
    where_part,
)

BLOCK = 1024
_PARALLEL_SIZE = 1 << 15  # logits; below, more threads cost more than they save


@body
def greater(a, b):
    """Whether a comes before b: it is larger, or a NaN beside a number."""
    return a > b or (a != a and b == b)


@body
def load_or_nothing(x, k, size):
    """16 values from x + k, -inf from `size` on."""
    if k + LANES <= size:
        return load(x, k)
    return where_part(size - k, load_part(x, k, size - k), splat(LOWEST))


# ---- argmax ---------------------------------------------------------------------------------------------------------


@body
def largest_of(x, size):
    """Largest of `size` values, NaN if one is."""
    a, b, c, d = splat(LOWEST), splat(LOWEST), splat(LOWEST), splat(LOWEST)
    k = 0
    while k + 4 * LANES <= size:
        low, high = load_two(x, k)
        a, b = maximum(a, low), maximum(b, high)
        low, high = load_two(x, k + 2 * LANES)
        c, d = maximum(c, low), maximum(d, high)
        k += 4 * LANES
    while k < size:
        a = maximum(a, load_or_nothing(x, k, size))
        k += LANES
    return max_lanes(maximum(maximum(a, b), maximum(c, d)))


@body
def _largest_task(index, x, size, n_blocks, maxima):
    row = index // n_blocks
    first = (index - row * n_blocks) * BLOCK
    maxima[row, index - row * n_blocks] = largest_of(shifted(x, row * size + first), min(size - first, BLOCK))


@body
def place_of_largest(x, size, maxima):
    """First index of the largest of `size` values, given the largest of each block."""
    best = LOWEST
    place = 0
    for block in range(maxima.shape[0]):
        if greater(maxima[block], best):
            best = maxima[block]
            place = block * BLOCK
    while place < size - 1:
        value = load_scalar(x, place)
        if value == best or value != value:
            break
        place += 1
    return place


@body
def find_largest(x, n_rows, size, out):
    """out[r] = index of the largest of x[r]. Pointers to x [n_rows, size] and out int64 [n_rows]."""
    n_blocks = (size + BLOCK - 1) // BLOCK
    maxima = np.empty((n_rows, n_blocks), np.float32)
    n = n_rows * n_blocks
    parallel_for(_largest_task, threads_for(n, n_rows * size, _PARALLEL_SIZE), n, (x, size, n_blocks, maxima))
    for row in range(n_rows):
        out[row] = place_of_largest(shifted(x, row * size), size, maxima[row])


@launch
def argmax(like, x, n_rows, size, out):
    """`find_largest` for addresses of x [n_rows, size] of the type of `like`, and of out int64 [n_rows]."""
    find_largest(address_as(x, pointer(like)), n_rows, size, integers_at(out))


@body
def _best_allowed(x, size, bits, n_words):
    """First index of the largest of those values whose bit is set; 0 if all of them are -inf, -1 if no bit is set."""
    best, place = LOWEST, -1
    for word in range(min(n_words, (size + 31) // 32)):
        left = bits[word]
        if left != 0:
            for token in range(32 * word, min(32 * word + 32, size)):
                if left >> (token & 31) & 1 != 0:
                    place = max(place, 0)
                    value = load_scalar(x, token)
                    if value > best:
                        best, place = value, token
    return place


@launch
def argmax_allowed(like, x, n_rows, size, bits, out):
    """out[r] = index of the largest of x[r] with -inf for what is not allowed, -1 if nothing is; a NaN stays what it is.

    As in `argmax`; bits int32 [n_rows, words]: of allowed indices, the lowest first, 0 beyond the words.
    """
    x, out, n_words = address_as(x, pointer(like)), integers_at(out), bits.shape[1]
    find_largest(x, n_rows, size, out)
    for row in range(n_rows):
        values, allowed, place = shifted(x, row * size), shifted(pointer(bits), row * n_words), out[row]
        value = load_scalar(values, place)
        is_allowed = place < 32 * n_words and allowed[min(place // 32, n_words - 1)] >> (place & 31) & 1 != 0
        if value == value and not is_allowed:
            out[row] = _best_allowed(values, size, allowed, n_words)


# ---- log-softmax and top-k ------------------------------------------------------------------------------------------


@body
def block_statistics(x, size):
    """(largest number m of a block, sum of e^(x - m)); the sum is NaN if a value is NaN or inf."""
    a, b = splat(LOWEST), splat(LOWEST)
    k = 0
    while k + 2 * LANES <= size:
        low, high = load_two(x, k)
        a, b = larger(low, a), larger(high, b)
        k += 2 * LANES
    while k < size:
        a = larger(load_or_nothing(x, k, size), a)
        k += LANES
    top = max_lanes(larger(a, b))
    # a block of nothing but -inf adds nothing, and must not subtract it from itself
    shift = splat(ZERO if top == LOWEST else top)
    a, b = splat(ZERO), splat(ZERO)
    k = 0
    while k + 2 * LANES <= size:
        low, high = load_two(x, k)
        a = a + exp(low - shift)
        b = b + exp(high - shift)
        k += 2 * LANES
    while k < size:
        a = a + exp(load_or_nothing(x, k, size) - shift)
        k += LANES
    return top, sum_lanes(a + b)


@body
def _statistics_task(index, x, size, n_blocks, maxima, sums):
    row = index // n_blocks
    block = index - row * n_blocks
    first = block * BLOCK
    top, total = block_statistics(shifted(x, row * size + first), min(size - first, BLOCK))
    maxima[row, block] = top
    sums[row, block] = total


@body
def log_sum_exp(maxima, sums, n_blocks):
    """(largest value of a row, log of the sum of e^(value - largest)) from the statistics of its blocks."""
    top = splat(LOWEST)
    for k in range(0, n_blocks, LANES):
        top = maximum(top, load_or_nothing(maxima, k, n_blocks))
    largest = max_lanes(top)
    total = splat(ZERO)
    for k in range(0, n_blocks, LANES):
        weight = exp(load_or_nothing(maxima, k, n_blocks) - splat(largest))
        part = load_part(sums, k, min(n_blocks - k, LANES))
        total = total + weight * part
    return largest, np.log(sum_lanes(total))


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
def kth_score(best, k, scores, places):
    """The k-th best score among the best ones of blocks, -inf if there are fewer blocks. Overwrites scores, places.

    At least k logits score as much, so none that scores less is among the k best.
    """
    count = 0
    for row in range(best.shape[0]):
        for block in range(best.shape[1]):
            count = insert(best[row, block], block, scores, places, count, k)
    return scores[k - 1] if count == k else LOWEST


@body
def top_k_rows(x, size, running, maxima, sums, k, scores, places):
    """The k best log_softmax(x[row]) + running[row] over some rows, sorted; a place is row * size + token.

    maxima, sums: statistics of the blocks of each row; they are overwritten.
    """
    n_rows, n_blocks = maxima.shape
    for row in range(n_rows):
        largest, log_sum = log_sum_exp(pointer(maxima[row]), pointer(sums[row]), n_blocks)
        sums[row, 0] = largest
        sums[row, 1] = log_sum
        for block in range(n_blocks):
            score = score_of(splat(maxima[row, block]), largest, log_sum, running[row])
            maxima[row, block] = lane(score, 0)
    bound = kth_score(maxima, k, scores, places)
    count = 0
    for row in range(n_rows):
        for block in range(n_blocks):
            best = maxima[row, block]
            if greater(bound, best) or (count == k and not greater(best, scores[k - 1])):
                continue
            first = row * size + block * BLOCK
            last = row * size + min((block + 1) * BLOCK, size)
            for start in range(first, last, LANES):
                logits = load_or_nothing(x, start, last)
                values = score_of(logits, sums[row, 0], sums[row, 1], running[row])
                reached = lanes_from(values, scores[k - 1] if count == k else bound)
                if reached != 0:
                    for j in range(min(last - start, LANES)):
                        if (reached >> j) & 1:
                            count = insert(lane(values, j), start + j, scores, places, count, k)


@body
def _top_k_task(group, x, size, running, k, n_beams, maxima, sums, scores, places):
    first, last = group * n_beams, (group + 1) * n_beams
    top_k_rows(
        shifted(x, first * size),
        size,
        running[first:last],
        maxima[first:last],
        sums[first:last],
        k,
        scores[group],
        places[group],
    )


@launch
def log_softmax_top_k(like, x, n_rows, size, running, k, n_beams, scores, places):
    """scores, places[b] = top k of (log_softmax(x[r]) + running[r]) over the n_beams rows r of group b,
    flattened.

    Addresses of x [n_rows = groups n_beams, size] of the type of `like`; running float32
    [n_rows]; scores float32 and places int64 [groups, k], k <= n_beams size. A place is beam * size + token.
    """
    x, groups = address_as(x, pointer(like)), n_rows // n_beams
    n_blocks = (size + BLOCK - 1) // BLOCK
    maxima = np.empty((n_rows, n_blocks), np.float32)
    sums = np.empty((n_rows, max(n_blocks, 2)), np.float32)  # room for two figures of the whole row
    n = n_rows * n_blocks
    threads = threads_for(n, n_rows * size, _PARALLEL_SIZE)
    parallel_for(_statistics_task, threads, n, (x, size, n_blocks, maxima, sums))
    arguments = (
        x,
        size,
        carray(floats_at(running), n_rows),
        k,
        n_beams,
        maxima,
        sums,
        carray(floats_at(scores), (groups, k)),
        carray(integers_at(places), (groups, k)),
    )
    parallel_for(_top_k_task, min(threads, groups), groups, arguments)
