"""The decode step of a request: a program, run over the request's own scratch."""

import functools
import sys
from typing import TYPE_CHECKING, NamedTuple

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

__all__ = ["ROW_LIMIT", "Ends", "StepScratch", "choose", "step"]

_NO_MASK = np.empty((0, 0), np.uint8)
_NO_ENDS = np.empty(0, np.int64)


class StepScratch:
    """What a request keeps between its steps for a program: the arena, scratch of the kernels, and what they are told of
    tables and cache.

    The memory that the program reads stays alive with it, even if a thread gives a parameter other memory in the meantime.
    """

    def __init__(self, program: Program, n_rows: int) -> None:
        """Raises `InvalidInput` for more rows than a step can have."""
        if not 1 <= n_rows <= ROW_LIMIT:
            raise InvalidInput(f"n_rows is {n_rows}: 1 to {ROW_LIMIT} are allowed")
        self.program = program
        self.n_rows = n_rows
        self.ids = np.zeros((2, n_rows), np.int64)
        self.none_finished = np.zeros(n_rows, np.bool_)
        self.threads = torch.get_num_threads()
        sizes = n_rows, program.n_kv_heads, program.head_dim, self.threads
        self.scratch_bytes: int = kernels.scratch_bytes(ELEMENTS[program.dtype], program.code, *sizes)
        self._arena = np.empty(program.row_bytes * n_rows + self.scratch_bytes + LINE, np.uint8)
        self.arena = -(-self._arena.ctypes.data // LINE) * LINE
        self.scratch = self.arena + program.row_bytes * n_rows
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
        """Note where the cache has its layers. Raises `InvalidInput` unless the new tokens fit into all of them."""
        program, n_rows = self.program, self.n_rows
        first, buffers = appended
        if len(buffers) != program.n_layers:
            raise InvalidInput(f"appended has {len(buffers)} layers: {program.n_layers} are needed")
        if first.n_new < 1 or len(first.trunk_row) != n_rows:
            given = f"{first.n_new} tokens of {len(first.trunk_row)} rows"
            raise InvalidInput(f"appended has {given}: tokens of {n_rows} rows are needed")
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
        if not is_stored or length < first.n_new or self._least[part + records.ROWS] < n_rows:
            raise InvalidInput(
                f"appended ends at columns {first.trunk_len} of {longest[0]} and {first.branch_len} of {longest[1]}: "
                f"room for {first.n_new} tokens of {n_rows} rows is needed"
            )


class Ends(NamedTuple):
    """What becomes of rows that end: `pad` follows in those that are finished, bool [n_rows]; `tokens` end the others."""

    finished: np.ndarray
    pad: int
    tokens: np.ndarray  # int64


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
    if appended.first.n_new != 1:
        raise InvalidInput(f"appended has {appended.first.n_new} tokens: one is needed")
    program = scratch.program
    logits = torch.empty((scratch.n_rows, 1, program.n_logits), dtype=program.dtype)
    _run(scratch, tokens, positions, appended, mask, logits, np.empty((0, scratch.n_rows), np.int64), None)
    return logits


def choose(
    scratch: StepScratch,
    tokens: np.ndarray,
    positions: np.ndarray,
    appended: "AppendedEverywhere",
    mask: np.ndarray | None = None,
    ends: Ends | None = None,
) -> np.ndarray:
    """`argmax` of these logits, and of those of the tokens that it gives, and so on: int64 [n_steps, n_rows].

    As many steps as appended has new tokens; fewer if a row ends or a token has no place in the model's tables, and then the
    caller takes back the rest of the room. Other arguments as in `step`, the mask for the keys of the last one.
    """
    chosen = np.empty((appended.first.n_new, scratch.n_rows), np.int64)
    n_steps = _run(scratch, tokens, positions, appended, mask, scratch.logits, chosen, ends)
    return chosen[:n_steps]


def _run(
    scratch: StepScratch,
    tokens: np.ndarray,
    positions: np.ndarray,
    appended: "AppendedEverywhere",
    mask: np.ndarray | None,
    logits: Tensor,
    chosen: np.ndarray,
    ends: Ends | None,
) -> int:
    program, ids, first = scratch.program, scratch.ids, appended.first
    n_rows, n_steps = scratch.n_rows, first.n_new
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
        if n_steps > 1 and n_rows > 1:
            raise InvalidInput(f"mask has {n_rows} rows: one is allowed for {n_steps} steps")
        hidden = np.ascontiguousarray(mask)
    finished, pad, end_tokens = ends or (scratch.none_finished, 0, _NO_ENDS)
    if finished.dtype != np.bool_ or finished.shape != (n_rows,):
        raise InvalidInput(f"finished is {finished.dtype} {finished.shape}: bool {(n_rows,)} is needed")
    if end_tokens.dtype != np.int64 or end_tokens.ndim != 1:
        raise InvalidInput(f"ends are {end_tokens.dtype} {end_tokens.shape}: int64 [n] is needed")
    ids[0], ids[1] = tokens, positions
    scratch.reach(max(positions.tolist()) + n_steps)
    in_trunk = 0 if first.in_branch else n_steps - 1
    prepare_threads()
    outcome: int = kernels.run_step(
        ELEMENTS[program.dtype],
        program.code,
        program.scalars,
        n_rows,
        scratch.arena,
        scratch.scratch,
        scratch.threads,
        scratch.tables,
        ids,
        scratch.records,
        first.trunk_len - in_trunk,
        first.branch_len - (n_steps - 1 - in_trunk),
        first.in_branch,
        first.trunk_row,
        first.table,
        hidden,
        logits.data_ptr(),
        program.n_logits,
        chosen,
        finished,
        pad,
        end_tokens,
    )
    if outcome == -kernels.UNKNOWN_INDEX:
        raise InvalidInput(f"tokens {ids[0]} at positions {ids[1]}: the model's tables have no such rows")
    if outcome < 0:
        raise InvalidInput("the cache names rows that it has not")
    return outcome
