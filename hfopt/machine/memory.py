"""The memory of this process: how much it may still take, and in what pages."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from hfopt.machine import linux

_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone has them
_HUGE_PAGE = 1 << 21
_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


def advise_huge_pages(address: int, n_bytes: int) -> None:
    """Ask for huge pages in a new buffer, which is then read some percent faster; a hint that may have no effect.

    Only whole huge pages inside the buffer are touched by it, and small buffers not at all.
    """
    first = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    size = (address + n_bytes) // _HUGE_PAGE * _HUGE_PAGE - first
    if size > 0 and _HUGE_PAGES is not None:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _HUGE_PAGES)


def forget_pages(address: int, n_bytes: int) -> None:
    """Take the pages of a file that is mapped here out of this process; when they are touched, they are read again.

    Only whole pages inside the range are touched by it. Pages that were written to would lose that.
    """
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0 and _DONTNEED is not None:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _DONTNEED)


def available_memory(root: Path = linux.ROOT) -> int:
    """Bytes that can still be allocated: the smaller of the machine's and the control groups' headroom.

    `sys.maxsize` where neither is known (systems other than Linux). root: of the tree of files.
    """
    return min(_machine_headroom(root), _cgroup_headroom(root))


def _machine_headroom(root: Path) -> int:
    fields = _fields(root / "proc/meminfo")
    return fields["MemAvailable:"] * 1024 if "MemAvailable:" in fields else sys.maxsize


def _cgroup_headroom(root: Path) -> int:
    headroom = sys.maxsize
    for folder, is_second in linux.control_groups("memory", root):
        if is_second:
            limit, usage, cached = "memory.max", "memory.current", "inactive_file"
        else:
            limit, usage, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        allowed, used = (linux.text(folder / name).strip() for name in (limit, usage))
        if allowed.isdigit() and used.isdigit():
            # File pages that nobody uses are counted as used, and dropped when memory is wanted.
            dropped = _fields(folder / "memory.stat").get(cached, 0)
            headroom = min(headroom, max(0, int(allowed) - int(used) + dropped))
    return headroom


def _fields(file: Path) -> dict[str, int]:
    pairs = (line.split()[:2] for line in linux.text(file).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
