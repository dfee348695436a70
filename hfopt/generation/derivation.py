"""The rows of a request as far as a grammar has derived them: which tokens may follow, and which have to."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from hfopt.errors import InvalidInput

from .selection import argmax_allowed
from .speculation import Guess

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# for each byte of a bit mask, what scores may be at most: float32 [256, 8]
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_LIMITS = np.where(_BITS, np.inf, -np.inf).astype(np.float32)


class Derivation(LogitsProcessor):
    """The answers of one request: a logits processor, and a guesser of tokens without a choice.

    matcher: of the grammar, behind the prompt. vocabulary: of the tokenizer. Its owner says each token that is added.
    """

    seconds = 0.0  # that a guessed token costs: next to nothing

    def __init__(self, matcher: LLMatcher, vocabulary: LLTokenizer, n_rows: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._rows = self._begun(n_rows)
        self._filling: Future[None] | None = None  # of the mask, for what has been added
        self._mask = np.zeros((n_rows, (vocabulary.vocab_size + 31) // 32), np.int32)
        self._ends = np.zeros(self._mask.shape[1] * 32, np.uint8)
        self._ends[vocabulary.eos_tokens] = 1
        self._ends = np.packbits(self._ends, bitorder="little").view(np.int32)

    def _begun(self, n_rows: int) -> list[_Row]:
        return [_Row(self._matcher.deep_copy(), self._vocabulary) for _ in range(n_rows)]

    def meanwhile(self) -> None:
        """Let another thread set the bits of what may follow, which takes as long as a small model's layer."""
        if self._filling is None:
            self._filling = _worker().submit(self._set)

    def _settle(self) -> None:
        """Wait for the other thread: rows are for one at a time."""
        if self._filling is not None:
            self._filling.exception()
            self._filling = None

    def add(self, tokens: np.ndarray) -> None:
        """The next token of each row, int64 [n_rows]."""
        self._settle()
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.add(token)

    def restart(self, texts: np.ndarray) -> None:
        """Rows are these instead, int64 [n_rows, length], from the first token of an answer on."""
        self._settle()
        self._rows = self._begun(len(self._rows))
        for row, text in zip(self._rows, texts.tolist(), strict=True):
            for token in text:
                row.add(token)

    def reorder(self, rows: list[int]) -> None:
        """Row i becomes what row `rows[i]` is."""
        self._settle()
        if rows != list(range(len(rows))):
            self._rows = [self._rows[each].copy() for each in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores float [n_rows, n_logits], with -inf for tokens that cannot follow what was added; a tensor of its own."""
        self._fill()
        return self._limited(scores)

    def _limited(self, scores: Tensor) -> Tensor:
        """The scores under the mask as it is."""
        limits = self._limits(scores.shape[1])
        if scores.is_cpu and scores.dtype is torch.float32:
            return torch.from_numpy(np.minimum(scores.detach().numpy(), limits, out=limits))
        return torch.minimum(scores, torch.from_numpy(limits).to(scores))

    def choose(self, logits: Tensor) -> np.ndarray:
        """`argmax` of these scores, int64 [n_rows], without a copy of them: logits [n_rows, n_logits], of any floats."""
        self._fill()
        chosen = argmax_allowed(logits.detach(), self._mask)
        if chosen is None:
            return torch.argmax(self._limited(logits), dim=-1).numpy()
        n_logits = logits.shape[1]
        if (chosen < 0).any():
            self._check_known(n_logits, False)
            chosen[chosen < 0] = 0  # where all is -inf, the first token is as good as any
        return chosen

    def _fill(self) -> None:
        """Set the bits of what may follow, or wait until they are."""
        filling, self._filling = self._filling, None
        if filling is None:
            self._set()
        else:
            filling.result()

    def _set(self) -> None:
        for index, row in enumerate(self._rows):
            if row.has_ended:
                self._mask[index] = self._ends
            else:
                row.fill(self._mask, index)

    def _limits(self, n_logits: int) -> np.ndarray:
        """Of scores under the mask: float32 [n_rows, n_logits], infinite."""
        limits = _LIMITS.take(self._mask.view(np.uint8), axis=0, mode="clip").reshape(len(self._rows), -1)
        n_known = limits.shape[1]
        if n_logits > n_known:  # tables of embeddings may be longer than vocabularies
            return np.pad(limits, ((0, 0), (0, n_logits - n_known)), constant_values=-np.inf)
        if n_logits < self._vocabulary.vocab_size:
            self._check_known(n_logits, bool((limits[:, :n_logits] > 0).any(1).all()))
        return limits[:, :n_logits]

    def _check_known(self, n_logits: int, is_known: bool) -> None:
        """Raises InvalidInput if a model with fewer logits than tokens has none of a token that may follow."""
        if n_logits < self._vocabulary.vocab_size and not is_known:
            raise InvalidInput(
                f"the model has {n_logits} logits and the tokenizer of the grammar {self._vocabulary.vocab_size} tokens: "
                "the next token is none that the model knows"
            )

    def guess(self, n: int) -> Guess | None:
        """At most n tokens of each row that have to follow; None unless all rows have such, and one of them goes on."""
        self._settle()
        rows = []
        for row in self._rows:
            rows.append(row.forced(n))
            n = min(n, len(rows[-1]))
            if n == 0:
                return None
        if all(row.has_ended or row.has_to_end for row in self._rows):
            return None
        return Guess(np.array([tokens[:n] for tokens in rows], np.int64), chance=1.0)


_workers: dict[int, ThreadPoolExecutor] = {}  # by process: a child of `fork` has none of its parent's threads


def _worker() -> ThreadPoolExecutor:
    """The thread that sets bits while kernels of a step run."""
    worker = _workers.get(os.getpid())
    if worker is None:
        worker = _workers[os.getpid()] = ThreadPoolExecutor(1, "hfopt-grammar")
    return worker


class _Row:
    """One answer."""

    def __init__(self, matcher: LLMatcher, vocabulary: LLTokenizer) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._ends = frozenset(vocabulary.eos_tokens)
        self.has_ended = False
        self._filler: int | None = None  # what follows the end, once that is known

    def copy(self) -> _Row:
        copy = _Row(self._matcher.deep_copy(), self._vocabulary)
        copy.has_ended, copy._filler = self.has_ended, self._filler
        return copy

    @property
    def has_to_end(self) -> bool:
        """Whether an end token is all that may follow."""
        return self._matcher.is_stopped()

    def add(self, token: int) -> None:
        if self.has_ended:
            self._filler = token
        elif token in self._ends:
            self.has_ended = True
        elif not (0 <= token < self._vocabulary.vocab_size and self._matcher.try_consume_tokens([token])):
            # others have chosen what the grammar has no place for: all that may follow is the end
            self.has_ended = True
            self._check()

    def fill(self, mask: np.ndarray, index: int) -> None:
        """Set the bits of what may follow in a row of int32 [n_rows, words]."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, mask, index)
        self._check()

    def forced(self, n: int) -> list[int]:
        """The tokens that have to follow, at most n; none if there is a choice."""
        if self.has_ended:
            return [] if self._filler is None else [self._filler] * n
        if self.has_to_end:
            return list(self._ends) if len(self._ends) == 1 else []
        return self._matcher.compute_ff_tokens()[:n]

    def _check(self) -> None:
        """Raises InvalidInput if the grammar has gone beyond a limit of llguidance."""
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise InvalidInput(f"the grammar cannot go on ({self._matcher.stop_reason()}): {reason}")


class Followed:
    """A derivation for loops that say nothing but tokens: int64 [n_rows, length], the prompts first."""

    def __init__(self, derivation: Derivation, ids: np.ndarray) -> None:
        self.derivation, self._ids, self._start = derivation, ids.copy(), ids.shape[1]

    def follow(self, ids: np.ndarray) -> bool:
        """Go on to these texts; False, with nothing changed, unless each is one of those that are known, or begins as one
        does up to a place behind its prompt, and has a token more. Rows may be in another order, and some of them gone.
        """
        length = ids.shape[1]
        if len(ids) != len(self._ids) or not self._start < length <= self._ids.shape[1] + 1:
            return False
        parents = _places(ids[:, :-1], self._ids[:, : length - 1])
        if parents is None:
            return False
        if length == self._ids.shape[1] + 1:
            self.derivation.reorder(parents)
            self.derivation.add(ids[:, -1])
        else:  # tokens were guessed, and have been taken back
            self.derivation.restart(ids[:, self._start :])
        self._ids = ids.copy()
        return True


def _places(rows: np.ndarray, among: np.ndarray) -> list[int] | None:
    """Where each row stands among others, which are as long; None if one does not."""
    if np.array_equal(rows, among):
        return list(range(len(rows)))
    known = {row.tobytes(): place for place, row in reversed(list(enumerate(among)))}
    found = [known.get(row.tobytes(), -1) for row in rows]
    return None if -1 in found else found
