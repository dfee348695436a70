"""A stream of layers from disk: each is in memory while it is computed, and the next ones are read meanwhile."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from hfopt.machine import pages
from hfopt.streaming.budget import Split

_ABSENT, _COMING, _HERE, _GOING = range(4)
_IDLE = 1.0  # seconds without work after which the thread that reads ends


class Part(NamedTuple):
    """A layer, or the head: its weights in files."""

    name: str
    extents: tuple[pages.Extent, ...]

    @property
    def n_bytes(self) -> int:
        return sum(each.n_bytes for each in self.extents)


class LayerStream:
    """Brings the parts of a model into memory in the order in which steps go through them, and lets them go again.

    Only time depends on it: a page that is not here when a kernel reads it is read then. Threads share it.

    parts: in order, `split.kept` of them stay. owners: what keeps the files mapped. budget: bytes of memory for weights;
    held: of those that are none of the parts.
    """

    def __init__(
        self, parts: Sequence[Part], split: Split, owners: Sequence[Any], budget: int, held: int
    ) -> None:
        self.parts, self.split, self._owners, self.budget, self.held = parts, split, owners, budget, held
        self._sizes = [each.n_bytes for each in parts]
        self._kept = set(split.kept)
        self.turns = [Turn(self, place) for place in range(len(parts))]
        self._begin()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copies and pickles of a model have their weights in memory, and no stream."""
        return type(None), ()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._states = [_ABSENT] * len(self.parts)
        self._users = [0] * len(self.parts)
        self._position = 0
        self._reader: threading.Thread | None = None
        self.bytes_read, self._seconds = 0, 0.0

    @property
    def step_bytes(self) -> int:
        """Bytes that each step reads from disk."""
        return sum(size for place, size in enumerate(self._sizes) if place not in self._kept)

    @property
    def rate(self) -> float | None:
        """Bytes a second at which parts have been read so far."""
        return self.bytes_read / self._seconds if self._seconds else None

    def clear(self) -> None:
        """Give back all pages that are not to be here, whoever has touched them."""
        with self._changed:
            absent = [i for i, state in enumerate(self._states) if state == _ABSENT and i not in self._kept]
        for place in absent:
            pages.give_back(self.parts[place].extents)

    def enter(self, place: int) -> None:
        """Wait for a part; it stays until as many calls of `leave`."""
        if (
            os.getpid() != self._process
        ):  # a forked child has no reader, and perhaps locks that nobody will open
            self._begin()
        with self._changed:
            self._users[place] += 1
            self._position = place
            try:
                while self._states[place] != _HERE:
                    self._read_on()
                    self._changed.wait()
            except BaseException:  # Ctrl-C: the block is not entered
                self._users[place] -= 1
                raise
            self._read_on()

    def leave(self, place: int) -> None:
        """Let a part go, if nobody else is in it."""
        with self._changed:
            self._users[place] -= 1
            if self._position == place:
                self._position = (place + 1) % len(self.parts)  # its own turn is the farthest away now
            is_over = self._users[place] == 0 and place not in self._kept
            if is_over:
                self._states[place] = _GOING
        if is_over:
            self._give_back(place)

    def _give_back(self, place: int) -> None:
        is_gone = pages.give_back(self.parts[place].extents)
        with self._changed:
            if not is_gone:  # with what was written into it, it is as good as any other memory
                self._kept.add(place)
            self._states[place] = _ABSENT if is_gone else _HERE
            self._read_on()
            self._changed.notify_all()

    # ---- reading ahead: under the lock, but for what takes time ------------------------------------------------------

    def _read_on(self) -> None:
        """Let the reader look for work; it is begun if there is none."""
        if self._reader is None and self._next() is not None:
            self._reader = threading.Thread(target=self._read, name="hfopt reads layers", daemon=True)
            self._reader.start()
        self._changed.notify_all()

    def _read(self) -> None:
        try:
            self._read_parts()
        finally:  # who waits begins another one
            with self._changed:
                self._reader = None
                self._changed.notify_all()

    def _read_parts(self) -> None:
        while True:
            with self._changed:
                place = self._next()
                if place is None:
                    if self._changed.wait(_IDLE) or self._next() is not None:
                        continue
                    return
                victim = self._victim(place)
                self._states[place if victim is None else victim] = _COMING if victim is None else _GOING
            if victim is not None:
                self._give_back(victim)
                continue
            begin = time.perf_counter()
            try:
                for each in self.parts[place].extents:
                    pages.fetch(each)
            finally:  # what is missing is read when it is touched
                with self._changed:
                    self.bytes_read += self._sizes[place]
                    self._seconds += time.perf_counter() - begin
                    self._states[place] = _HERE
                    self._changed.notify_all()

    def _next(self) -> int | None:
        """The part to be read next: one that somebody waits for, or else the first that is not here, if there is room."""
        n = len(self.parts)
        order = [(self._position + ahead) % n for ahead in range(n)]
        absent = [place for place in order if self._states[place] == _ABSENT]
        waited_for = [place for place in absent if self._users[place]]
        if waited_for:
            return waited_for[0]
        return absent[0] if absent and self._fits(absent[0]) else None

    def _fits(self, place: int) -> bool:
        if place in self._kept:
            return True
        here = (i for i, state in enumerate(self._states) if state != _ABSENT and i not in self._kept)
        return self._sizes[place] + sum(self._sizes[i] for i in here) <= self.split.window

    def _victim(self, place: int) -> int | None:
        """What has to go first: the part that would be used last, of those that were read ahead in vain; or None."""
        if self._fits(place):
            return None
        n = len(self.parts)
        order = [(self._position + ahead) % n for ahead in reversed(range(n))]
        idle = (i for i in order if self._states[i] == _HERE and not self._users[i] and i not in self._kept)
        return next(idle, None)


class Turn:
    """A block in which a part of a stream is in memory."""

    __slots__ = ("_place", "_stream")

    def __init__(self, stream: LayerStream, place: int) -> None:
        self._stream, self._place = stream, place

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def __enter__(self) -> None:
        self._stream.enter(self._place)

    def __exit__(self, *args: object) -> None:
        self._stream.leave(self._place)
