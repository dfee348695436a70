"""Products of parameters of which the pairs are tested always, and the rest by `make slow`."""

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairs_of(*dimensions: Iterable[Any]) -> list[Any]:
    """The product as `parametrize` takes it; marked slow is what holds no pair of values that the others lack.

    Most mistakes need one or two values to meet (a dtype and a size), hardly any three.
    """
    values = [list(each) for each in dimensions]
    everything = list(product(*(range(len(each)) for each in values)))
    chosen = _cover(everything)
    return [
        pytest.param(
            *(each[index] for each, index in zip(values, indices, strict=True)),
            marks=() if indices in chosen else pytest.mark.slow,
        )
        for indices in everything
    ]


def _cover(everything: Sequence[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Combinations that hold all pairs; each one the first of those with the most pairs that are missing."""
    pairs = {each: {*combinations(enumerate(each), 2)} for each in everything}
    missing = set().union(*pairs.values())
    chosen = set()
    while missing:
        best = max(everything, key=lambda each: len(pairs[each] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen
