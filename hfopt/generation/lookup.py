"""Guesses from the text itself: what followed the last tokens where they stood before (prompt lookup decoding)."""

from __future__ import annotations

import numpy as np

from .speculation import Guess

_PAIR = 1 << 32  # more than any token


class PromptLookup:
    """For each row an index of where its n-grams ended last, which grows with the text at a cost that does not.

    tokens: int64 [n_rows, length], the prompt. longest: of the n-grams, the longest of which that stood before says what
    follows. Source of the method: https://github.com/apoorvumang/prompt-lookup-decoding.
    """

    seconds = 0.0  # that a guessed token costs: next to nothing

    def __init__(self, tokens: np.ndarray, longest: int) -> None:
        self._rows = [_Text(row.tolist(), longest) for row in tokens]

    def add(self, tokens: np.ndarray) -> None:
        """The next token of each row, int64 [n_rows]."""
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.add(token)

    def meanwhile(self) -> None:
        """Nothing: its index is up to date."""

    def guess(self, n: int) -> Guess | None:
        """n tokens of each row; None unless all have been where they are now. Its kind is the shortest n-gram's length."""
        found = []
        for row in self._rows:
            length, tokens = row.follow(n)
            if not tokens:
                return None  # all rows go on together
            found.append((length, tokens))
        return Guess(np.array([tokens for _, tokens in found]), min(length for length, _ in found))


class _Text:
    """One row."""

    def __init__(self, tokens: list[int], longest: int) -> None:
        self._tokens: list[int] = []
        # of n-grams of each length, the place behind the last one and the one before: that of the text's end says nothing
        self._places: list[dict[object, tuple[int, int]]] = [{} for _ in range(longest)]
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        tokens = self._tokens
        tokens.append(token)
        end = len(tokens)
        for length, places in enumerate(self._places[:end], 1):
            key = _key(tokens, length)
            places[key] = end, places.get(key, (0, 0))[0]

    def follow(self, n: int) -> tuple[int, list[int]]:
        """(length of the n-gram, n tokens behind the last place where it stood before); no tokens if it stood nowhere."""
        tokens = self._tokens
        for length in range(min(len(self._places), len(tokens)), 0, -1):
            place = self._places[length - 1][_key(tokens, length)][1]
            if place:
                followed = tokens[place : place + n]
                # a text that has begun to repeat goes on: what is beyond its end is what has been guessed
                period = len(tokens) - place
                while len(followed) < n:
                    followed.append(followed[len(followed) - period])
                return length, followed
        return 0, []


def _key(tokens: list[int], length: int) -> object:
    if length == 1:
        return tokens[-1]
    return tokens[-2] * _PAIR + tokens[-1] if length == 2 else tuple(tokens[-length:])
