"""Guesses from the text itself: what followed the last tokens where they stood before (prompt lookup decoding)."""

from __future__ import annotations

import numpy as np

from .speculation import Guess

_PAIR = 1 << 32  # more than any token
_MOST_TRUST = 3  # more is not remembered


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
    """One row, and where in it stands what is being repeated.

    A copy may have other words in it: behind a token that differs it goes on with what follows in the original, as long as
    that has been right more often than not.
    """

    def __init__(self, tokens: list[int], longest: int) -> None:
        self._tokens: list[int] = []
        # of n-grams of each length, the place behind the last one and the one before: that of the text's end says nothing
        self._places: list[dict[object, tuple[int, int]]] = [{} for _ in range(longest)]
        # where the next token stood before, 0 if it did not, and how many are alike up to there
        self._source = self._n_alike = 0
        # whether one differs before those, and how often the text went on behind such a one
        self._is_edited, self._trust = False, 1
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        tokens = self._tokens
        if self._source:
            self._compare(token)
        tokens.append(token)
        end = len(tokens)
        for length, places in enumerate(self._places[:end], 1):
            key = _key(tokens, length)
            places[key] = end, places.get(key, (0, 0))[0]

    def _compare(self, token: int) -> None:
        """Go on with the next token of the original, if the text still is a copy of it."""
        is_alike = self._tokens[self._source] == token
        if self._is_edited and self._n_alike == 0:
            self._trust = min(max(self._trust + (1 if is_alike else -1), 0), _MOST_TRUST)
        self._source += 1
        if is_alike:
            self._n_alike += 1
        elif self._n_alike >= len(self._places):
            self._is_edited, self._n_alike = True, 0
        else:
            self._source = 0

    def follow(self, n: int) -> tuple[int, list[int]]:
        """(length of the n-gram, n tokens behind the place where it stood before); no tokens if it stood nowhere.

        The place is that of the original, or the last one. The length is 0 behind a token that differs there.
        """
        longest = len(self._places)
        if self._source and self._n_alike >= longest:
            return longest, self._behind(self._source, n)
        if self._source and self._is_edited and self._trust:
            return 0, self._behind(self._source, n)
        tokens = self._tokens
        for length in range(min(longest, len(tokens)), 0, -1):
            place = self._places[length - 1][_key(tokens, length)][1]
            if place:
                self._source, self._n_alike, self._is_edited = place, length, False
                return length, self._behind(place, n)
        return 0, []

    def _behind(self, place: int, n: int) -> list[int]:
        followed = self._tokens[place : place + n]
        # a text that has begun to repeat goes on: what is beyond its end is what has been guessed
        period = len(self._tokens) - place
        while len(followed) < n:
            followed.append(followed[len(followed) - period])
        return followed


def _key(tokens: list[int], length: int) -> object:
    if length == 1:
        return tokens[-1]
    return tokens[-2] * _PAIR + tokens[-1] if length == 2 else tuple(tokens[-length:])
