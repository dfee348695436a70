"""Unfinished softmaxes of decode attention: the weighted values of a query over some keys, and statistics behind them.

They are merged as the chunks of a span are read, and joined over the spans in the end; or those of a query are merged into
one, its *part* of a softmax over keys that others have too, which `join_partials` joins with theirs.
"""

from hfopt.kernels.attention.tile import weight_of
from hfopt.kernels.jit.parallel import body, inlined
from hfopt.kernels.simd.constants import LOWEST, ONE, ZERO
from hfopt.kernels.simd.memory import load, load_scalar, store, store_part, store_scalar
from hfopt.kernels.simd.pointer import shifted
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import fma, lane, splat

MAX, SUM, SEEN = range(3)  # the largest score, the sum of exponentials, and whether any key is visible


@inlined
def merge_partial(fresh, partial, size, like):
    """Adds the unfinished softmax `fresh` of other keys of a query to `partial`. like: units of a weight."""
    here, there = shifted(fresh, size), shifted(partial, size)
    largest, known, seen = load_scalar(here, MAX), load_scalar(there, MAX), load_scalar(there, SEEN) > ZERO
    if seen and not largest > known:
        largest = known
    shift = ZERO if largest == LOWEST else largest
    new = weight_of(splat(load_scalar(here, MAX) - shift), like)
    total = lane(new, 0) * load_scalar(here, SUM)
    if seen:
        old = weight_of(splat(known - shift), like)
        total += lane(old, 0) * load_scalar(there, SUM)
        for column in range(0, size, LANES):
            store(partial, column, fma(old, load(partial, column), new * load(fresh, column)))
    else:
        for column in range(0, size, LANES):
            store(partial, column, new * load(fresh, column))
    store_scalar(there, MAX, largest)
    store_scalar(there, SUM, total)
    store_scalar(there, SEEN, ONE)


@body
def leave_part(partials, n_slots, step, size, part):
    """part = the unfinished softmax over all slots of one query, `step` apart: the weighted values, as many as `size`, and
    statistics behind them.
    """
    for column in range(0, size + LANES, LANES):
        store(part, column, splat(ZERO))
    for slot in range(n_slots):
        here = shifted(partials, slot * step)
        if load_scalar(here, size + SEEN) > ZERO:
            merge_partial(here, part, size, part)


@body
def join_partials(partials, n_slots, step, size, stats, sink, like, out):
    """out = the values weighted by the softmax over all slots of one query, `step` apart, and a sink; 0 if no key is
    visible. stats: place of the statistics behind the values.
    """
    largest = sink
    seen = False
    for slot in range(n_slots):
        here = shifted(partials, slot * step + stats)
        if load_scalar(here, SEEN) > ZERO:
            seen = True
            if load_scalar(here, MAX) > largest:
                largest = load_scalar(here, MAX)
    shift = ZERO if largest == LOWEST else largest
    total = lane(weight_of(splat(sink - shift), like), 0)
    for slot in range(n_slots):
        here = shifted(partials, slot * step + stats)
        if load_scalar(here, SEEN) > ZERO:
            weight = lane(weight_of(splat(load_scalar(here, MAX) - shift), like), 0)
            total += weight * load_scalar(here, SUM)
            store_scalar(here, MAX, weight)
    inverse = splat(ONE / total)
    for column in range(0, size, LANES):
        value = splat(ZERO)
        for slot in range(n_slots):
            here = shifted(partials, slot * step)
            if load_scalar(here, stats + SEEN) > ZERO:
                weight = splat(load_scalar(here, stats + MAX))
                value = fma(weight, load(here, column), value)
        if seen:
            value = value * inverse
        store_part(out, column, min(size - column, LANES), value)
