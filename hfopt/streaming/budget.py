"""What stays in memory, where not all parts of a model fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Split(NamedTuple):
    """kept: the parts that stay. window: bytes for those that come and go."""

    kept: frozenset[int]
    window: int


def split(sizes: Sequence[int], budget: int) -> Split | None:
    """Keep as much as fits beside the parts that come and go; None if the largest part does not fit.

    sizes: bytes of the layers, in the order in which each step goes through them, and of the head behind them.

    A cyclic walk defeats every cache that drops what has not been used for longest, so the parts that stay are always the
    same. Those that go lie as far from each other as possible: one is read while others are computed. There is room for two
    neighbours among them, one in use and one on its way; for one alone only where two do not fit.
    """
    n = len(sizes)
    if sum(sizes) <= budget:
        return Split(frozenset(range(n)), 0)
    for at_once in (2, 1):
        found = [
            Split(frozenset(range(n)) - set(going), _window([sizes[i] for i in going], at_once))
            for n_going in range(1, n)
            for layers in [[(2 * i + 1) * (n - 1) // (2 * n_going) for i in range(n_going)]]
            for going in (layers, [*layers, n - 1])
        ]
        fitting = [(sum(sizes[i] for i in each.kept), each) for each in found]
        fitting = [(kept, each) for kept, each in fitting if kept + each.window <= budget]
        if fitting:
            return max(fitting, key=lambda pair: pair[0])[1]
    return None


def _window(sizes: Sequence[int], at_once: int) -> int:
    if at_once == 1 or len(sizes) == 1:
        return max(sizes)
    return max(one + other for one, other in zip(sizes, [*sizes[1:], sizes[0]], strict=True))
