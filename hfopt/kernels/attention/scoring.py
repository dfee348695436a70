"""What scores go through before the softmax, and what else takes weight in it.

The score of the key at place j for the token at place p is

    softcap * tanh(scale * q.k / softcap) + slope * (j - p)

(softcap and slopes, those of ALiBi, where a model has them). Where slopes are ranked, the last term is another one, as a
model gets it that counts keys in bfloat16:

    scale * bfloat16(slope * bfloat16(j - first))

first is the first key that the last new token of the row sees. Where they are of what is *apart*, it is -slope * |j - p|, as
in encoders. A sink takes weight as a key of that score would, and has no
value. A window hides keys in front of it from a token, whatever its mask lets through.
"""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.attention.lanes import seen_keys
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.simd.constants import LOG2_E, LOWEST, ZERO
from hfopt.kernels.simd.memory import load_scalar
from hfopt.kernels.simd.pointer import address_as, floats_at
from hfopt.kernels.simd.types import LANES

SIGNED, RANKED, APART = range(3)  # what slopes are of


class Scoring(NamedTuple):
    """Scores are of powers of 2 instead of e, once a `slope_of` or `sink_of` is in them."""

    scale: Any  # float32
    softcap: Any  # float32; 0: none
    slopes: Any  # address of float32 [n_heads], or 0
    sinks: Any  # address of [n_heads], of the type of queries, or 0
    window: Any  # keys up to its own that a token may see; 0: all
    ranked: Any  # SIGNED, RANKED or APART; rows of one new token take no APART, as they see no key behind it


@body
def slope_of(scoring, head):
    """Of a query head; 0 if there are none; of powers of e where it is ranked, since it has to be rounded before."""
    if scoring.slopes == 0:
        return ZERO
    slope = load_scalar(floats_at(scoring.slopes), head)
    return slope if scoring.ranked == RANKED else slope * np.float32(LOG2_E)


@body
def bias_factor(scoring):
    """By which ranked slopes times ranks are powers of 2, as products are."""
    return scoring.scale * np.float32(LOG2_E)


@body
def sink_of(scoring, head, like):
    """Of a query head; -inf if there are none. like: a pointer as to queries."""
    if scoring.sinks == 0:
        return LOWEST
    return load_scalar(address_as(scoring.sinks, like), head) * np.float32(LOG2_E)


@body
def first_seen(mask, first, n):
    """Which of the n bytes from `first` on is not 0 before all others; n if all are."""
    key = 0
    while key < n:
        seen = seen_keys(mask, first + key, min(n - key, LANES))
        if seen != 0:
            while seen & 1 == 0:
                seen >>= 1
                key += 1
            return key
        key += LANES
    return n


@body
def skipped_keys(window, n_keys, n_new):
    """Keys in front of the windows of the last n_new of so many keys."""
    return max(n_keys - n_new + 1 - window, 0) if window > 0 else 0
