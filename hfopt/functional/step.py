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

from .checks import ELEMENTS, prepare_threads
from .program import Program
from .rotary import cache_record

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
        self.ids = np.zeros((2, n_rows), np.int64)
        self._arena = np.empty(program.row_bytes * n_rows + _LINE, np.uint8)
        self.arena = -(-self._arena.ctypes.data // _LINE) * _LINE
        self.tables = np.zeros((len(program.tables), 2), np.int64)
        self.records = np.zeros((program.n_layers, records.LENGTH), np.int64)
        self._buffers: list[Any] = []
        self._rows: list[Tensor] = []

    def reach(self, position: int) -> None:
        """Let tables have a row for this position, if they grow."""
        rows = [table.reach(position + 1) for table in self.program.tables]
        if not self._rows or any(a is not b for a, b in zip(rows, self._rows, strict=True)):
            self._rows = rows
            self.tables[:] = [(each.data_ptr(), len(each)) for each in rows]

    def read(self, appended: Sequence["Appended"]) -> None:
        """Note where the cache has its layers."""
        buffers = [each.buffers for each in appended]
        if buffers != self._buffers or None in buffers:
            program = self.program
            layout = program.dtype, program.n_kv_heads, program.head_dim
            self.records[:] = [cache_record(each, *layout) for each in appended]
            self._buffers = buffers


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
    n_rows = ids.shape[1]
    first = appended[0]
    n_keys = first.trunk_len + first.branch_len
    ids[0], ids[1] = tokens.numpy(), positions
    scratch.reach(int(ids[1].max()))
    scratch.read(appended)
    hidden = _NO_MASK if mask is None else np.ascontiguousarray(mask[:, :n_keys])
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
