"""Speculation: some of the next tokens are guessed, and a program checks them all in one reading of the weights.

A guess changes no token: the loop chooses each from the logits of its own place, and what it has chosen otherwise than
guessed takes the rest of the guess with it (https://arxiv.org/abs/2211.17192). How much is guessed follows from what calls
for so many tokens have cost, and from how many guessed tokens have been right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

_SIZES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)  # tokens of a call, the first of them known
MOST = _SIZES[-1] - 1  # tokens of a guess
_SLOPE = 0.06  # of a step, for each token more: until it has been measured
_NEWS = 0.2  # weight of the last call in costs
_MEMORY = 0.9  # weight of what was right and wrong before a guess
_CHANCE, _BELIEF = 0.7, 3.0  # part of guesses that are right, and weight of this belief
_FIRST_PAUSE, _LAST_PAUSE = 4, 256  # steps without a guess behind one that has not paid
_FEW = 3  # calls of a kind before their cost is known; plain steps before the first guess of a model that costs something
_SELDOM = 64  # such guesses before the next plain step
_MOST_AHEAD = 32  # steps of a call where nothing can be guessed


class Guess(NamedTuple):
    """Of the next tokens, int64 [n_rows, n]. kind: guesses of one kind are right about as often. chance: of one token to be
    right, as long as none of the kind has been tried.
    """

    tokens: np.ndarray
    kind: int = 0
    chance: float = _CHANCE


class Guesser(Protocol):
    """Who guesses the next tokens of a request."""

    @property
    def seconds(self) -> float | None:
        """What a guessed token costs; None if that is not known yet."""

    def add(self, tokens: np.ndarray) -> None:
        """The next token of each row, int64 [n_rows]."""

    def guess(self, n: int) -> Guess | None:
        """At most n tokens of each row behind those; None without an idea."""

    def meanwhile(self) -> None:
        """A step without guesses begins: until the next token is chosen it may do what it has to do then."""


class StepCosts:
    """What calls of a program for some tokens of some rows take on this machine: measured in requests, a running mean."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}
        self._n_noted: dict[tuple[int, int], int] = {}

    def note(self, n_rows: int, n_tokens: int, seconds: float) -> None:
        """A call for so many tokens in each row has taken this long."""
        known = self._seconds.get((n_rows, n_tokens)) or self.seconds(n_rows, n_tokens) or seconds
        # calls are slow at times for reasons of others, and the first one of its kind is
        weight = _NEWS if seconds > known else 2 * _NEWS
        self._seconds[n_rows, n_tokens] = known + weight * (min(seconds, 2 * known) - known)
        self._n_noted[n_rows, n_tokens] = self.n_noted(n_rows, n_tokens) + 1

    def n_noted(self, n_rows: int, n_tokens: int) -> int:
        """How often such a call has been measured."""
        return self._n_noted.get((n_rows, n_tokens), 0)

    def seconds(self, n_rows: int, n_tokens: int) -> float:
        """What such a call may take; 0 if none has been measured for so many rows.

        One that was measured only a few times may have been slow by chance: what others say counts more, so that it is tried
        again.
        """
        if self.n_noted(n_rows, n_tokens) >= _FEW:
            return self._seconds[n_rows, n_tokens]
        known = self._seconds
        measured = [size for rows, size in list(known) if rows == n_rows]
        measured = [size for size in measured if self.n_noted(n_rows, size) >= _FEW] or measured
        if n_tokens in measured:
            return known[n_rows, n_tokens]
        below = max((size for size in measured if size < n_tokens), default=0)
        above = min((size for size in measured if size > n_tokens), default=0)
        if below and above:
            first, last = known[n_rows, below], known[n_rows, above]
            return first + (last - first) * (n_tokens - below) / (above - below)
        nearest = below or above
        slope = (1 + _SLOPE * (n_tokens - 1)) / (1 + _SLOPE * (nearest - 1))
        return known[n_rows, nearest] * slope if nearest else 0.0


class Speculation:
    """What is guessed in one request, and how much of it.

    most: tokens of a guess. costs: of the program that checks them, or of any other one at first.
    """

    def __init__(self, guesser: Guesser, most: int, costs: StepCosts) -> None:
        self._guesser, self._most, self._costs = guesser, most, costs
        self._right: dict[
            int, tuple[float, float]
        ] = {}  # by kind: of so many that were tried, with less weight each time
        self._guess = Guess(np.zeros((0, 0), np.int64))  # the last one
        self._pause, self._left = _FIRST_PAUSE, 0  # steps without a guess: from now on, and still
        self._n_ahead = 1
        self._n_guesses = 0

    def add(self, tokens: np.ndarray) -> None:
        """The next token of each row, int64 [n_rows]: the loop's choice."""
        self._left -= 1
        self._guesser.add(tokens)

    def guess(self, n_rows: int, most: int) -> np.ndarray | None:
        """The tokens to check behind the last one, int64 [n_rows, at most `most`]; None where a plain step is better."""
        most = min(most, self._most)
        is_free = self._guesser.seconds == 0
        if most < 1 or self._left > 0 or (not is_free and self._needs_step(n_rows)):
            return None
        # of those that cost something, none is made that does not pay
        guess = self._guesser.guess(most if is_free else self._wanted(n_rows, most))
        if guess is None:
            return None
        self._guess = guess
        n = guess.tokens.shape[1]
        self._n_ahead = 1
        self._n_guesses += 1
        return guess.tokens[:, : self._wanted(n_rows, n) if is_free else n]

    def _needs_step(self, n_rows: int) -> bool:
        """Whether a plain step is to be made so that its cost is known."""
        is_due = self._n_guesses >= _SELDOM
        self._n_guesses %= _SELDOM
        return is_due or self._costs.n_noted(n_rows, 1) < _FEW

    def ahead(self, most: int) -> int:
        """Plain steps that may be made at once, more each time."""
        self._n_ahead = min(2 * self._n_ahead, _MOST_AHEAD)
        return max(1, min(most, self._n_ahead // 2, self._left if self._left > 0 else most))

    def note(self, n_guessed: int, n_right: int) -> None:
        """So many of the guessed tokens were right, before one that was not or none was needed."""
        right, tried = self._record()
        right, tried = right * _MEMORY + n_right, tried * _MEMORY + min(n_right + 1, n_guessed)
        self._right[self._guess.kind] = right, tried
        # what is right need not pay where it costs something
        if n_right == n_guessed and self._guesser.seconds == 0:
            self._pause, self._left = _FIRST_PAUSE, 0

    def meanwhile(self) -> None:
        """See `Guesser.meanwhile`."""
        self._guesser.meanwhile()

    def note_call(self, n_rows: int, n_tokens: int, seconds: float) -> None:
        """A step for so many tokens in each row has taken this long."""
        self._costs.note(n_rows, n_tokens, seconds)

    def _wanted(self, n_rows: int, most: int) -> int:
        """How many tokens are to be guessed, at least one."""
        n = self._worth(n_rows, most)
        if n == 0:
            # now and then it is tried all the same: the text may have changed
            self._left, self._pause = self._pause, min(2 * self._pause, _LAST_PAUSE)
        elif self._guesser.seconds != 0:
            self._pause = _FIRST_PAUSE
        return max(n, 1)

    def _record(self) -> tuple[float, float]:
        """Of the last guess's kind: how many were right, of how many that were tried."""
        return self._right.get(self._guess.kind, (self._guess.chance * _BELIEF, _BELIEF))

    def _worth(self, n_rows: int, most: int) -> int:
        """How many guessed tokens make most tokens a second; 0 if none does."""
        right, tried = self._record()
        chance, costs = right / tried, self._costs
        step, guessed = costs.seconds(n_rows, 1), self._guesser.seconds or 0.0
        best, best_rate = 0, 1.0
        for size in _SIZES:
            n = min(size - 1, most)
            expected = float(n + 1) if chance >= 1 else (1 - chance ** (n + 1)) / (1 - chance)
            # without a measurement, as many steps as the slope says
            cost = (costs.seconds(n_rows, n + 1) + n * guessed) / step if step else 1 + _SLOPE * n
            if expected / cost > best_rate:
                best, best_rate = n, expected / cost
            if n == most:
                break
        return best


class InTurn:
    """Several in place of one `Speculation`: the first of them that has a guess is asked."""

    def __init__(self, parts: Sequence[Speculation]) -> None:
        self._parts, self._asked = parts, parts[0]

    def add(self, tokens: np.ndarray) -> None:
        for each in self._parts:
            each.add(tokens)

    def guess(self, n_rows: int, most: int) -> np.ndarray | None:
        for each in self._parts:
            guess = each.guess(n_rows, most)
            if guess is not None:
                self._asked = each
                return guess
        return None

    def ahead(self, most: int) -> int:
        return min(each.ahead(most) for each in self._parts)

    def note(self, n_guessed: int, n_right: int) -> None:
        self._asked.note(n_guessed, n_right)

    def meanwhile(self) -> None:
        for each in self._parts:
            each.meanwhile()

    def note_call(self, n_rows: int, n_tokens: int, seconds: float) -> None:
        self._parts[0].note_call(n_rows, n_tokens, seconds)  # they share the costs
