"""Adapters in a program: it has the places where they add something, and each request brings what that is.

So they are switched, scaled, added and removed without another program.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hfopt.functional import Delta, DeltaTables, Mask
from hfopt.patches.adapters import Applied, Unreadable, applied
from hfopt.program.run import Run, prefill

if TYPE_CHECKING:
    from hfopt.cache import AppendedEverywhere, Layout
    from hfopt.program.listing import Listing
    from hfopt.program.program import Program


class Choice(NamedTuple):
    """What is added: of each place, of each of its matrices."""

    places: tuple[tuple[Applied, ...], ...]

    @classmethod
    def of(cls, program: Program, *, everything: bool = False) -> Choice:
        """As the layers are now, or all of their adapters. Raises Unreadable."""
        read = (_read(layers, program.dtype, everything) for layers in program.adapted)
        return cls(tuple(read))

    def fits(self, n_rows: int) -> bool:
        """Whether it is for requests of so many rows."""
        rows = (each.rows for place in self.places for each in place)
        return all(each is None or len(each) == n_rows for each in rows)

    def tables(self, n_rows: int) -> DeltaTables:
        """As kernels read it."""
        return DeltaTables([_by_row(place, n_rows) for place in self.places], n_rows)


def _read(layers: Sequence[Any], dtype: torch.dtype, everything: bool = False) -> tuple[Applied, ...]:
    return tuple(
        applied(layer, part, dtype, everything=everything)
        for part, layer in enumerate(layers)
        if layer is not None
    )


def _by_row(place: Sequence[Applied], n_rows: int) -> list[list[Delta]]:
    rows: list[list[Delta]] = [[] for _ in range(n_rows)]
    for each in place:
        for row, deltas in zip(rows, each.of_rows(n_rows), strict=True):
            row += deltas
    return rows


@dataclass(frozen=True, eq=False)
class AdaptedProgram:
    """A program with the adapters of a request: a `generation.protocols.StepProgram`."""

    program: Program
    choice: Choice
    _turns: Iterator[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_turns", itertools.cycle(range(len(self.choice.places))))

    def holds_in_part(self) -> bool:
        """Whether one of the places, another one each time, has the same adapters still."""
        place = next(self._turns)
        try:
            now = _read(self.program.adapted[place], self.program.dtype)
        except Unreadable:
            return False
        return now == self.choice.places[place]

    @property
    def listing(self) -> Listing:
        return self.program.listing

    @property
    def layouts(self) -> Sequence[Layout]:
        return self.program.layouts

    @property
    def ignores_columns(self) -> bool:
        """See `Program.ignores_columns`."""
        return self.program.ignores_columns

    def most_keys(self, **given: bool) -> int:
        """See `Program.most_keys`."""
        return self.program.most_keys(**given)

    def most_checked(self, n_rows: int, position: int) -> int:
        """See `Program.most_checked`."""
        return self.program.most_checked(n_rows, position)

    def work(self, n_rows: int, n_new: int, n_keys: int) -> int:
        """See `Program.work`."""
        return self.program.work(n_rows, n_new, n_keys)

    def prefill(
        self, tokens: np.ndarray, positions: np.ndarray, appended: AppendedEverywhere, mask: Mask
    ) -> Tensor:
        """See `run.prefill`."""
        return prefill(self.program, tokens, positions, appended, mask, self.choice.tables(len(tokens)))

    def steps(self, n_rows: int) -> Run:
        """Begin the decode steps of a request of n_rows rows."""
        return Run(self.program, n_rows, deltas=self.choice.tables(n_rows))

    def checks(self, n_rows: int, n_new: int) -> Run:
        """See `Program.checks`."""
        return Run(self.program, n_rows, n_new, self.choice.tables(n_rows), checks=True)
