"""All tokens generated so far, for logits processors, stopping criteria and the caller."""

import numpy as np
import torch

from ._types import Ids

_MIN_COLUMNS = 64


class Sequences:
    """Rows that grow by one token a step, in a buffer that doubles when it is full.

    `ids` is a view of the buffer: a column that was written stays as it is, so views of earlier steps do too, unless their
    reader writes into them.
    """

    def __init__(self, input_ids: Ids) -> None:
        self._buffer, self.length = input_ids, input_ids.shape[1]
        self._array = np.empty((0, 0), np.int64)  # the buffer, once it is not the caller's

    @property
    def ids(self) -> Ids:
        """int64 [n_rows, length]."""
        return self._buffer[:, : self.length]

    def append(self, tokens: np.ndarray) -> None:
        """One token a row, int64 [n_rows]."""
        if self.length >= self._array.shape[1]:
            self._move(self._buffer[:, : self.length])
        self._array[:, self.length] = tokens
        self.length += 1

    def reorder(self, rows: np.ndarray) -> None:
        """Row i becomes what row `rows[i]` is."""
        if (rows != np.arange(len(rows))).any():
            self._move(self._buffer[:, : self.length].index_select(0, torch.from_numpy(rows)))

    def _move(self, ids: Ids) -> None:
        n_rows, length = ids.shape
        # whatever integers the prompt is of, as chosen tokens are
        self._buffer = ids.new_empty((n_rows, max(2 * length, _MIN_COLUMNS)), dtype=torch.int64)
        self._buffer[:, :length] = ids
        self._array = self._buffer.numpy()
