"""Turns of processes: what one of them makes for all, the others wait for."""

import contextlib
import os
import time
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there all of them make it
    fcntl = None  # type: ignore[assignment]

_PATIENCE = 120.0  # seconds, after which a process goes on by itself: the other one may hang
_PAUSE = 0.02


class Turn:
    """A lock of this name among the processes that use a folder; where none can be had, all have their turn at once.

    It ends with the process that has taken it, whatever becomes of that.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def take(self) -> None:
        """Wait until no other process has it."""
        if fcntl is None or self._file is not None:
            return
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            return
        end = time.monotonic() + _PATIENCE
        while not self._is_taken():
            if time.monotonic() > end:
                self.give()
                return
            time.sleep(_PAUSE)
        _held.add(self)

    def _is_taken(self) -> bool:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True

    def give(self) -> None:
        """Let others have it, if this process has."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a child may have inherited the file
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self.forget()

    def forget(self) -> None:
        """Close the file, which in a child that was forked is the parent's."""
        _held.discard(self)
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "Turn":
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.give()


_held: "weakref.WeakSet[Turn]" = weakref.WeakSet()


def _forget_all() -> None:
    for turn in list(_held):
        turn.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
