"""Scores of a tile of prefill attention, bent as a `Scoring` says, before they are hidden and weighed."""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.attention.scoring import APART, RANKED, bias_factor
from hfopt.kernels.attention.softmax import LIMIT, SLOPE, TILE
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.simd.constants import LOG2_E, ONE, ZERO
from hfopt.kernels.simd.functions import quick_tanh
from hfopt.kernels.simd.memory import bfloat16, load, store
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import absolute, fma, splat


class Powers(NamedTuple):
    """What products become: first tanh, then powers of 2."""

    sign: Any  # of queries, so that the largest product has the largest score
    inner: Any  # factor before tanh
    outer: Any  # and behind it; 0: there is none
    scale: Any  # factor of what there is then
    rest: Any  # the same when scores are weighed: 1 where they have been scaled for a bias
    bias: Any  # factor of what ranks add


@body
def powers_of(scoring):
    """The same for all queries and keys."""
    scale, bias = np.float64(scoring.scale), bias_factor(scoring)
    sign = ONE if scoring.scale > ZERO else ZERO if scoring.scale == ZERO else -ONE
    if scoring.softcap > ZERO:
        softcap = np.float64(scoring.softcap)
        return Powers(sign, np.float32(abs(scale) / softcap), np.float32(softcap * LOG2_E), ONE, ONE, bias)
    power = ONE if scoring.scale == ZERO else np.float32(abs(scale) * LOG2_E)
    return Powers(sign, ZERO, ZERO, power, power if scoring.slopes == 0 else ONE, bias)


@body
def _cap(scores, width, n, inner, outer):
    """scores = outer * tanh(inner * scores) of n keys."""
    for place in range(0, n * width, LANES):
        store(scores, place, quick_tanh(load(scores, place) * splat(inner)) * splat(outer))


@body
def _add_bias(scores, width, n, scale, offset, apart, stats):
    """scores = scale * scores + slope * (j + offset - limit) of n keys; or - slope * |...|."""
    for column in range(0, width, LANES):
        slope = load(stats, SLOPE * TILE + column)
        limit = load(stats, LIMIT * TILE + column)
        for j in range(n):
            place = j * width + column
            distance = splat(np.float32(j + offset)) - limit
            if apart:
                distance = splat(ZERO) - absolute(distance)
            bias = distance * slope
            store(scores, place, fma(load(scores, place), splat(scale), bias))


@body
def _add_ranked_bias(scores, width, n, scale, factor, rank, stats):
    """scores = scale * scores + factor * slope * (rank + j) of n keys, rounded as `scoring` says."""
    for column in range(0, width, LANES):
        slope = load(stats, SLOPE * TILE + column)
        for j in range(n):
            place = j * width + column
            bias = bfloat16(bfloat16(splat(np.float32(rank + j))) * slope) * splat(factor)
            store(scores, place, fma(load(scores, place), splat(scale), bias))


@body
def bend_scores(scores, width, n, powers, scoring, offset, rank, stats):
    """Scores of n keys, such that `powers.rest` times them are powers of 2. offset: what added to the place of a key makes
    it comparable with limits; rank: of the first key.
    """
    if powers.outer > ZERO:
        _cap(scores, width, n, powers.inner, powers.outer)
    if scoring.ranked == RANKED:
        _add_ranked_bias(scores, width, n, powers.scale, powers.bias, rank, stats)
    elif scoring.slopes != 0:
        _add_bias(scores, width, n, powers.scale, offset, scoring.ranked == APART, stats)
