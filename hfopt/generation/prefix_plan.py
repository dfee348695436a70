"""What of several prompts is read by itself, in numbers of tokens."""

import itertools

import numpy as np

from hfopt.cache.prefix_tree import common

LEAST_SHARED = 64  # tokens that rows have in common, for a call of their own
_CALL = 32  # tokens that take as long as what comes with a call


def shared(texts: list[np.ndarray], ends: list[int]) -> list[np.ndarray]:
    """Beginnings that two texts or more have in common, the shorter ones first; ends: the most of each text."""
    order = sorted(range(len(texts)), key=lambda index: texts[index].tobytes())
    found: dict[bytes, np.ndarray] = {}
    for one, other in itertools.pairwise(order):
        length = min(common(texts[one], texts[other]), ends[one], ends[other])
        if length >= LEAST_SHARED:
            text = texts[one][:length]
            found[text.tobytes()] = text
    return sorted(found.values(), key=len)


def common_to_all(texts: list[np.ndarray]) -> int:
    """Tokens that all texts begin with."""
    return min(common(texts[0], text) for text in texts)


def best_column(pads: list[int], known: list[int], length: int) -> int:
    """The column from which all rows are read together, so that there is least to read.

    pads: columns before each text; known: tokens of it that need not be read; length: columns of all. A row that is known
    up to an earlier column than the one that is chosen has to be read alone up to there.
    """
    ends = [pad + n for pad, n in zip(pads, known, strict=True)]

    def cost(column: int) -> int:
        alone = sum(column - end + _CALL for end in ends if end < column)
        return alone + len(ends) * (length - column)

    return min(sorted(set(ends)), key=cost)
