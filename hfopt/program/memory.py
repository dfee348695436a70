"""Where the values of a program lie in its arena: memory is given anew after the last use of a value."""

from collections.abc import Sequence
from dataclasses import dataclass

LINE = 64  # bytes of a cache line, on which values begin


@dataclass
class Lifetime:
    """A value of n_bytes, written by instruction `first` and used by `last` for the last time."""

    n_bytes: int
    first: int
    last: int


def plan(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """(place of each value, bytes of them all): values that live at once do not overlap.

    In the order of their first use, each takes the smallest gap between living ones that it fits into; so what one
    instruction reads and writes never shares memory. (Robson, "An Estimate of the Store Size Necessary for Dynamic Storage
    Allocation", 1971, has the bounds of such schemes.)
    """
    places, size = [0] * len(lifetimes), 0
    living: list[int] = []
    for index in sorted(range(len(lifetimes)), key=lambda index: lifetimes[index].first):
        value = lifetimes[index]
        n_bytes = _whole_lines(value.n_bytes)
        living = [each for each in living if lifetimes[each].last >= value.first]
        living.sort(key=places.__getitem__)
        gaps, end = [], 0
        for each in living:
            if places[each] - end >= n_bytes:
                gaps.append((places[each] - end, end))
            end = max(end, places[each] + _whole_lines(lifetimes[each].n_bytes))
        places[index] = min(gaps)[1] if gaps else end
        living.append(index)
        size = max(size, places[index] + n_bytes)
    return places, size


def _whole_lines(n_bytes: int) -> int:
    return -(-n_bytes // LINE) * LINE
