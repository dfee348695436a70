"""The sections of a program: what one launch goes through."""

from __future__ import annotations

import contextlib
import itertools
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from hfopt.program.program import Program

_AT_ONCE = contextlib.nullcontext()


class Section(NamedTuple):
    """Instructions that follow each other.

    turn: the block in which their weights are in memory. first: the number of the first one. Others as in `Program`, the
    formats None without quantised layers.
    """

    turn: AbstractContextManager[None]
    first: int
    code: np.ndarray
    formats: np.ndarray | None
    scalars: np.ndarray


def sections_of(program: Program) -> list[Section]:
    """The whole program; or, where weights come from disk, a section for each layer and one for the head."""
    n, stream = len(program.code), program.stream
    if stream is None:
        return [_section(program, _AT_ONCE, 0, n)]
    layers = [line.layer for line in program.listing.instructions]
    firsts = [i for i in range(n) if i == 0 or layers[i] != layers[i - 1]]
    # rows of tables are looked up before the first layer
    firsts = [0, *firsts[2:]] if layers[0] is None else firsts
    found = []
    for first, end in itertools.pairwise([*firsts, n]):
        layer = layers[end - 1]
        turn = stream.turns[-1 if layer is None else layer]
        found.append(_section(program, turn, first, end))
    return found


def _section(program: Program, turn: AbstractContextManager[None], first: int, end: int) -> Section:
    formats = program.formats[first:end] if program.is_quantized else None
    return Section(turn, first, program.code[first:end], formats, program.scalars[first:end])
