"""The decode step of a request: a program, run over the request's own scratch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import cache_record as records
from hfopt.kernels import step as kernels
from hfopt.kernels.linear import ROW_LIMIT

from .attention import check_lengths
from .checks import ELEMENTS, prepare_threads
from .program import Program
from .rotary import cache_record, known_buffers

if TYPE_CHECKING:
    from hfopt.cache import Appended

__all__ = ["ROW_LIMIT", "StepScratch", "step"]

_NO_MASK = np.empty(0, np.uint8)
_LINE = 64


class StepScratch:
    """What a request keeps between its steps for a program: the arena, and what kernels are told of tables and cache."""

    def __init__(self, program: Program, n_rows: int) -> None:
        """Raises `InvalidInput` for more rows than a step can have."""
        if not 1 <= n_rows <= ROW_LIMIT:
            raise InvalidInput(f"n_rows is {n_rows}: 1 to {ROW_LIMIT} are allowed")
        self.program = program
        self.n_rows = n_rows
        self.ids = np.zeros((2, n_rows), np.int64)
        self._arena = np.empty(program.row_bytes * n_rows + _LINE, np.uint8)
        self.arena = -(-self._arena.ctypes.data // _LINE) * _LINE
        self.tables = np.zeros((len(program.tables), 2), np.int64)
        self.records = np.zeros((program.n_layers, records.LENGTH), np.int64)
        self._buffers: list[Any] = []
        self._least: list[int] = []  # of each number in the records
        self._rows: list[Tensor] = []

    def reach(self, position: int) -> None:
        """Let tables have a row for this position, if they grow."""
        rows = [table.reach(position + 1) for table in self.program.tables]
        if not self._rows or any(a is not b for a, b in zip(rows, self._rows, strict=True)):
            self._rows = rows
            self.tables[:] = [(each.data_ptr(), len(each)) for each in rows]

    def read(self, appended: Sequence["Appended"]) -> None:
        """Note where the cache has its layers. Raises `InvalidInput` unless the token fits into all of them."""
        program, n_rows = self.program, self.n_rows
        sizes = {each[2:6] for each in appended}
        if len(appended) != program.n_layers or len(sizes) != 1:
            given = f"{len(appended)} layers with {len(sizes)} lengths"
            raise InvalidInput(f"appended has {given}: {program.n_layers} layers of one length are needed")
        first = appended[0]
        if first.n_new != 1 or len(first.trunk_row) != n_rows:
            given = f"{first.n_new} tokens of {len(first.trunk_row)} rows"
            raise InvalidInput(f"appended has {given}: one token of {n_rows} rows is needed")
        buffers = [known_buffers(each) for each in appended]
        if buffers != self._buffers or None in buffers:
            layout = program.dtype, program.n_kv_heads, program.head_dim
            self.records[:] = [cache_record(each, *layout) for each in appended]
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
    tokens: Tensor,
    positions: np.ndarray,
    appended: Sequence["Appended"],
    mask: np.ndarray | None = None,
) -> Tensor:
    """Logits [n_rows, 1, n_logits] of one new token a row, whose keys and values are written to the cache.

    tokens: int64 [n_rows]; positions: int64 [n_rows]; appended: every layer after it made room for the token, all with the
    same tokens of the same rows; mask: uint8 [n_rows, keys], 0 for what is hidden. Raises `InvalidInput`.
    """
    program, ids = scratch.program, scratch.ids
    n_rows = scratch.n_rows
    if tokens.dtype is not torch.int64 or tokens.shape != (n_rows,) or not tokens.is_cpu:
        given = f"{tokens.dtype} {tuple(tokens.shape)}"
        raise InvalidInput(f"tokens is {given}: torch.int64 {(n_rows,)} in CPU memory is needed")
    if positions.dtype != np.int64 or positions.shape != (n_rows,):
        given = f"{positions.dtype} {positions.shape}"
        raise InvalidInput(f"positions is {given}: int64 {(n_rows,)} is needed")
    scratch.read(appended)
    first = appended[0]
    n_keys = first.trunk_len + first.branch_len
    hidden = _NO_MASK
    if mask is not None:
        if mask.dtype != np.uint8 or mask.ndim != 2 or len(mask) != n_rows or mask.shape[1] < n_keys:
            given = f"{mask.dtype} {mask.shape}"
            raise InvalidInput(f"mask is {given}: uint8 {(n_rows, n_keys)}, or more keys, is needed")
        hidden = mask[:, :n_keys].reshape(-1)  # of as many dimensions as none: one variant of the kernel
    ids[0], ids[1] = tokens.numpy(), positions
    scratch.reach(int(positions.max()))
    logits = torch.empty((n_rows, 1, program.n_logits), dtype=program.dtype)
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
    )
    if wrong == kernels.UNKNOWN_INDEX:
        raise InvalidInput(f"tokens {ids[0]} at positions {ids[1]}: the model's tables have no such rows")
    if wrong:
        raise InvalidInput("the cache names rows that it has not")
    return logits
