"""Pages of files that are mapped into this process: which they are, and how they are asked for and given back."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hfopt.machine import linux
from hfopt.machine.memory import forget_pages

_PAGE = mmap.PAGESIZE
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, which Python's mmap does not name
_RANDOM = getattr(mmap, "MADV_RANDOM", None)
_DONTNEED = getattr(os, "POSIX_FADV_DONTNEED", None)
_CHUNK = 1 << 25  # bytes of one request
_GAP = 1 << 16  # between two tensors that are read together
_READ_AHEAD = (
    1 << 23
)  # bytes around a range that the system may have read with it, and large pages across its ends
# of a word in /proc/self/pagemap: https://docs.kernel.org/admin-guide/mm/pagemap.html
_OF_FILE, _SWAPPED, _PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))


class Extent(NamedTuple):
    """A range of a file, and where it is mapped."""

    address: int
    n_bytes: int
    path: str
    offset: int

    @property
    def whole_pages(self) -> tuple[int, int]:
        """(address, bytes) of the pages that have nothing else in them."""
        first = -(-self.address // _PAGE) * _PAGE
        return first, max((self.address + self.n_bytes) // _PAGE * _PAGE - first, 0)

    @property
    def all_pages(self) -> tuple[int, int]:
        """(address, bytes) of the pages that it touches."""
        first = self.address // _PAGE * _PAGE
        return first, -(-(self.address + self.n_bytes) // _PAGE) * _PAGE - first


def extents(ranges: Iterable[tuple[int, int]]) -> list[Extent]:
    """The parts of files in which these (address, bytes) lie, in order, near ones as one; none of what is in no file."""
    maps = _mapped_files()
    starts = [start for start, *_ in maps]
    found: list[Extent] = []
    for address, n_bytes in sorted(ranges):
        place = bisect.bisect_right(starts, address) - 1
        if place < 0 or address + n_bytes > maps[place][1]:
            continue
        start, _, offset, path = maps[place]
        new = Extent(address, n_bytes, path, address - start + offset)
        if found and _are_near(found[-1], new):
            new = found[-1]._replace(n_bytes=address + n_bytes - found.pop().address)
        found.append(new)
    return found


def _are_near(one: Extent, other: Extent) -> bool:
    gap = other.address - one.address - one.n_bytes
    return one.path == other.path and gap < _GAP and other.offset - one.offset == other.address - one.address


def _mapped_files() -> list[tuple[int, int, int, str]]:
    """(first address, end, offset in the file, path), in order."""
    found = []
    for line in linux.text(linux.PROC / "self" / "maps").splitlines():
        bounds, _, offset, _, _, *path = line.split(maxsplit=5)
        if path and path[0].startswith("/"):
            start, end = (int(each, 16) for each in bounds.split("-"))
            found.append((start, end, int(offset, 16), path[0]))
    return found


def fetch(extent: Extent) -> None:
    """Wait until these pages are in memory and in the page tables. Pages that a file has lost are left out."""
    address, n_bytes = extent.all_pages
    for first in range(address, address + n_bytes, _CHUNK):
        size = min(_CHUNK, address + n_bytes - first)
        if _advise(first, size, _POPULATE_READ) == errno.EINVAL:  # an older system
            pages = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(first))
            pages[::_PAGE].max()


def _advise(address: int, n_bytes: int, advice: int) -> int:
    """0, or the number of the error."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes), advice)
    return ctypes.get_errno() if failed else 0


def give_back(parts: Sequence[Extent]) -> bool:
    """Let these pages go, out of the memory of this process and, unless others have them mapped, of the system.

    False, nothing changed, if somebody may have written into them: they would lose that.
    """
    if any(_is_written(*each.whole_pages) for each in parts):
        return False
    for each in parts:
        forget_pages(each.address, each.n_bytes)
        if _DONTNEED is not None:
            begin = max(each.offset - _READ_AHEAD, 0)
            end = each.offset + each.n_bytes + _READ_AHEAD
            with contextlib.suppress(OSError), open(each.path, "rb") as file:
                os.posix_fadvise(file.fileno(), begin, end - begin, _DONTNEED)
    return True


def _is_written(address: int, n_bytes: int) -> bool:
    """Whether a page has become memory of this process's own, or nobody can tell."""
    try:
        with open(linux.PROC / "self" / "pagemap", "rb", buffering=0) as file:
            file.seek(address // _PAGE * 8)
            words = np.frombuffer(file.read(n_bytes // _PAGE * 8), np.uint64)
    except OSError:
        return True
    return bool((((words & (_PRESENT | _SWAPPED)) != 0) & ((words & _OF_FILE) == 0)).any())


def read_alone(extent: Extent) -> None:
    """Let a touch of one of these pages read no others with it."""
    address, n_bytes = extent.whole_pages
    if _RANDOM is not None and n_bytes:
        _advise(address, n_bytes, _RANDOM)


def bytes_in_memory(parts: Iterable[Extent]) -> int:
    """How much of these pages the system has in memory."""
    n_pages = 0
    for each in parts:
        address, n_bytes = each.all_pages
        flags = np.empty(n_bytes // _PAGE, np.uint8)
        found = ctypes.c_void_p(flags.ctypes.data)
        if not ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes), found):
            n_pages += int((flags & 1).sum())
    return n_pages * _PAGE
