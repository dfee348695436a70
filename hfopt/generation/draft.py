"""Guesses from a smaller model that reads what the request's own reads (https://arxiv.org/abs/2211.17192)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from hfopt import host
from hfopt.cache import IndirectCache
from hfopt.errors import HfoptError

from ._types import Ids, Model
from .agreement import of_first
from .decoding import Decoding
from .pace import Greedy, Pace
from .prefill import Prefill
from .selection import argmax, drawn
from .sequences import Sequences
from .speculation import Guess
from .state import installed

if TYPE_CHECKING:  # it loads Numba
    from hfopt.distributed.ranks import Ranks

_GREEDY = Greedy(np.empty(0, np.int64), 0)


class Choice:
    """How the loop is going to choose the next tokens, as far as that can be foreseen without anybody's noticing.

    processors: of the request, of which those are asked that give the same for the same text and scores. is_random: whether
    it draws; the same random numbers are drawn here, from a generator of its own that begins where torch's is. A draft and
    a model with much the same probabilities then draw much the same tokens.
    """

    def __init__(self, processors: Iterable[LogitsProcessor], is_random: bool) -> None:
        self._processors = LogitsProcessorList([each for each in processors if host.is_repeatable(each)])
        self._generator = torch.Generator() if is_random else None

    @property
    def is_plain(self) -> bool:
        """Whether it is the `argmax` of logits."""
        return self._generator is None and not self._processors

    def begin(self) -> None:
        """Start from the random numbers that the loop is going to draw next."""
        if self._generator is not None:
            self._generator.set_state(torch.get_rng_state())

    def __call__(self, logits: Tensor, ids: Ids) -> np.ndarray:
        """The next token of each row, int64 [n_rows]; logits: [n_rows, n_logits]; ids: all tokens so far."""
        if not self.is_plain:
            logits = logits.to(torch.float32)
        scores = self._processors(ids, logits)
        chosen = argmax(scores) if self._generator is None else drawn(scores, self._generator)
        return chosen.numpy()


class _Steps(Decoding):
    """The steps of a draft, some of which are taken back."""

    def read(self, tokens: np.ndarray) -> Tensor | None:
        """Logits [n_rows, 1, n_logits] behind some more tokens of each row, int64 [n_rows, n]; None, behind some of them, if
        modules have to read the rest.
        """
        n_rows, n_read, logits = len(tokens), 0, None
        while n_read < tokens.shape[1]:
            program = self._current(n_rows)
            if program is None:
                return None
            n_left = self._most_keys(program) - self._cache.get_seq_length()
            n_new = min(n_left, program.most_checked(n_rows, int(self._positions.max())))
            part = tokens[:, n_read : n_read + n_new]
            logits = self._check(program, part[:, 0], part[:, 1:])
            if logits is None:
                return None
            self._positions += part.shape[1]
            n_read += part.shape[1]
        return None if logits is None else logits[:, -1:]

    def forget(self, n_tokens: int) -> None:
        """Take the last tokens that were read back from the cache."""
        self._cache.crop(-n_tokens)
        self._positions -= n_tokens


class DraftModel:
    """A `Guesser` that lets another model go on with the text, step by step, in a program and over a cache of its own.

    model: the draft. Its prompt is read when it is first asked, and what has been chosen otherwise than guessed is taken
    back from its cache. input_ids: int64 [n_rows, length]; mask: [n_rows, at least length], 0 for what is hidden, or None;
    max_length: of the request; vocabulary: tokens that the request's model can read; ranks: that have it together.
    """

    def __init__(
        self,
        model: Model,
        input_ids: Ids,
        mask: Tensor | None,
        choice: Choice,
        max_length: int,
        vocabulary: int,
        ranks: Ranks | None,
    ) -> None:
        self._ranks = ranks
        self._model, self._choice, self._vocabulary = model, choice, vocabulary
        self._mask = None if mask is None else mask[:, mask.shape[1] - input_ids.shape[1] :]
        self._sequences = Sequences(input_ids)
        self._n_rows = len(input_ids)
        self._max_length = max_length
        self._decoding: _Steps | None = None
        self._n_read = 0  # tokens of the text that its cache holds, before those that it has guessed itself
        self._guessed = np.empty((self._n_rows, 0), np.int64)  # of which it has read all but the last
        self._is_over = False  # whether it has met what it cannot read

    @property
    def seconds(self) -> float | None:
        """What a step of it takes."""
        return installed(self._model).draft_costs.seconds(self._n_rows, 1) or None

    def add(self, tokens: np.ndarray) -> None:
        """The next token of each row, int64 [n_rows]."""
        self._sequences.append(tokens)

    def guess(self, n: int) -> Guess | None:
        """At most n tokens of each row; None if a program cannot make a step of it, or reads no such text."""
        if self._is_over:
            return None
        begin = time.perf_counter()
        is_first = self._decoding is None
        made: list[np.ndarray] = []
        with contextlib.suppress(HfoptError):  # the request can do without it
            self._go_on(n, made)
        self._is_over = not made
        if self._is_over:
            return None
        n_unread, self._n_read = self._sequences.length - self._n_read, self._sequences.length
        guessed = self._guessed = np.stack(made, 1)
        if not is_first and n_unread <= 2:  # as many calls as tokens
            costs = installed(self._model).draft_costs
            costs.note(self._n_rows, 1, of_first(self._ranks, time.perf_counter() - begin) / len(made))
        n_known = int((guessed < self._vocabulary).all(0).cumprod().sum())
        return Guess(guessed[:, :n_known]) if n_known else None

    def meanwhile(self) -> None:
        """Nothing: it needs the next token first."""

    def _go_on(self, n: int, made: list[np.ndarray]) -> None:
        """Add at most n tokens behind the text to `made`, int64 [n_rows] each."""
        if self._decoding is None:
            self._decoding = self._begun()
        decoding, text = self._decoding, self._sequences.ids.numpy()
        if decoding is None:
            return
        self._take_back(decoding, text)
        self._choice.begin()
        given = text[:, self._n_read :].astype(np.int64, copy=False)
        while len(made) < n:
            if self._choice.is_plain and given.shape[1] == 1:
                tokens = decoding.choose(given[:, 0], _GREEDY, n - len(made), None)
            else:
                logits = decoding.read(given)
                tokens = None if logits is None else self._choice(logits[:, -1], self._text_with(made))
            if tokens is None:
                return
            made.append(tokens)
            given = tokens[:, None]

    def _text_with(self, made: list[np.ndarray]) -> Ids:
        ids = self._sequences.ids
        return ids if not made else torch.cat([ids, torch.from_numpy(np.stack(made, 1))], 1)

    def _take_back(self, decoding: _Steps, text: np.ndarray) -> None:
        """Leave in the cache what it has guessed right, and one token of the text to read."""
        n_made = max(self._guessed.shape[1] - 1, 0)
        most = min(n_made, text.shape[1] - self._n_read - 1)
        is_right = (text[:, self._n_read : self._n_read + most] == self._guessed[:, :most]).all(0)
        n_right = int(is_right.cumprod().sum())
        decoding.forget(n_made - n_right)
        self._n_read += n_right
        self._guessed = self._guessed[:, :0]

    def _begun(self) -> _Steps | None:
        """Behind all tokens but the last."""
        model, ids = self._model, self._sequences.ids[:, :-1]
        n_rows, n_read = ids.shape
        if n_read == 0:
            return None
        mask = self._mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(n_rows, n_read + 1 - mask.shape[1])], 1)
        seen = torch.ones(1, n_read + 1, dtype=torch.int64) if mask is None else (mask != 0).long()
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        cache = IndirectCache(
            model.config.get_text_config(decoder=True),
            kv_cache=installed(model).kv_cache,
            max_length=self._max_length,
        )
        cache.activate_past_recording()
        forward = type(model).forward
        inputs = host.prompt_inputs(
            forward, ids, None if mask is None else mask[:, :-1], positions[:, :-1], cache
        )
        Prefill(model, cache)(**inputs)
        self._n_read = n_read
        given = {"attention_mask": mask, "position_ids": positions if host.takes_positions(forward) else None}
        return _Steps.of(model, cache, given, Pace(is_alone=True))
