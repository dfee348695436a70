"""What a request lets its steps do: whether only their tokens are wanted, and how far they may go ahead of its loop."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .speculation import InTurn, Speculation

CALL_SECONDS = 0.19  # at most about that: Python answers Ctrl-C between calls


class Greedy(NamedTuple):
    """A request that reads no logits but their `argmax`: tokens that end its rows, int64 [n], and what follows in those."""

    eos: np.ndarray
    pad: int


class Pace(NamedTuple):
    """How far the steps of a request may go ahead of its loop.

    is_alone: no code of the user runs between the steps, in this thread. wait: seconds for which a token may stay unknown to
    the loop after it has been made. speculation: what of the next tokens is guessed, or None.
    """

    is_alone: bool = False
    wait: float = CALL_SECONDS
    speculation: Speculation | InTurn | None = None
