"""Decode steps by a program, in place of calls of the model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hfopt import host
from hfopt.cache import AppendedEverywhere, IndirectCache
from hfopt.errors import InvalidInput

from ._types import Model
from .prompt import share_prompts, unshare_prompts
from .proof import refusals
from .protocols import StepProgram, StepPrograms, StepRun
from .state import Verdict, installed

_OWN_HOOKS = (share_prompts, unshare_prompts)
LOOKS_INSIDE = ("output_attentions", "output_hidden_states")
_COLUMN_STEP = 256
_NEAR = 1 << 14  # positions that programs may make angles for, however few tokens there are
CALL_SECONDS = 0.19  # at most about that: Python answers Ctrl-C between calls
_MAX_STEPS = 32


def obstacle(model: Model) -> str | None:
    """In words, why requests of this model take no steps from a program, whatever its modules are."""
    if not any(words not in refusals() for words in host.MODES.values()):
        return "transformers' own loops run"
    verdict = installed(model).verdict
    if verdict != Verdict():
        return verdict.refusal or verdict.obstacle
    if has_hooks(model):
        return "the model has hooks"
    name = wanted(model)
    return None if name is None else f"its configuration has {name}"


def has_hooks(model: Model) -> bool:
    """Whether code of others runs around calls of the model itself."""
    hooks = (*model._forward_hooks.values(), *model._forward_pre_hooks.values())
    return any(hook not in _OWN_HOOKS for hook in hooks)


def wanted(model: Model) -> str | None:
    """What the configuration asks of each call that a program does not give."""
    return next((name for name in LOOKS_INSIDE if getattr(model.config, name, False)), None)


def are_near(position_ids: Tensor, n_keys: int) -> bool:
    """Whether a program can have a row of a table for each position: others may be negative, or anywhere beyond the keys."""
    if position_ids.dtype not in (torch.int64, torch.int32):
        return False
    first, last = position_ids.aminmax()
    return bool(first >= 0 and last < max(n_keys, _NEAR))


def has_gaps(mask: np.ndarray | None) -> bool:
    """Whether keys are hidden behind one that is seen; mask: [n_rows, keys], 0 for what is hidden."""
    return mask is not None and bool((np.diff((mask != 0).astype(np.int8), axis=1) < 0).any())


def has_flags(mask: Tensor | None) -> bool:
    """Whether a mask is of 0 and 1 in integers, whose sums are exact; None is."""
    return mask is None or not (mask.is_floating_point() or bool((mask.long() >> 1).any()))


def positions_of(model: Model, given: Any, n_past: int, n_new: int) -> Any:
    """Positions of n_new tokens behind n_past others: those given, or, for a model that takes none, their columns."""
    if host.takes_positions(type(model).forward):
        return given
    return torch.arange(n_past, n_past + n_new, device="cpu")[None] if given is None else None


class Greedy(NamedTuple):
    """A request that reads no logits but their `argmax`: tokens that end its rows, int64 [n], and what follows in those."""

    eos: np.ndarray
    pad: int


_Room = tuple[StepRun, np.ndarray, AppendedEverywhere, np.ndarray | None]


class Decoding:
    """The steps of one request behind its prompt, as far as the model has a program for them.

    positions: int64 [1 or n_rows], of the next token, or None for a model that is given none; mask: uint8 [n_rows, keys], 0
    for what is hidden, or None; are_flags: see `has_flags`. is_alone, wait: see `Passes`.
    """

    def __init__(
        self,
        model: Model,
        programs: StepPrograms,
        cache: IndirectCache,
        positions: np.ndarray | None,
        mask: np.ndarray | None,
        are_flags: bool,
        is_alone: bool,
        wait: float,
    ) -> None:
        self._model, self._programs, self._cache = model, programs, cache
        self._has_positions, self._has_gaps = positions is not None, has_gaps(mask)
        self._has_flags = are_flags
        # no program that is not given positions reads these
        self._positions, self._mask = np.zeros(1, np.int64) if positions is None else positions, mask
        self._is_alone, self._wait = is_alone, wait
        self._program: StepProgram | None = None
        self._run: StepRun | None = None
        self._ahead: list[np.ndarray] = []  # tokens of steps that have been made already
        self._n_steps, self._seconds = 1, CALL_SECONDS  # of the last call, of a step in it

    @classmethod
    def of(
        cls, model: Model, cache: Any, model_kwargs: dict[str, Any], *, is_alone: bool, wait: float
    ) -> Decoding | None:
        """Begin behind a prompt, with the last position and the mask in `model_kwargs`; None if no program can."""
        mask, programs = model_kwargs.get("attention_mask"), installed(model).programs
        if programs is None or not isinstance(cache, IndirectCache):
            return None
        positions = positions_of(model, model_kwargs.get("position_ids"), cache.get_seq_length(), 1)
        if any(model_kwargs.get(name) for name in LOOKS_INSIDE) or wanted(model):
            return None
        last = None
        if positions is not None:
            if positions.dim() != 2 or not are_near(positions[:, -1], cache.get_seq_length() + 1):
                return None
            last = positions[:, -1].numpy().astype(np.int64)
        if not _spans(mask, cache):
            return None
        shown = None if mask is None or bool((mask != 0).all()) else (mask != 0).numpy().astype(np.uint8)
        return cls(model, programs, cache, last, shown, has_flags(mask), is_alone, wait)

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
        if mask is None or not _spans(mask, self._cache):
            return mask is None and self._mask is None
        if mask.is_floating_point() and self._has_flags:
            return False
        ours, theirs = self._mask_over(mask.shape[1]), (mask != 0).numpy()
        return bool(theirs.all()) if ours is None else np.array_equal(ours[:, : mask.shape[1]], theirs)

    @property
    def is_ahead(self) -> bool:
        """Whether the next steps have been made already."""
        return bool(self._ahead)

    def logits(self, tokens: np.ndarray) -> Tensor | None:
        """Logits [n_rows, 1, n_logits] for one more token a row, int64 [n_rows].

        None, with nothing changed, if modules have to make the step.
        """
        program = self._current(len(tokens))
        room = None if program is None else self._make_room(program, len(tokens), 1)
        if room is None:
            return None
        run, positions, appended, mask = room
        try:
            logits = run.logits(tokens, positions, appended, mask)
        except InvalidInput:
            self._cache.crop(-1)  # its column has not been written
            raise
        self._positions += 1
        return logits

    def choose(
        self, tokens: np.ndarray, greedy: Greedy, max_steps: int, finished: np.ndarray | None
    ) -> np.ndarray | None:
        """`argmax` of the logits for one more token a row: int64 [n_rows].

        None, with nothing changed, if modules have to make the step. max_steps: that may be made at once, if the tokens that
        are chosen are those of the next step, but for padding in rows that are finished, bool [n_rows].
        """
        if not self._ahead and not self._go_ahead(tokens, greedy, max_steps, finished):
            return None
        self._positions += 1
        return self._ahead.pop(0)

    def _go_ahead(
        self, tokens: np.ndarray, greedy: Greedy, max_steps: int, finished: np.ndarray | None
    ) -> bool:
        """Make as many steps as are short enough for one call; False if modules have to."""
        program = self._current(len(tokens))
        if program is None:
            return False
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
        self._n_steps, self._seconds = len(chosen), (time.perf_counter() - begin) / len(chosen)
        if len(chosen) < n_steps:
            self._cache.crop(len(chosen) - n_steps)
        self._ahead = list(chosen)
        return True

    def take_back(self) -> None:
        """Remove what has been made for tokens that nobody has asked for."""
        if self._ahead:
            self._cache.crop(-len(self._ahead))
            self._ahead = []

    def skip(self) -> None:
        """Count a step that the modules have made."""
        self._positions += 1

    def _make_room(self, program: StepProgram, n_rows: int, n_steps: int) -> _Room | None:
        """The run, and what it is given besides tokens, once the cache has columns for n_steps more; None if it cannot."""
        appended = self._cache.append_everywhere(n_rows, n_steps, program.layouts)
        if appended is None:
            return None
        run = self._run
        if run is None or program is not self._program or run.n_rows != n_rows:
            run = self._run = program.steps(n_rows)
            self._program = program
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


def _spans(mask: Tensor | None, cache: IndirectCache) -> bool:
    """Whether a mask [n_rows, keys] is over what the cache holds and one token more; None is over all that there is."""
    return mask is None or mask.shape == (cache.n_rows * cache.copies, cache.get_seq_length() + 1)
