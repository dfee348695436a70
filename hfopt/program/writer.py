"""What instructions are written with: rows of numbers, and the scratch that they name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.functional.linear import Weights
from hfopt.kernels import instruction as kernels
from hfopt.kernels import step

from .listing import Instruction as Line

LINE = 64  # bytes of a cache line, on which slots begin
NO_FORMAT = (0,) * kernels.FORMAT_COLUMNS


class Slot(NamedTuple):
    """Scratch for `size` values a row; place: bytes a row before it, or `kernels.LOGITS`."""

    place: int
    size: int
    n_bytes: int
    dtype: torch.dtype


class Writer:
    """Lays out the scratch and writes a row of numbers for each instruction (see `kernels.instruction`).

    layer: the one that the next instructions belong to, for the listing.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.layer: int | None = None
        self._code: list[np.ndarray] = []
        self._scalars: list[float] = []
        self._listing: list[Line] = []
        self._formats: list[list[int]] = []
        self._kept: list[Weights | Tensor] = []
        self._row_bytes = 0
        self._per_row = False  # behind TAKE_LAST
        self._free: list[Slot] = []

    def _slot(self, size: int, dtype: torch.dtype) -> Slot:
        n_bytes = -(-size * dtype.itemsize // LINE) * LINE
        fitting = next((each for each in self._free if each.n_bytes == n_bytes), None)
        if fitting is not None:
            self._free.remove(fitting)
            return fitting._replace(size=size, dtype=dtype)
        self._row_bytes += n_bytes
        return Slot(self._row_bytes - n_bytes, size, n_bytes, dtype)

    def release(self, *slots: Slot) -> None:
        """These slots are not read any more."""
        self._free += slots

    def _check(self, slot: Slot, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or self.dtype
        if slot.place < 0 or slot.dtype is not dtype:
            raise InvalidInput(f"an operand is {slot.dtype} [{slot.size}]: {dtype} in scratch is needed")

    def _add(
        self,
        instruction: kernels.Instruction,
        shapes: str,
        columns: dict[str, int],
        reads: Sequence[Slot],
        out: Slot,
        *,
        scalar: float = 0.0,
        format: Sequence[int] = NO_FORMAT,
        then: str = "",
        **n_bytes: int,
    ) -> None:
        self._code.append(step.row_of(instruction, PER_ROW=int(self._per_row), **columns))
        self._scalars.append(scalar)
        self._formats.append(list(format))
        self._listing.append(
            Line(
                name=instruction.name,
                layer=self.layer,
                shapes=shapes,
                then=then,
                reads=tuple(each.place for each in reads),
                writes=None if out.place == kernels.LOGITS else out.place,
                **n_bytes,
            )
        )
