"""What generation asks of a program: the prompt and the decode steps of a request without a call of the model.

`hfopt.program` has these classes, and any others that fit would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor, nn

from hfopt.cache import AppendedEverywhere, Layout

if TYPE_CHECKING:  # `import hfopt` must not load Numba
    from hfopt.functional import Mask


class StepRun(Protocol):
    """A program in one request: its decode steps, or checks of several tokens, and the memory that it keeps between them.

    tokens, positions: int64 [n_rows], tokens [n_rows, n_new] to check; appended: all layers of the cache after they made
    room for the new tokens; mask: uint8 [n_rows, keys], 0 for what is hidden. Raises InvalidInput, before anything is
    written, for what does not fit.
    """

    @property
    def n_rows(self) -> int:
        """Rows of the request."""

    def logits(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        appended: AppendedEverywhere,
        mask: np.ndarray | None,
    ) -> Tensor:
        """Logits [n_rows, n_new, n_logits] of one more token a row, or of several, each with the bits of a step."""

    def choose(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        appended: AppendedEverywhere,
        mask: np.ndarray | None,
        finished: np.ndarray | None,
        eos: np.ndarray,
        pad: int,
    ) -> np.ndarray:
        """`argmax` of these logits, then of those of the tokens that it gives, and so on: int64 [n_steps, n_rows].

        As many steps as appended has new tokens; fewer if a row comes to one of eos, int64 [n], or to a token that the model
        cannot read. Rows that are finished, bool [n_rows], go on with `pad`.
        """


class StepProgram(Protocol):
    """A model as it is now, for new tokens behind a cache."""

    @property
    def layouts(self) -> Sequence[Layout]:
        """Of each layer of the cache: heads of keys and values, channels of one, and their type."""

    @property
    def ignores_columns(self) -> bool:
        """Whether it makes no difference in which columns keys are: no distance between them counts, and no window."""

    def most_keys(self, *, has_positions: bool, has_gaps: bool, has_flags: bool) -> int:
        """How many keys a call may have at most; 0 if it takes none without positions, where keys are hidden behind one that
        is seen, or under masks that are no flags (of integers) but numbers that may be rounded.
        """

    def most_checked(self, n_rows: int, position: int) -> int:
        """How many tokens a row one call can check, the first of them at this position."""

    def work(self, n_rows: int, n_new: int, n_keys: int) -> int:
        """Multiply-adds of a call for n_new tokens in each of n_rows rows, the last of which sees n_keys keys."""

    def prefill(
        self, tokens: np.ndarray, positions: np.ndarray, appended: AppendedEverywhere, mask: Mask
    ) -> Tensor:
        """Logits [n_rows, 1, n_logits] of the last of several new tokens a row.

        tokens: int64 [n_rows, n_new]; positions: int64 [1 or n_rows, n_new]. Raises InvalidInput.
        """

    def steps(self, n_rows: int) -> StepRun:
        """Begin the decode steps of a request."""

    def checks(self, n_rows: int, n_new: int) -> StepRun:
        """Begin checks of so many tokens of each row."""


class StepPrograms(Protocol):
    """The programs of a model, which may change between two calls."""

    def of(
        self, model: nn.Module, n_rows: int, n_new: int = 1, kv_cache: str | None = None
    ) -> StepProgram | None:
        """The program for n_new tokens in each of n_rows rows; None if they have to go module by module."""

    def at_all(self, model: nn.Module, kv_cache: str | None = None) -> StepProgram | None:
        """The program for what it may be used for, which tells how modules read a cache of this kind."""

    def holds(self, program: StepProgram) -> bool:
        """Whether this is still the model's program, for the next step of a request that runs no code of its user."""
