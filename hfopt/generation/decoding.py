"""Decode steps by a program, in place of calls of the model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hfopt import host
from hfopt.cache import IndirectCache
from hfopt.errors import InvalidInput

from ._types import Model
from .prompt import share_prompts, unshare_prompts
from .proof import refusals
from .verdict import Verdict, verdict_of

if TYPE_CHECKING:
    from hfopt.program.program import Program
    from hfopt.program.run import StepScratch

PROGRAMS = "_hfopt_programs"  # attribute of an optimized model

_OWN_HOOKS = (share_prompts, unshare_prompts)
LOOKS_INSIDE = ("output_attentions", "output_hidden_states")
_COLUMN_STEP = 256
_NEAR = 1 << 14  # positions that programs may make angles for, however few tokens there are
_CALL_SECONDS = 0.19  # at most about that: Python answers Ctrl-C between calls
_MOST_STEPS = 32


def obstacle(model: Model) -> str | None:
    """In words, why requests of this model take no steps from a program, whatever its modules are."""
    if not any(words not in refusals() for words in host.MODES.values()):
        return "transformers' own loops run"
    verdict = verdict_of(model)
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


class Logits(NamedTuple):
    """What a loop reads of a model's outputs; logits [n_rows, 1, n_logits]."""

    logits: Tensor
    attentions: None = None
    hidden_states: None = None


class Choosing(NamedTuple):
    """Of a request that needs no more of its logits than their `argmax`: what ends its rows, and then fills them."""

    ends: np.ndarray  # int64
    pad: int


class Decoding:
    """The steps of one request behind its prompt, as far as the model has a program for them."""

    def __init__(
        self,
        model: Model,
        cache: IndirectCache,
        positions: np.ndarray,
        seen: np.ndarray | None,
        *,
        choosing: Choosing | None,
        is_alone: bool,
    ):
        self._model, self._cache, self._programs = model, cache, model.__dict__[PROGRAMS]
        self._positions, self._seen = positions, seen
        self._choosing = choosing
        self._ahead: list[np.ndarray] = []  # tokens of steps that have been made already
        self._n_steps, self._seconds = 1, _CALL_SECONDS  # of the last call, of a step in it
        self._is_alone = is_alone
        self._scratch: StepScratch | None = None
        # not at the top, because `import hfopt` must not load Numba; not in each step, because that takes time
        from hfopt.program import run

        self._run_of = run

    @classmethod
    def of(cls, model: Model, cache: Any, model_kwargs: dict[str, Any], **options: Any) -> Decoding | None:
        """For a request whose next token has the position and the mask in `model_kwargs`; None if there is no program.

        options: see `Steps`.
        """
        position_ids, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
        if PROGRAMS not in model.__dict__ or not isinstance(cache, IndirectCache):
            return None
        if any(model_kwargs.get(name) for name in LOOKS_INSIDE) or wanted(model):
            return None
        if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != 1:
            return None
        if not are_near(position_ids, cache.get_seq_length() + 1):
            return None
        if mask is None:
            seen = None
        elif mask.shape == (cache.n_rows * cache.copies, cache.get_seq_length() + 1):
            seen = (mask != 0).numpy()
        else:
            return None
        positions = position_ids[:, 0].numpy().astype(np.int64)
        seen = None if seen is None or seen.all() else seen.astype(np.uint8)
        return cls(model, cache, positions, seen, **options)

    @property
    def is_ahead(self) -> bool:
        """Whether the next steps have been made already."""
        return bool(self._ahead)

    def step(
        self, tokens: np.ndarray, most: int = 1, finished: np.ndarray | None = None
    ) -> Logits | np.ndarray | None:
        """Logits for one more token a row, int64 [n_rows], or the tokens that are chosen from them.

        None, with nothing changed, if modules have to do it. most: steps that may be made at once, if the tokens that are
        chosen are those of the next step, but for padding in rows that are finished, bool [n_rows].
        """
        if not self._ahead:
            program = self._program(len(tokens))
            if program is None:
                return None
            if self._choosing is None:
                logits = self._run(program, tokens)
                if logits is None:
                    return None
                self._positions += 1
                return Logits(logits)
            if not self._choose(program, tokens, most, finished):
                return None
        self._positions += 1
        return self._ahead.pop(0)

    def _choose(self, program: Program, tokens: np.ndarray, most: int, finished: np.ndarray | None) -> bool:
        """Go ahead by as many steps as are short enough to be made in one call; False if there is no way."""
        n_steps = max(1, min(most, _MOST_STEPS, 2 * self._n_steps, int(_CALL_SECONDS / self._seconds)))
        choosing = self._choosing
        assert choosing is not None
        begin = time.perf_counter()
        chosen = self._run(program, tokens, n_steps, self._run_of.Ends(finished, choosing.pad, choosing.ends))
        if chosen is None:
            return False
        self._n_steps, self._seconds = len(chosen), (time.perf_counter() - begin) / len(chosen)
        if len(chosen) < n_steps:
            self._cache.crop(len(chosen) - n_steps)
        self._ahead = list(chosen)
        return True

    def skip(self) -> None:
        """Take note of a step that the modules have made."""
        self._positions += 1

    def _program(self, n_rows: int) -> Program | None:
        scratch = self._scratch
        if self._is_alone and scratch is not None and self._programs.holds(scratch.program):
            program: Program = scratch.program
            return program
        if has_hooks(self._model):
            return None
        program = self._programs.of(self._model, n_rows, 1, self._cache.kv_cache)
        # a cache may have other layers than the model uses now
        return program if program is not None and program.n_layers == len(self._cache.layers) else None

    def _run(self, program: Program, tokens: np.ndarray, n_steps: int = 1, ends: Any = None) -> Any:
        """Logits, or with `ends` the tokens that are chosen in up to n_steps steps; None if the cache cannot take them."""
        n_rows = len(tokens)
        layout = program.n_kv_heads, program.head_dim, program.dtype
        appended = self._cache.append_everywhere(n_rows, n_steps, *layout)
        if appended is None:
            return None
        scratch = self._scratch
        if scratch is None or scratch.program is not program or scratch.n_rows != n_rows:
            scratch = self._scratch = self._run_of.StepScratch(program, n_rows)
        positions = self._positions
        if len(positions) != n_rows:  # one stands for all rows
            positions = self._positions = np.repeat(positions, n_rows)
        mask = self._mask(appended.first.trunk_len + appended.first.branch_len)
        given = scratch, tokens, positions, appended, mask
        try:
            return self._run_of.step(*given) if ends is None else self._run_of.choose(*given, ends)
        except InvalidInput:
            self._cache.crop(-n_steps)  # its columns have not been written
            raise

    def _mask(self, n_keys: int) -> np.ndarray | None:
        """uint8 [n_rows, >= n_keys]; every new token is seen."""
        seen = self._seen
        if seen is not None and seen.shape[1] < n_keys:
            seen = self._seen = np.pad(seen, ((0, 0), (0, _COLUMN_STEP)), constant_values=1)
        return seen
