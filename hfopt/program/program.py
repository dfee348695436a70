"""A decoder as a flat program: the instructions for new tokens, over weights where they are and one scratch arena.

Nothing of a request is in a `Program`: threads share it.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hfopt.distributed.ranks import Ranks
from hfopt.errors import InvalidInput
from hfopt.functional.attention import Mask
from hfopt.functional.checks import check_contiguous, check_floats
from hfopt.functional.linear import Weights
from hfopt.kernels import step as kernels
from hfopt.kernels.instruction import Instruction
from hfopt.kernels.linear.rows import ROW_LIMIT
from hfopt.modules.sharded import Shard
from hfopt.patches.angles import AngleTables
from hfopt.program.listing import Listing
from hfopt.program.run import Run, prefill
from hfopt.streaming import LayerStream

if TYPE_CHECKING:
    from hfopt.cache import AppendedEverywhere, Layout


class Breaks(NamedTuple):
    """Lengths of a text beyond which tables are others; last: one beyond which they are others for each length."""

    lengths: tuple[int, ...] = ()
    last: int = sys.maxsize

    def stretch(self, length: int) -> int:
        """A number that differs for lengths with different tables."""
        return length if length > self.last else -bisect.bisect_left(self.lengths, length)

    def n_alike(self, position: int) -> int:
        """Steps from this position on for which tables are the same."""
        if position >= self.last:
            return 1
        place = bisect.bisect_left(self.lengths, position + 1)
        return min([*self.lengths[place : place + 1], self.last]) - position

    @property
    def first_beyond(self) -> tuple[int, ...]:
        """A position behind each of them, in order."""
        return (*self.lengths, *(() if self.last == sys.maxsize else (self.last,)))


_NO_BREAKS = Breaks()


class Table:
    """Contiguous [n, size] of which instructions look up rows.

    build(n): the table with at least n rows, if it can grow. breaks: with more rows than these it is another table, in all
    rows. shard: which rows of a table these are that several processes have together.
    """

    def __init__(
        self,
        rows: Tensor,
        build: Callable[[int], Tensor] | None = None,
        breaks: Breaks = _NO_BREAKS,
        shard: Shard | None = None,
    ) -> None:
        _check_rows(rows)
        self._build, self.breaks, self.shard = build, breaks, shard
        self._rows = {0: rows}  # by stretch

    @classmethod
    def pair_of(cls, tables: AngleTables) -> tuple[Table, Table]:
        """Those of cos and of sin."""

        def build(which: int) -> Callable[[int], Tensor] | None:
            return None if tables.limit is not None else lambda n: tables.build(n)[which]

        breaks = Breaks(tuple(sorted(tables.breaks)), sys.maxsize if tables.last is None else tables.last)
        cos, sin = tables.build(1)
        return cls(cos, build(0), breaks), cls(sin, build(1), breaks)

    @property
    def rows(self) -> Tensor:
        """The table as it is for the first rows."""
        return self._rows[0]

    def __len__(self) -> int:
        """Rows of it as it is for the first ones, of all processes."""
        return len(self.rows) if self.shard is None else self.shard.n

    @property
    def grows(self) -> bool:
        """Whether it can have more rows."""
        return self._build is not None

    def reach(self, n: int) -> Tensor:
        """The table for n rows, with as many if it can have them."""
        place = self.breaks.stretch(n)
        rows = self._rows.get(place)
        if self._build is not None and (rows is None or len(rows) < n):
            known, rows = self._rows[0], self._build(n)
            _check_rows(rows)
            if rows.dtype is not known.dtype or rows.shape[1] != known.shape[1]:
                given, needed = f"{rows.dtype} [{rows.shape[1]}]", f"{known.dtype} [{known.shape[1]}]"
                raise InvalidInput(f"a table has become {given}: {needed} is needed")
            # of those that are for one length, the last will do
            self._rows = {each: kept for each, kept in self._rows.items() if each <= 0} | {place: rows}
        return self._rows[0] if rows is None else rows


def _check_rows(rows: Tensor) -> None:
    check_floats("rows", rows)
    check_contiguous("rows", rows)
    if rows.ndim != 2:
        raise InvalidInput(f"rows has shape {tuple(rows.shape)}: [n, size] is needed")


class Program(NamedTuple):
    """The way of new tokens through a decoder.

    code int64 [n, columns], formats int64 [n or 0, columns], scalars float64 [n]: see `kernels.step`. row_bytes: of the
    arena, for each new token. kept: what owns the addresses in the code.
    """

    dtype: torch.dtype
    code: np.ndarray
    formats: np.ndarray
    scalars: np.ndarray
    tables: tuple[Table, ...]
    breaks: Breaks
    row_bytes: int
    layouts: tuple[Layout, ...]  # of each layer of the cache
    n_logits: int
    listing: Listing
    kept: tuple[Weights | Tensor, ...]
    linears: frozenset[Instruction]  # those of linear layers that there are
    max_keys: int  # that the model takes
    reads_positions: bool
    has_slopes: bool  # whether scores depend on how many keys are between
    has_ranks: bool  # whether models count them, in the dtype of their masks
    adapted: tuple[
        tuple[Any, ...], ...
    ]  # of each place where adapters add something: of each matrix, its layer or None
    ranks: Ranks | None  # the processes that have the model together
    is_exact: bool  # whether logits have the bits of the model's own, which takes torch's tanh to limit them
    stream: LayerStream | None = None  # that weights come from

    @property
    def windows(self) -> set[int]:
        """Tokens that each sees of those before it, itself included, in one layer or another."""
        return {each.window for each in self.listing.instructions if each.token_bytes}

    @property
    def ignores_columns(self) -> bool:
        """Whether it makes no difference in which columns keys are: no distance between them counts, and no window."""
        return not self.has_slopes and not self.has_ranks and self.windows <= {sys.maxsize}

    @property
    def is_quantized(self) -> bool:
        """Whether it has quantised layers."""
        return kernels.QUANTIZED_LINEAR in self.linears

    @property
    def has_floats(self) -> bool:
        """Whether it has linear layers that are not quantised."""
        return kernels.LINEAR in self.linears

    def tensors(self) -> Iterator[Tensor]:
        """Those that the code has addresses of."""
        for each in self.kept:
            for tensor in (each,) if isinstance(each, Tensor) else each.tensors:
                if tensor is not None:
                    yield tensor

    def most_keys(self, *, has_positions: bool, has_gaps: bool, has_flags: bool) -> int:
        """How many keys a call may have at most; 0 if it takes none without positions, where keys are hidden behind one that
        is seen, or under masks that are no flags (of integers) but numbers that may be rounded.
        """
        if (self.reads_positions and not has_positions) or (self.has_slopes and has_gaps):
            return 0
        if self.has_ranks and not has_flags:
            return 0
        return self.max_keys

    def most_checked(self, n_rows: int, position: int) -> int:
        """Tokens a row that one call can check, the first of them at this position: as many as have the bits of steps."""
        return max(1, min(ROW_LIMIT // n_rows, self.breaks.n_alike(position)))

    def work(self, n_rows: int, n_new: int, n_keys: int) -> int:
        """Multiply-adds of a call for n_new tokens in each of n_rows rows, the last of which sees n_keys keys."""
        cached_bytes = sum(each.cached_bytes(n_keys) for each in self.listing.instructions)
        return n_rows * n_new * (self.listing.n_bytes + cached_bytes) // self.dtype.itemsize

    def prefill(
        self, tokens: np.ndarray, positions: np.ndarray, appended: AppendedEverywhere, mask: Mask
    ) -> Tensor:
        """Logits of the last of several new tokens a row: see `run.prefill`."""
        return prefill(self, tokens, positions, appended, mask)

    def steps(self, n_rows: int) -> Run:
        """Begin the decode steps of a request of n_rows rows."""
        return Run(self, n_rows)

    def checks(self, n_rows: int, n_new: int) -> Run:
        """Begin checks of so many tokens of each row."""
        return Run(self, n_rows, n_new, checks=True)
