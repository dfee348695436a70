"""Decode steps by a program, in place of calls of the model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from hfopt.cache import AppendedEverywhere, IndirectCache

from ._types import Model
from .agreement import of_first
from .conditions import LOOKS_INSIDE, are_near, has_flags, has_gaps, has_hooks, positions_of, spans, wanted
from .pace import CALL_SECONDS, Greedy, Pace
from .protocols import StepProgram, StepPrograms, StepRun
from .selection import argmax
from .state import installed

if TYPE_CHECKING:
    from typing_extensions import Self

_COLUMN_STEP = 256
_MAX_STEPS = 32


class _Checked(NamedTuple):
    """Logits [n_rows, 1, n_logits] behind a token of each row, int64 [n_rows], that was guessed."""

    tokens: np.ndarray
    logits: Tensor


_Room = tuple[StepRun, np.ndarray, AppendedEverywhere, np.ndarray | None]


class Decoding:
    """The steps of one request behind its prompt, as far as the model has a program for them.

    positions: int64 [1 or n_rows], of the next token, or None for a model that is given none; mask: uint8 [n_rows, keys], 0
    for what is hidden, or None; are_flags: see `has_flags`. Guessed tokens have columns in the cache until the loop has
    chosen others, or `take_back` is called.
    """

    def __init__(
        self,
        model: Model,
        programs: StepPrograms,
        cache: IndirectCache,
        positions: np.ndarray | None,
        mask: np.ndarray | None,
        are_flags: bool,
        pace: Pace,
    ) -> None:
        self._model, self._programs, self._cache = model, programs, cache
        self._has_positions, self._has_gaps = positions is not None, has_gaps(mask)
        self._has_flags = are_flags
        # no program that is not given positions reads these
        self._positions, self._mask = np.zeros(1, np.int64) if positions is None else positions, mask
        (self._is_alone, self._wait, self._speculation), self._ranks = pace, installed(model).ranks
        self._program: StepProgram | None = None
        self._run: StepRun | None = None
        self._checks: dict[int, StepRun] = {}  # by tokens of a row
        self._ahead: list[np.ndarray] = []  # tokens of steps that have been made already
        self._checked: list[_Checked] = []  # steps that may have been made already
        self._n_right = self._n_guessed = 0  # of the last check
        self._n_steps, self._seconds = 1, CALL_SECONDS  # of the last call, of a step in it

    @classmethod
    def of(cls, model: Model, cache: Any, model_kwargs: dict[str, Any], pace: Pace) -> Self | None:
        """Begin behind a prompt, with the last position and the mask in `model_kwargs`; None if no program can."""
        mask, programs = model_kwargs.get("attention_mask"), installed(model).programs
        if programs is None or not isinstance(cache, IndirectCache) or cache.is_sharded:
            return None
        positions = positions_of(model, model_kwargs.get("position_ids"), cache.get_seq_length(), 1)
        if any(model_kwargs.get(name) for name in LOOKS_INSIDE) or wanted(model):
            return None
        last = None
        if positions is not None:
            if positions.dim() != 2 or not are_near(positions[:, -1], cache.get_seq_length() + 1):
                return None
            last = positions[:, -1].numpy().astype(np.int64)
        if not spans(mask, cache):
            return None
        shown = None if mask is None or bool((mask != 0).all()) else (mask != 0).numpy().astype(np.uint8)
        return cls(model, programs, cache, last, shown, has_flags(mask), pace)

    @property
    def cache(self) -> IndirectCache:
        """Where keys and values are."""
        return self._cache

    def fits(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the position and the mask that the model would be given for the next token are the program's."""
        positions = positions_of(self._model, inputs.get("position_ids"), self._cache.get_seq_length(), 1)
        mask = inputs.get("attention_mask")
        if (positions is not None) != self._has_positions:
            return False
        if positions is not None and not (positions[:, -1].numpy() == self._positions).all():
            return False
        if mask is None or not spans(mask, self._cache):
            return mask is None and self._mask is None
        if mask.is_floating_point() and self._has_flags:
            return False
        ours, theirs = self._mask_over(mask.shape[1]), (mask != 0).numpy()
        return bool(theirs.all()) if ours is None else np.array_equal(ours[:, : mask.shape[1]], theirs)

    @property
    def is_ahead(self) -> bool:
        """Whether the next steps have been made already."""
        return bool(self._ahead)

    def logits(
        self, tokens: np.ndarray, most: int = 1, finished: np.ndarray | None = None, pad: int = 0
    ) -> Tensor | None:
        """Logits [n_rows, 1, n_logits] for one more token a row, int64 [n_rows].

        None, with nothing changed, if modules have to make the step. most: tokens that can follow in the request. Rows that
        are finished, bool [n_rows], go on with `pad`.
        """
        if self._checked:
            tokens_ahead, logits = self._checked[0]
            if (tokens == tokens_ahead).all() and (
                self._is_alone or self._current(len(tokens)) is self._program
            ):
                del self._checked[0]
                self._n_right += 1
                self._positions += 1
                return logits
        self._end_check()
        program = self._current(len(tokens))
        if program is None:
            return None
        guessed = self._guessed(program, len(tokens), most)
        begin = time.perf_counter()  # guesses have costs of their own
        if guessed is not None and finished is not None:
            guessed[finished] = pad
        checked = self._check(program, tokens, guessed)
        if checked is None:
            return None
        self._positions += 1
        if guessed is not None:
            checked, *others = checked.split(1, dim=1)
            self._n_right, self._n_guessed = 0, guessed.shape[1]
            self._checked = [_Checked(*each) for each in zip(guessed.T, others, strict=True)]
        self._note_call(len(tokens), 1 + len(self._checked), begin)
        return checked

    def _guessed(self, program: StepProgram, n_rows: int, most: int) -> np.ndarray | None:
        """Guesses of the tokens behind the next one, int64 [n_rows, n], as far as the program can check them; or None."""
        if self._speculation is None:
            return None
        n_left = self._most_keys(program) - self._cache.get_seq_length()
        n_checked = program.most_checked(n_rows, int(self._positions.max()))
        return self._speculation.guess(n_rows, min(most, n_left, n_checked) - 1)

    def _check(self, program: StepProgram, tokens: np.ndarray, guessed: np.ndarray | None) -> Tensor | None:
        """Logits [n_rows, 1 + n, n_logits] for a token of each row and n guessed ones behind it; None if modules have to."""
        given = tokens[:, None] if guessed is None else np.concatenate([tokens[:, None], guessed], 1)
        n_rows, n_new = given.shape
        room = self._make_room(program, n_rows, n_new, checks=n_new > 1)
        if room is None:
            return None
        run, positions, appended, mask = room
        if guessed is None and self._speculation is not None:
            self._speculation.meanwhile()
        try:
            return run.logits(given if n_new > 1 else tokens, positions, appended, mask)
        except BaseException:  # its columns have not been written, or nobody gets to know of them: Ctrl-C
            self._cache.crop(-n_new)
            raise

    def _note_call(self, n_rows: int, n_tokens: int, begin: float) -> None:
        """A step for so many tokens in each row has taken until now, with what became of its guesses."""
        if self._speculation is not None:
            seconds = of_first(self._ranks, time.perf_counter() - begin)
            self._speculation.note_call(n_rows, n_tokens, seconds)

    def _end_check(self) -> None:
        """Remove what has been made for guesses that were wrong, or were not needed."""
        if self._n_guessed:
            assert self._speculation is not None
            self._speculation.note(self._n_guessed, self._n_right)
            self._n_guessed = 0
        if self._checked:
            self._cache.crop(-len(self._checked))
            self._checked = []

    def choose(
        self, tokens: np.ndarray, greedy: Greedy, max_steps: int, finished: np.ndarray | None, most: int = 1
    ) -> np.ndarray | None:
        """`argmax` of the logits for one more token a row: int64 [n_rows].

        None, with nothing changed, if modules have to make the step. max_steps: that may be made at once, if the tokens that
        are chosen are those of the next step, but for padding in rows that are finished, bool [n_rows]. most: tokens that
        can follow in the request.
        """
        if not self._ahead:
            program = self._current(len(tokens))
            if program is None:
                return None
            guessed = self._guessed(program, len(tokens), most)
            if guessed is not None:
                is_made = self._choose_checked(program, tokens, guessed, greedy, finished)
            else:
                if self._speculation is not None:
                    max_steps = self._speculation.ahead(max_steps)
                is_made = self._go_ahead(program, tokens, greedy, max_steps, finished)
            if not is_made:
                return None
        self._positions += 1
        return self._ahead.pop(0)

    def _choose_checked(
        self,
        program: StepProgram,
        tokens: np.ndarray,
        guessed: np.ndarray,
        greedy: Greedy,
        finished: np.ndarray | None,
    ) -> bool:
        """Make a step, and those behind it whose tokens were guessed; False if modules have to."""
        begin = time.perf_counter()
        if finished is not None:
            guessed[finished] = greedy.pad
        logits = self._check(program, tokens, guessed)
        if logits is None:
            return False
        n_rows, n_new = logits.shape[:2]
        chosen = argmax(logits.view(n_rows * n_new, -1)).view(n_rows, n_new).numpy()
        ends = (chosen[..., None] == greedy.eos).any(-1)
        if finished is not None:
            chosen[finished], ends[finished] = greedy.pad, False
        # the step behind a token that no row has chosen otherwise, and that ends none
        goes_on = ((chosen[:, :-1] == guessed) & ~ends[:, :-1]).all(0)
        n_steps = int(goes_on.cumprod().sum()) + 1
        assert self._speculation is not None
        self._speculation.note(n_new - 1, n_steps - 1)
        if n_steps < n_new:
            self._cache.crop(n_steps - n_new)
        self._ahead = list(np.ascontiguousarray(chosen[:, :n_steps].T))
        self._note_call(n_rows, n_new, begin)
        return True

    def _go_ahead(
        self,
        program: StepProgram,
        tokens: np.ndarray,
        greedy: Greedy,
        max_steps: int,
        finished: np.ndarray | None,
    ) -> bool:
        """Make as many steps as are short enough for one call; False if modules have to."""
        n_left = self._most_keys(program) - self._cache.get_seq_length()
        # the first of them waits for all others
        n_timely = min(int(CALL_SECONDS / self._seconds), 1 + int(self._wait / self._seconds))
        n_steps = max(1, min(max_steps, n_left, _MAX_STEPS, 2 * self._n_steps, n_timely))
        begin = time.perf_counter()
        room = self._make_room(program, len(tokens), n_steps)
        if room is None:
            return False
        run, positions, appended, mask = room
        try:
            chosen = run.choose(tokens, positions, appended, mask, finished, greedy.eos, greedy.pad)
        except BaseException:  # its columns have not been written, or nobody gets to know of them: Ctrl-C
            self._cache.crop(-n_steps)
            raise
        self._n_steps = len(chosen)
        self._seconds = of_first(self._ranks, time.perf_counter() - begin) / len(chosen)
        if self._speculation is not None:
            self._speculation.note_call(len(tokens), 1, self._seconds)
        if len(chosen) < n_steps:
            self._cache.crop(len(chosen) - n_steps)
        self._ahead = list(chosen)
        return True

    def take_back(self) -> None:
        """Remove what has been made for tokens that nobody has asked for."""
        self._end_check()
        if self._ahead:
            self._cache.crop(-len(self._ahead))
            self._ahead = []

    def skip(self) -> None:
        """Count a step that the modules have made."""
        self._positions += 1

    def _make_room(
        self, program: StepProgram, n_rows: int, n_steps: int, *, checks: bool = False
    ) -> _Room | None:
        """The run of steps, or of checks of so many tokens, and what it is given besides tokens, once the cache has columns
        for n_steps more; None if it cannot.
        """
        appended = self._cache.append_everywhere(n_rows, n_steps, program.layouts)
        if appended is None:
            return None
        run = self._run
        if run is None or program is not self._program or run.n_rows != n_rows:
            run = self._run = program.steps(n_rows)
            self._program = program
            self._checks.clear()
        if checks:
            run = self._checks.get(n_steps)
            if run is None:
                run = self._checks[n_steps] = program.checks(n_rows, n_steps)
        if len(self._positions) != n_rows:  # one stands for all rows
            self._positions = np.repeat(self._positions, n_rows)
        mask = self._mask_over(appended.first.prefix_len + appended.first.suffix_len)
        return run, self._positions, appended, mask

    def _current(self, n_rows: int) -> StepProgram | None:
        """The program for the next step."""
        program = self._program
        if not (self._is_alone and program is not None and self._programs.holds(program)):
            if has_hooks(self._model):
                return None
            program = self._programs.of(self._model, n_rows, 1, self._cache.kv_cache)
            # a cache may have other layers than the model uses now
            if program is None or len(program.layouts) != len(self._cache.layers):
                return None
        return program if self._cache.get_seq_length() < self._most_keys(program) else None

    def _most_keys(self, program: StepProgram) -> int:
        return program.most_keys(
            has_positions=self._has_positions, has_gaps=self._has_gaps, has_flags=self._has_flags
        )

    def _mask_over(self, n_keys: int) -> np.ndarray | None:
        """uint8 [n_rows, >= n_keys]; no new token is hidden."""
        mask = self._mask
        if mask is not None and mask.shape[1] < n_keys:
            mask = self._mask = np.pad(mask, ((0, 0), (0, _COLUMN_STEP)), constant_values=1)
        return mask
