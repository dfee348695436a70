"""Memory that the processes of a group have mapped, and that nobody else can reach.

It is a file in /dev/shm of a name that nobody can guess, mode 0600, which is deleted as soon as all have mapped it: nothing
is left of it, however the processes end. What is left where they end before that is deleted by the next segment of the
same user.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
import stat
from pathlib import Path

import numpy as np

from hfopt.errors import RankError
from hfopt.kernels.shared import member as layout
from hfopt.machine import process

FOLDER = Path("/dev/shm")
_PREFIX = "hfopt"
_NONCE = 16  # bytes


class Segment:
    """One process's mapping.

    name: of the file in `FOLDER`, which says all that the other processes have to know. address: of its first byte.
    """

    def __init__(self, name: str, file: int, n_bytes: int) -> None:
        self.name = name
        self._memory = mmap.mmap(file, n_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.bytes = np.frombuffer(self._memory, np.uint8)
        self.address = self.bytes.ctypes.data

    @classmethod
    def create(cls, size: int, capacity: int) -> Segment:
        """For `size` ranks, with buffers of so many bytes. Raises `RankError` if there is no room for it."""
        _delete_leftovers()
        n_bytes = layout.segment_bytes(size, capacity)
        nonce = secrets.token_hex(_NONCE)
        name = f"{_PREFIX}-{os.geteuid()}-{process.namespace()}-{os.getpid()}-{nonce}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            file = os.open(FOLDER / name, flags, 0o600)
        except OSError as error:
            raise RankError(f"{FOLDER} takes no file for the memory of {size} ranks: {error}") from error
        try:
            os.posix_fallocate(file, 0, n_bytes)  # memory that is missing would kill those who touch it
            segment = cls(name, file, n_bytes)
            segment._head()[:] = _head(size, capacity, nonce)
        except BaseException as error:
            os.unlink(FOLDER / name)
            if isinstance(error, OSError):
                raise RankError(
                    f"{FOLDER} has no {n_bytes / 2**20:.1f} MiB for the memory of {size} ranks: {error}. Containers set "
                    "its size by --shm-size"
                ) from error
            raise
        finally:
            os.close(file)
        return segment

    @classmethod
    def open(cls, name: str, size: int, capacity: int) -> Segment:
        """That of another process of this user. Raises `RankError` if it is not what that one has made."""
        n_bytes = layout.segment_bytes(size, capacity)
        try:
            file = os.open(FOLDER / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise RankError(f"the memory of the group cannot be opened: {error}") from error
        try:
            status = os.fstat(file)
            if (
                not stat.S_ISREG(status.st_mode)
                or status.st_uid != os.geteuid()
                or stat.S_IMODE(status.st_mode) != 0o600
                or status.st_size != n_bytes
                or status.st_nlink != 1
            ):
                raise RankError(f"{FOLDER / name} is not what rank 0 has made: {status}")
            segment = cls(name, file, n_bytes)
        except OSError as error:
            raise RankError(f"the memory of the group cannot be mapped: {error}") from error
        finally:
            os.close(file)
        if segment._head().tolist() != _head(size, capacity, name.rpartition("-")[2]):
            raise RankError(f"{FOLDER / name} is of another version of hfopt, or of another group")
        return segment

    def unlink(self) -> None:
        """Delete the file; those who have mapped it keep the memory."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(FOLDER / self.name)

    def _head(self) -> np.ndarray:
        return self.bytes[: 8 * layout.HEAD_WORDS].view(np.int64)

    def failure(self) -> tuple[int, int]:
        """(why the group has failed, the rank that said so); 0, 0 if it has not."""
        word = int(self._failure_word()[0])
        return word & 0xFF, word >> 8

    def fail(self, reason: int, rank: int) -> None:
        """Tell all who wait; what another rank has said before stays."""
        word = self._failure_word()
        if word[0] == 0:
            word[0] = reason | rank << 8

    def _failure_word(self) -> np.ndarray:
        return self.bytes[layout.FAILURE : layout.FAILURE + 8].view(np.int64)

    def rank_words(self, rank: int) -> np.ndarray:
        """Words of a rank: see `kernels.shared.member`."""
        first = layout.RANKS + rank * layout.RANK
        return self.bytes[first : first + layout.RANK].view(np.int64)


def _head(size: int, capacity: int, nonce: str) -> list[int]:
    # half of the nonce: a file of this name that another process has put there does not have it
    return [layout.MAGIC, layout.VERSION, size, capacity, int(nonce[:15], 16)]


def _delete_leftovers() -> None:
    """Segments of this user's processes that have ended before all had mapped them."""
    mine = re.compile(rf"{_PREFIX}-{os.geteuid()}-{process.namespace()}-(\d+)-[0-9a-f]{{{2 * _NONCE}}}")
    with contextlib.suppress(OSError):
        for name in os.listdir(FOLDER):
            found = mine.fullmatch(name)
            if found is None or process.is_running(int(found[1])):
                continue
            with contextlib.suppress(OSError):
                if (FOLDER / name).lstat().st_uid == os.geteuid():
                    os.unlink(FOLDER / name)
