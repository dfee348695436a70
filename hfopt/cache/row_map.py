"""RowMap: which physical row of the cache holds what a logical row (a beam, say) reads."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

_COLUMN_STEP = 64


def rounded(n_columns: int) -> int:
    """`n_columns` or a few more: what is stored grows in steps."""
    return -(-n_columns // _COLUMN_STEP) * _COLUMN_STEP


class RowMap:
    """Logical row r reads row `prefix_row[r]` of the prefix, and column b of row `table[r, b]` of the suffix.

    Shared by the layers of a cache, which are extended one after the other: between steps, `n_suffix` is the
    suffix length of all of them. New tokens of row r always go to physical row r, and its new columns say so.
    """

    def __init__(self, n_rows: int = 0) -> None:
        self.start(n_rows)

    def start(self, n_rows: int) -> None:
        """Every row reads its own prefix row, and there is no suffix."""
        self.n_rows = n_rows
        self.is_identity = True
        self.prefix_row = np.arange(n_rows, dtype=np.int32)
        self.table = np.empty((n_rows, 0), dtype=np.int32)
        self.n_suffix = 0

    def cut(self, n_suffix: int) -> RowMap:
        """A copy for a layer with `n_suffix` suffix tokens."""
        rows = copy.copy(self)
        rows.table, rows.n_suffix = self.table.copy(), n_suffix
        return rows

    def extend(self, n_suffix: int) -> None:
        """Columns up to `n_suffix`, in which every row reads itself."""
        if n_suffix > self.table.shape[1]:
            n_columns = rounded(max(n_suffix, self.table.shape[1] * 2))
            table = np.empty((self.n_rows, n_columns), dtype=np.int32)
            table[:, : self.n_suffix] = self.table[:, : self.n_suffix]
            self.table = table
        self.table[:, self.n_suffix : n_suffix] = np.arange(self.n_rows, dtype=np.int32)[:, None]
        self.n_suffix = n_suffix

    def _select(self, indices: Tensor) -> None:
        chosen = indices.numpy()
        if self.is_identity and np.array_equal(chosen, self.prefix_row):
            return
        self.prefix_row = self.prefix_row[chosen]
        self.table = self.table[chosen]
        self.n_rows = len(chosen)
        self.is_identity = False

    # These bear the names of the cache's methods, and raise what torch raises there.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(torch.arange(self.n_rows, device="cpu").index_select(0, beam_idx.to("cpu")))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.n_rows, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(self.n_rows, device="cpu")[indices, ...])


def gathered(prefix: Tensor, suffix: Tensor, prefix_row: np.ndarray, table: np.ndarray) -> Tensor:
    """Gather what logical rows read of two buffers [rows, n_kv_heads, columns, ...]: [n_rows, n_kv_heads, length, ...].

    prefix: its columns up to the length. prefix_row: int32 [n_rows]. table: int32 [n_rows, suffix_len].
    The result is a view of the prefix where all of its rows are read in order, and nothing else.
    """
    if prefix.shape[0] != len(prefix_row) or not np.array_equal(prefix_row, np.arange(len(prefix_row))):
        prefix = prefix.index_select(0, torch.from_numpy(prefix_row))
    if not table.shape[1]:
        return prefix
    # the two indices bring [n_rows, suffix_len] to the front
    read = suffix[torch.from_numpy(table.astype(np.int64)), :, torch.arange(table.shape[1], device="cpu")]
    return torch.cat([prefix, read.transpose(1, 2)], dim=2)
