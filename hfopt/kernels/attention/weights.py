"""Weights of a chunk of decode attention: the softmax of a tile of scores, and the values that it weighs.

Models of bfloat16 over codes have integers for weights and queries; these are rounded here.
"""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.attention.blocks import MAX_KEYS
from hfopt.kernels.attention.lanes import (
    largest_weight,
    load_key_factors,
    partner,
    store_integers,
    where_keys,
)
from hfopt.kernels.attention.pack import absmax
from hfopt.kernels.attention.tile import weight_of, where_up_to
from hfopt.kernels.attention.values import tile_columns, weigh_tile
from hfopt.kernels.jit.parallel import body, inlined
from hfopt.kernels.simd.constants import LARGEST, LINE, LOWEST, NAN, ONE, ZERO
from hfopt.kernels.simd.functions import quick_tanh
from hfopt.kernels.simd.memory import bfloat16, load, load_part, prefetch, store
from hfopt.kernels.simd.pointer import as_units, bytes_at, shifted
from hfopt.kernels.simd.tile import units_ratio
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import absolute, fma, larger, splat

_SHORT = np.float32(32767.0)
_SUM = np.float32(2147483520.0)  # below 2^31
_CODE = np.float32(127.0)
_BLOCKS = 2  # blocks of long values, of which one pass takes some columns, and which the L1 cache holds


class Bent(NamedTuple):
    """What scores go through behind products with a scale, which is that of tanh where there is an `outer`."""

    outer: Any  # factor behind tanh; 0: there is none
    has_slopes: Any
    slopes: Any  # pointer to those of a tile, each in all lanes of its query
    distances: Any  # pointer to those of the keys from the last one, or to their ranks, rounded
    is_ranked: Any
    factor: Any  # of what ranks add


@body
def _bend_scores(scores, n_vectors, width, n, scale, factors, bent):
    """Scores as they are weighed, -inf behind the n keys; the largest in each lane."""
    top = splat(LOWEST)
    slope = load(bent.slopes, 0) if bent.has_slopes else splat(ZERO)
    for v in range(n_vectors):
        value = load(scores, v * LANES) * splat(scale)
        if factors is not None:
            value = value * load_key_factors(factors, v * width, width)
        if bent.outer > ZERO:
            value = quick_tanh(value) * splat(bent.outer)
        if bent.has_slopes:
            distance = load_key_factors(bent.distances, v * width, width)
            if bent.is_ranked:
                value = fma(bfloat16(slope * distance), splat(bent.factor), value)
            else:
                value = fma(slope, distance, value)
        value = where_keys(n - v * width, width, value, splat(LOWEST))
        store(scores, v * LANES, value)
        top = larger(value, top)
    return top


@body
def weigh_scores(scores, n_vectors, width, n, scale, factors, like, bent, weights, next_line):
    """weights = 2^(scale * scores - max) for n keys of a tile of queries; maxima, sums, and largest weights, each in all
    lanes of its query.

    like: units of a weight; weights may be the scores. factors: see `attend_blocks`; keys' are applied to scores, and those
    of values to the weights, after these are summed up; largest weights are found of these. bent: what else scores go
    through. next_line: address of what is read next, asked for here, as nothing else is read.
    """
    ahead = bytes_at(next_line)
    top = splat(LOWEST)
    n_whole = n // width
    if bent.outer > ZERO or bent.has_slopes:
        top = _bend_scores(scores, n_vectors, width, n, scale, factors, bent)
    else:
        for v in range(n_whole):
            value = load(scores, v * LANES) * splat(scale)
            if factors is not None:
                value = value * load_key_factors(factors, v * width, width)
                prefetch(ahead, v * LINE)
            store(scores, v * LANES, value)
            top = larger(value, top)
        for v in range(n_whole, n_vectors):
            value = load(scores, v * LANES) * splat(scale)
            if factors is not None:
                value = value * load_key_factors(factors, v * width, width)
            value = where_keys(n - v * width, width, value, splat(LOWEST))
            store(scores, v * LANES, value)
            top = larger(value, top)
    top = larger(top, partner(top, 1))
    top = larger(top, partner(top, 2))
    if width > 4:
        top = larger(top, partner(top, 4))
        top = larger(top, partner(top, 8))
    # all scores may be -inf: these weights have to be 0 beside those of other chunks
    shift = where_up_to(top, splat(LOWEST), splat(ZERO), top)
    total, largest = splat(ZERO), splat(ZERO)
    for v in range(n_vectors):
        value = weight_of(load(scores, v * LANES) - shift, like)
        total = total + value
        if factors is not None:
            value = value * load_key_factors(factors, MAX_KEYS + v * width, width)
            largest = largest_weight(value, largest)
            prefetch(ahead, (n_vectors + v) * LINE)
        store(weights, v * LANES, value)
    total = total + partner(total, 1)
    total = total + partner(total, 2)
    if width > 4:
        total = total + partner(total, 4)
        total = total + partner(total, 8)
    return top, total, largest


@body
def round_query(source, size, padded, out):
    """out[padded] = source / factor as 16-bit integers, so large that no product with codes overflows; returns the factor.

    NaN for a query that is not finite.
    """
    most = absmax(source, size)
    limit = min(_SHORT, np.floor(_SUM / (_CODE * np.float32(size))))
    is_finite = most <= LARGEST
    scale = splat(min(limit / most, LARGEST) if is_finite else ZERO)
    for k in range(0, padded, LANES):
        value = load(source, k) if k + LANES <= size else load_part(source, k, max(size - k, 0))
        value = where_up_to(absolute(value), splat(LARGEST), value, splat(ZERO))
        store_integers(out, k, value * scale)
    return most / limit if is_finite else NAN


@body
def round_weights(weights, largest, n_vectors, width, out):
    """out = weights / factors of a tile as 16-bit integers, in their order; the factors, each in all lanes of its query.

    So small that the sum of a chunk's products with codes does not overflow. NaN for weights that hold NaN.
    """
    top = largest_weight(largest, partner(largest, 1))
    top = largest_weight(top, partner(top, 2))
    if width > 4:
        top = largest_weight(top, partner(top, 4))
        top = largest_weight(top, partner(top, 8))
    # infinite for weights of 0, for which any number will do; the other way round for NaN
    scale = splat(_SHORT) / top
    scale = where_up_to(scale, splat(LARGEST), scale, splat(ZERO))
    for v in range(n_vectors):
        store_integers(out, v * LANES, load(weights, v * LANES) * scale)
    return top * splat(ONE / _SHORT)


@inlined
def weigh_values(weights, factors, queries, like, values, n_blocks, units, aheads, out, out_row, n_valid):
    """out[i, :] = sum over keys of weights[key, i] values[key, :] for the first n_valid queries of a tile.

    like: a pointer to elements of the values; factors, aheads: see `weigh_tile`.
    """
    p = as_units(weights, weights)
    ratio = units_ratio(weights)
    columns = tile_columns(p, 2) if queries == 1 else tile_columns(p, 1)
    step = n_blocks if units * ratio <= columns else _BLOCKS
    for block in range(0, n_blocks, step):
        n = min(n_blocks - block, step)
        here, later = shifted(values, block), shifted(aheads, block)
        w = as_units(shifted(weights, block * queries * LANES), weights)
        more = block > 0
        at = 0
        while at < units:
            left = (units - at) * ratio
            to = shifted(out, at * ratio)
            if queries == 1 and left >= columns:
                weigh_tile(w, factors, like, here, n, units, at, later, to, out_row, n_valid, more, 1, 2)
                at += columns // ratio
            elif queries == 1 and left >= tile_columns(p, 1):
                weigh_tile(w, factors, like, here, n, units, at, later, to, out_row, n_valid, more, 1, 1)
                at += tile_columns(p, 1) // ratio
            elif queries == 1:
                weigh_tile(w, factors, like, here, n, units, at, later, to, out_row, n_valid, more, 1, 0)
                at += LANES
            elif left >= columns:
                weigh_tile(w, factors, like, here, n, units, at, later, to, out_row, n_valid, more, 4, 1)
                at += columns // ratio
            else:
                weigh_tile(w, factors, like, here, n, units, at, later, to, out_row, n_valid, more, 4, 0)
                at += LANES
