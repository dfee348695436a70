"""Other processes of this machine: where they are, and whether they are still there."""

from __future__ import annotations

import contextlib
import os
import platform
import select
from pathlib import Path

from hfopt.machine import linux


def place_of_process(memory: Path) -> tuple[str, ...]:
    """Equal in processes that run on one system, know each other by their numbers and share the file system at `memory`."""
    device = ""
    with contextlib.suppress(OSError):
        device = str(memory.stat().st_dev)
    return (
        platform.node(),
        linux.text(linux.PROC / "sys/kernel/random/boot_id").strip(),
        namespace(),
        device,
    )


def namespace() -> str:
    """Number of the namespace of process numbers that this process is in; "" where the system does not say."""
    with contextlib.suppress(OSError):
        return str((linux.PROC / "self/ns/pid").stat().st_ino)
    return ""


def is_running(process: int) -> bool:
    """Whether there is a process of this number; one that has ended and waits for its parent is not running."""
    state = linux.text(linux.PROC / str(process) / "stat").rpartition(")")[2].split()
    return bool(state) and state[0] not in ("Z", "X", "x")


class Watched:
    """A process of this machine, known by more than its number, which another one may get when it has ended."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._file: int | None = None
        # an old kernel, or one that does not allow it
        with contextlib.suppress(OSError, AttributeError):
            self._file = os.pidfd_open(process)

    def has_ended(self) -> bool:
        if self._file is None:
            return not is_running(self._process)
        poll = select.poll()
        poll.register(self._file, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Watch it no more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self.close()
