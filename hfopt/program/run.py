"""The prompt of a request and its decode steps: a program, run over the request's own scratch."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.functional.attention import KINDS, Mask, check_lengths, checked_bytes
from hfopt.functional.checks import ELEMENTS, prepare_threads
from hfopt.functional.deltas import NO_DELTAS, DeltaTables
from hfopt.functional.rotary import held_by, record_of_buffers
from hfopt.kernels import step as kernels
from hfopt.kernels.attention import cache_record as records
from hfopt.kernels.attention.seen import BYTES
from hfopt.kernels.instruction import OP, UNKNOWN_INDEX
from hfopt.program.memory import LINE
from hfopt.program.sections import sections_of

if TYPE_CHECKING:
    from hfopt.cache import AppendedEverywhere, Buffers
    from hfopt.program.program import Program

__all__ = ["Run", "prefill"]

_AT_ONCE = contextlib.nullcontext()
_NO_MASK = np.empty((0, 0), np.uint8)
_NO_EOS = np.empty(0, np.int64)


class Run:
    """A program and what it needs for the rows of one request: the arena, scratch of the kernels, and what they are told of
    tables and cache. It makes one step after the other.

    n_new: tokens of a row in each call; checks: whether it gives logits of all of them. deltas: what adapters add in
    each place that the program has for them, or None.

    The memory that the program reads stays alive with it, even if a thread gives a parameter other memory in the meantime.
    """

    def __init__(
        self,
        program: Program,
        n_rows: int,
        n_new: int = 1,
        deltas: DeltaTables | None = None,
        *,
        checks: bool = False,
    ) -> None:
        """Raises `InvalidInput` if there are no rows or no tokens."""
        if n_rows < 1 or n_new < 1:
            raise InvalidInput(f"n_rows is {n_rows} and n_new {n_new}: at least 1 is needed")
        self.program = program
        self.n_rows, self.n_new, self.n_last = n_rows, n_new, n_new if checks else 1
        self.ids = np.zeros((2, n_rows * n_new), np.int64)
        self.none_finished = np.zeros(n_rows, np.bool_)
        self.threads = torch.get_num_threads()
        sizes = n_rows, n_new, self.n_last, self.threads
        self.scratch_bytes: int = kernels.scratch_bytes(
            ELEMENTS[program.dtype], program.code, program.formats if program.is_quantized else None, *sizes
        )
        self._arena = np.empty(program.row_bytes * n_rows * n_new + self.scratch_bytes + LINE, np.uint8)
        self.arena = -(-self._arena.ctypes.data // LINE) * LINE
        self.scratch = self.arena + program.row_bytes * n_rows * n_new
        self.tables = np.zeros((len(program.tables), 2), np.int64)
        self.held = ELEMENTS[program.dtype]  # tells of which type the elements of the cache are
        self.records = np.zeros((len(program.layouts), records.LENGTH), np.int64)
        # of prefix and suffix, in all layers: first column, the one behind the last, and rows
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._least_rows: list[int] = []
        self._n_positions = self._stretch = 0  # that tables have rows for; see `Breaks`
        self._rows: list[Tensor] = []
        self._buffers: list[Buffers] = []
        self._sections = sections_of(program)
        self._storages = [tensor.untyped_storage() for tensor in program.tensors()]
        self._deltas, self._given = deltas, NO_DELTAS
        if deltas is not None:
            expected = len(program.adapted), n_rows, 2
            if deltas.ranges.shape != expected:
                raise InvalidInput(f"deltas are {deltas.ranges.shape}: {expected} is needed")
            self._room = np.empty((n_rows * n_new, deltas.room_row), np.float32)
            addresses = (each.ctypes.data for each in (deltas.ranges, deltas.terms, self._room))
            self._given = np.array([*addresses, deltas.room_row], np.int64)

    @functools.cached_property
    def _scratch_logits(self) -> Tensor:
        """Logits that nobody keeps, [n_rows, n_last, n_logits]."""
        return _empty_logits(self)

    def reach(self, n_positions: int) -> None:
        """Make a row for each position of a text of so many tokens in tables that grow."""
        stretch = self.program.breaks.stretch(n_positions)
        if n_positions > self._n_positions or stretch != self._stretch:
            self._stretch = stretch
            tables = self.program.tables
            rows = self._rows = [table.reach(n_positions) for table in tables]
            self.tables[:] = [(each.data_ptr(), len(each)) for each in rows]
            growing = (len(each) for each, table in zip(rows, tables, strict=True) if table.grows)
            self._n_positions = min(growing, default=sys.maxsize)

    def read(self, appended: AppendedEverywhere) -> None:
        """Note where the cache has its layers. Raises `InvalidInput` unless the new tokens fit into all of them."""
        program, n_rows = self.program, self.n_rows
        first, buffers = appended
        if len(buffers) != len(program.layouts):
            raise InvalidInput(f"appended has {len(buffers)} layers: {len(program.layouts)} are needed")
        if first.n_new < 1 or len(first.prefix_row) != n_rows:
            given = f"{first.n_new} tokens of {len(first.prefix_row)} rows"
            raise InvalidInput(f"appended has {given}: tokens of {n_rows} rows are needed")
        if buffers != self._buffers:
            held = {held_by(each, program.dtype).dtype for each in buffers}
            if len(held) > 1:
                raise InvalidInput(f"appended has layers of {held}: all have to be of one type")
            self.held = held_by(buffers[0], program.dtype)
            layouts = zip(buffers, program.layouts, strict=True)
            self.records[:] = [record_of_buffers(each, layout[2], *layout[:2]) for each, layout in layouts]
            self._buffers = buffers
            parts = [self.records[:, part:] for part in (records.PREFIX, records.SUFFIX)]
            behind = [each[:, records.START] + each[:, records.COLUMNS] for each in parts]
            self._starts = [int(each[:, records.START].max()) for each in parts]
            self._ends = [int(each.min()) for each in behind]
            self._least_rows = [int(each[:, records.ROWS].min()) for each in parts]
        check_lengths(first, n_rows)
        lengths, ends, part = (first.prefix_len, first.suffix_len), self._ends, int(first.in_suffix)
        is_stored = lengths[0] <= ends[0] and lengths[1] <= ends[1]
        # no layer has left behind where new tokens go
        is_new = lengths[part] - first.n_new >= self._starts[part]
        if not is_stored or not is_new or self._least_rows[part] < n_rows:
            raise InvalidInput(
                f"appended ends at columns {lengths[0]} of {ends[0]} and {lengths[1]} of {ends[1]}: "
                f"room for {first.n_new} tokens of {n_rows} rows is needed"
            )

    def logits(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        appended: AppendedEverywhere,
        mask: np.ndarray | None = None,
    ) -> Tensor:
        """Logits [n_rows, n_new, n_logits] of the new tokens of each row, whose keys and values are written to the cache.

        Those of several tokens that are checked have the bits of as many steps. tokens: int64 [n_rows, n_new], or
        [n_rows] of one; positions: of the first ones, int64 [n_rows], no more tokens than `Program.most_checked` behind
        the largest; appended: all layers after they made room for the tokens; mask: uint8 [n_rows, keys], 0 for what is
        hidden. Raises `InvalidInput`.
        """
        if self.n_new != self.n_last:
            raise InvalidInput(f"scratch is for {self.n_new} tokens of a prompt: it makes no step")
        if appended.first.n_new != self.n_new:
            raise InvalidInput(f"appended has {appended.first.n_new} tokens: {self.n_new} are needed")
        logits, chosen = _empty_logits(self), np.empty((0, self.n_rows), np.int64)
        hidden = self._checked(tokens, positions, appended, mask)
        if self.n_new > 1:
            if self.n_new > self.program.breaks.n_alike(int(positions.max())):
                raise InvalidInput(f"positions are {positions}: tables are others within {self.n_new} tokens")
            positions = positions[:, None] + np.arange(self.n_new)
        self.call(tokens, positions, appended, 0, BYTES, hidden, logits, chosen)
        return logits

    def choose(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        appended: AppendedEverywhere,
        mask: np.ndarray | None = None,
        finished: np.ndarray | None = None,
        eos: np.ndarray = _NO_EOS,
        pad: int = 0,
    ) -> np.ndarray:
        """`argmax` of these logits, and of those of the tokens that it gives, and so on: int64 [n_steps, n_rows].

        As many steps as appended has new tokens; fewer if a row ends or a token has no place in the model's tables, and then
        the caller takes back the rest of the columns. eos: int64 [n], tokens that end a row; finished: bool [n_rows], rows
        that have ended and go on with `pad`, None where no row has. Others as in `logits`, the mask for the keys of the
        last step. Raises `InvalidInput`.
        """
        if self.n_new != 1:
            raise InvalidInput(f"scratch is for {self.n_new} tokens of a row: one is needed")
        hidden = self._checked(tokens, positions, appended, mask)
        n_columns = appended.first.n_new
        # sections are gone through for one step
        n_steps = self.program.breaks.n_alike(int(positions.max())) if len(self._sections) == 1 else 1
        chosen = np.empty((min(n_columns, n_steps), self.n_rows), np.int64)
        if finished is not None and (finished.dtype != np.bool_ or finished.shape != (self.n_rows,)):
            given = f"{finished.dtype} {finished.shape}"
            raise InvalidInput(f"finished is {given}: bool {(self.n_rows,)} is needed")
        if eos.dtype != np.int64 or eos.ndim != 1:
            raise InvalidInput(f"eos is {eos.dtype} {eos.shape}: int64 [n] is needed")
        logits = self._scratch_logits
        cache = appended, n_columns - 1
        n_steps = self.call(tokens, positions, *cache, BYTES, hidden, logits, chosen, finished, eos, pad)
        return chosen[:n_steps]

    def _checked(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        appended: AppendedEverywhere,
        mask: np.ndarray | None,
    ) -> np.ndarray:
        """The mask of decode steps as the kernel reads it."""
        n_rows, first = self.n_rows, appended.first
        of_tokens = (n_rows, self.n_new) if self.n_new > 1 else (n_rows,)
        for name, given, shape in (("tokens", tokens, of_tokens), ("positions", positions, (n_rows,))):
            if given.dtype != np.int64 or given.shape != shape:
                raise InvalidInput(f"{name} is {given.dtype} {given.shape}: int64 {shape} is needed")
        self.read(appended)
        if mask is None:
            return _NO_MASK
        n_keys = first.prefix_len + first.suffix_len
        if mask.dtype != np.uint8 or mask.ndim != 2 or len(mask) != n_rows or mask.shape[1] < n_keys:
            is_given = f"{mask.dtype} {mask.shape}"
            raise InvalidInput(f"mask is {is_given}: uint8 {(n_rows, n_keys)}, or more keys, is needed")
        return np.ascontiguousarray(mask)

    def call(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        appended: AppendedEverywhere,
        n_ahead: int,
        kind: int,
        hidden: np.ndarray,
        logits: Tensor,
        chosen: np.ndarray,
        finished: np.ndarray | None = None,
        eos: np.ndarray = _NO_EOS,
        pad: int = 0,
    ) -> int:
        """Run the program on arguments that have been checked, in the kernel's form; how many steps it has made.

        n_ahead: columns of the cache that are there for later steps than the first.
        """
        program, ids, first = self.program, self.ids, appended.first
        n_rows, n_steps = self.n_rows, max(len(chosen), 1)
        ids[0], ids[1] = tokens.reshape(-1), positions.reshape(-1)
        self.reach(int(ids[1].max()) + n_steps)
        in_prefix = 0 if first.in_suffix else n_ahead
        prepare_threads()
        outcome = 0
        for section in self._sections:
            is_last = section is self._sections[-1]
            with section.turn, _AT_ONCE if program.ranks is None else program.ranks.running():
                outcome = kernels.run_step(
                    ELEMENTS[program.dtype],
                    self.held,
                    section.code,
                    section.formats,
                    section.scalars,
                    n_rows,
                    self.n_new,
                    self.n_last,
                    self.arena,
                    self.scratch,
                    self.threads,
                    self.tables,
                    ids,
                    self.records,
                    first.prefix_len - in_prefix,
                    first.suffix_len - (n_ahead - in_prefix),
                    first.in_suffix,
                    first.prefix_row,
                    first.table,
                    kind,
                    hidden,
                    logits.data_ptr(),
                    program.n_logits,
                    chosen if is_last else chosen[:0],
                    self.none_finished if finished is None else finished,
                    pad,
                    eos,
                    self._given,
                    None if program.ranks is None else program.ranks.words,
                )
            if outcome < 0:
                raise self._wrong(-outcome, section.first)
        return outcome

    def _wrong(self, what: int, first: int) -> InvalidInput:
        """What a launch has found in the instructions from this one on."""
        if what >= kernels.UNKNOWN_OPERATION:
            number = first + what - kernels.UNKNOWN_OPERATION
            return InvalidInput(
                f"instruction {number} has operation {self.program.code[number, OP]}: below "
                f"{len(kernels.INSTRUCTIONS)} is needed, and formats where it is one of quantised layers"
            )
        if what == UNKNOWN_INDEX:
            return InvalidInput(
                f"tokens {self.ids[0]} at positions {self.ids[1]}: the model's tables have no such rows"
            )
        return InvalidInput("the cache names rows that it has not, or has left behind tokens that are seen")


def prefill(
    program: Program,
    tokens: np.ndarray,
    positions: np.ndarray,
    appended: AppendedEverywhere,
    mask: Mask,
    deltas: DeltaTables | None = None,
) -> Tensor:
    """Logits [n_rows, 1, n_logits] of the last of n_new tokens a row; the keys and values of all are written to the cache.

    tokens: int64 [n_rows, n_new]; positions: int64 [1 or n_rows, n_new]; appended: all layers after they made room for the
    tokens; deltas: as in `Run`. Raises `InvalidInput`.
    """
    n_new = appended.first.n_new
    if tokens.dtype != np.int64 or tokens.ndim != 2 or tokens.shape[1] != n_new:
        raise InvalidInput(f"tokens is {tokens.dtype} {tokens.shape}: int64 [rows, {n_new}] is needed")
    n_rows = len(tokens)
    if positions.dtype != np.int64 or positions.shape not in ((1, n_new), (n_rows, n_new)):
        given = f"{positions.dtype} {positions.shape}"
        raise InvalidInput(f"positions is {given}: int64 [1 or {n_rows}, {n_new}] is needed")
    run = Run(program, n_rows, n_new, deltas)
    run.read(appended)
    n_keys = appended.first.prefix_len + appended.first.suffix_len
    hidden = checked_bytes(mask, n_keys, n_rows, n_new)
    # of as many dimensions as for a step: one variant of the kernel
    hidden = hidden.reshape(n_rows, -1) if hidden.size else _NO_MASK
    logits, chosen = _empty_logits(run), np.empty((0, n_rows), np.int64)
    positions = np.broadcast_to(positions, tokens.shape)
    run.call(tokens, positions, appended, 0, KINDS[mask.kind], hidden, logits, chosen)
    return logits


def _empty_logits(run: Run) -> Tensor:
    return torch.empty((run.n_rows, run.n_last, run.program.n_logits), dtype=run.program.dtype, device="cpu")
