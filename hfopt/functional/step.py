"""The decode step of a request: a program, run over the request's own scratch."""

import functools
import sys
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import cache_record as records
from hfopt.kernels import step as kernels
from hfopt.kernels.linear import ROW_LIMIT

from .attention import check_lengths
from .checks import ELEMENTS, prepare_threads
from .program import LINE, Program
from .rotary import record_of_buffers

if TYPE_CHECKING:
    from hfopt.cache import AppendedEverywhere, Buffers

__all__ = ["ROW_LIMIT", "StepScratch", "choose", "step"]

_NO_MASK = np.empty(0, np.uint8)


class StepScratch:
    """What a request keeps between its steps for a program: the arena, and what kernels are told of tables and cache.

    The memory that the program reads stays alive with it, even if a thread gives a parameter other memory in the meantime.
    """

    def __init__(self, program: Program, n_rows: int) -> None:
        """Raises `InvalidInput` for more rows than a step can have."""
        if not 1 <= n_rows <= ROW_LIMIT:
            raise InvalidInput(f"n_rows is {n_rows}: 1 to {ROW_LIMIT} are allowed")
        self.program = program
        self.n_rows = n_rows
        self.ids = np.zeros((2, n_rows), np.int64)
        self._arena = np.empty(program.row_bytes * n_rows + LINE, np.uint8)
        self.arena = -(-self._arena.ctypes.data // LINE) * LINE
        self.chosen = np.zeros(n_rows, np.int64)
        self.chosen_at = self.chosen.ctypes.data
        self.tables = np.zeros((len(program.tables), 2), np.int64)
        self.records = np.zeros((program.n_layers, records.LENGTH), np.int64)
        self._least: list[int] = []  # of each number in the records
        self._n_positions = 0
        self._rows: list[Tensor] = []
        self._buffers: list[Buffers] = []
        self._storages = [tensor.untyped_storage() for tensor in program.tensors()]

    @functools.cached_property
    def logits(self) -> Tensor:
        """Room for logits that nobody keeps, [n_rows, 1, n_logits]."""
        return torch.empty((self.n_rows, 1, self.program.n_logits), dtype=self.program.dtype)

    def reach(self, n_positions: int) -> None:
        """Let tables have a row for each of so many positions, if they grow."""
        if n_positions > self._n_positions:
            tables = self.program.tables
            rows = self._rows = [table.reach(n_positions) for table in tables]
            self.tables[:] = [(each.data_ptr(), len(each)) for each in rows]
            growing = (len(each) for each, table in zip(rows, tables, strict=True) if table.grows)
            self._n_positions = min(growing, default=sys.maxsize)

    def read(self, appended: "AppendedEverywhere") -> None:
        """Note where the cache has its layers. Raises `InvalidInput` unless the token fits into all of them."""
        program, n_rows = self.program, self.n_rows
        first, buffers = appended
        if len(buffers) != program.n_layers:
            raise InvalidInput(f"appended has {len(buffers)} layers: {program.n_layers} are needed")
        if first.n_new != 1 or len(first.trunk_row) != n_rows:
            given = f"{first.n_new} tokens of {len(first.trunk_row)} rows"
            raise InvalidInput(f"appended has {given}: one token of {n_rows} rows is needed")
        if buffers != self._buffers:
            layout = program.dtype, program.n_kv_heads, program.head_dim
            self.records[:] = [record_of_buffers(each, *layout) for each in buffers]
            self._buffers = buffers
            self._least = self.records.min(0).tolist()
        check_lengths(first, n_rows)
        part, length = (
            (records.BRANCH, first.branch_len) if first.in_branch else (records.TRUNK, first.trunk_len)
        )
        longest = self._least[records.TRUNK + records.COLUMNS], self._least[records.BRANCH + records.COLUMNS]
        is_stored = first.trunk_len <= longest[0] and first.branch_len <= longest[1]
        if not is_stored or length < 1 or self._least[part + records.ROWS] < n_rows:
            raise InvalidInput(
                f"appended ends at columns {first.trunk_len} of {longest[0]} and {first.branch_len} of {longest[1]}: "
                f"room for a token of {n_rows} rows is needed"
            )


def step(
    scratch: StepScratch,
    tokens: np.ndarray,
    positions: np.ndarray,
    appended: "AppendedEverywhere",
    mask: np.ndarray | None = None,
) -> Tensor:
    """Logits [n_rows, 1, n_logits] of one new token a row, whose keys and values are written to the cache.

    tokens: int64 [n_rows]; positions: int64 [n_rows]; appended: all layers after they made room for the token; mask: uint8
    [n_rows, keys], 0 for what is hidden. Raises `InvalidInput`.
    """
    program = scratch.program
    logits = torch.empty((scratch.n_rows, 1, program.n_logits), dtype=program.dtype)
    _run(scratch, tokens, positions, appended, mask, logits, 0)
    return logits


def choose(
    scratch: StepScratch,
    tokens: np.ndarray,
    positions: np.ndarray,
    appended: "AppendedEverywhere",
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """`argmax` of these logits, int64 [n_rows]; the array belongs to the scratch, and the next call writes to it."""
    _run(scratch, tokens, positions, appended, mask, scratch.logits, scratch.chosen_at)
    return scratch.chosen


def _run(
    scratch: StepScratch,
    tokens: np.ndarray,
    positions: np.ndarray,
    appended: "AppendedEverywhere",
    mask: np.ndarray | None,
    logits: Tensor,
    chosen: int,
) -> None:
    program, ids, first = scratch.program, scratch.ids, appended.first
    n_rows = scratch.n_rows
    for name, given in (("tokens", tokens), ("positions", positions)):
        if given.dtype != np.int64 or given.shape != (n_rows,):
            raise InvalidInput(f"{name} is {given.dtype} {given.shape}: int64 {(n_rows,)} is needed")
    scratch.read(appended)
    n_keys = first.trunk_len + first.branch_len
    hidden = _NO_MASK
    if mask is not None:
        if mask.dtype != np.uint8 or mask.ndim != 2 or len(mask) != n_rows or mask.shape[1] < n_keys:
            shape = f"{mask.dtype} {mask.shape}"
            raise InvalidInput(f"mask is {shape}: uint8 {(n_rows, n_keys)}, or more keys, is needed")
        hidden = mask[:, :n_keys].reshape(-1)  # of as many dimensions as none: one variant of the kernel
    ids[0], ids[1] = tokens, positions
    scratch.reach(max(positions.tolist()) + 1)
    prepare_threads()
    wrong = kernels.run_step(
        ELEMENTS[program.dtype],
        program.code,
        program.scalars,
        n_rows,
        scratch.arena,
        scratch.tables,
        ids,
        scratch.records,
        first.trunk_len,
        first.branch_len,
        first.in_branch,
        first.trunk_row,
        first.table,
        hidden,
        logits.data_ptr(),
        program.n_logits,
        chosen,
    )
    if wrong == kernels.UNKNOWN_INDEX:
        raise InvalidInput(f"tokens {ids[0]} at positions {ids[1]}: the model's tables have no such rows")
    if wrong:
        raise InvalidInput("the cache names rows that it has not")
