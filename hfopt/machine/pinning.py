"""Where the threads of this process run, and where its memory comes from."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Collection
from pathlib import Path

from hfopt.machine import linux

# "0" leaves processes where the system lets them run
VARIABLE = "HFOPT_PIN"
_OF_THE_USER = ("OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
# numbers of set_mempolicy and get_mempolicy
_CALLS = {"x86_64": (238, 239), "aarch64": (237, 236)}
_PREFERRED, _PREFERRED_MANY = 1, 5
_WORD = 64  # bits


def obstacle() -> str | None:
    """By what a user has said where threads run, in words; None if nothing is said."""
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE}=0"
    return next((f"{name}={os.environ[name]}" for name in _OF_THE_USER if os.environ.get(name)), None)


def pin(cpus: Collection[int], nodes: Collection[int]) -> bool:
    """Let all threads of this process, and those that they will start, run on these processors alone; False if it may not.

    New memory comes from these nodes first, and from others when they are full, unless a policy is in force already. What
    has been allocated stays where it is. Processes that this one starts inherit both.
    """
    try:
        os.sched_setaffinity(0, cpus)
    except OSError:
        return False
    for thread in _threads():
        with contextlib.suppress(OSError):  # it may have ended
            os.sched_setaffinity(thread, cpus)
    if len(list(Path(linux.ROOT / "sys/devices/system/node").glob("node[0-9]*"))) > 1:
        _prefer(nodes)
    return True


def _threads() -> list[int]:
    try:
        return [int(name) for name in os.listdir(linux.PROC / "self" / "task")]
    except OSError:
        return []


def _prefer(nodes: Collection[int]) -> None:
    """Take memory of these nodes first, in this thread and those that it starts; no effect where a container forbids it."""
    if platform.machine() not in _CALLS or not nodes:
        return
    set_policy, get_policy = _CALLS[platform.machine()]
    system, mode = ctypes.CDLL(None).syscall, ctypes.c_int(-1)
    nothing, zero = ctypes.c_void_p(), ctypes.c_ulong()
    if system(ctypes.c_long(get_policy), ctypes.byref(mode), nothing, zero, nothing, zero) or mode.value:
        return  # not told, or the user's, of numactl
    words = (ctypes.c_uint64 * (max(nodes) // _WORD + 1))()
    for node in nodes:
        words[node // _WORD] |= 1 << node % _WORD
    n_bits = ctypes.c_ulong(_WORD * len(words) + 1)  # the kernel takes one off
    for policy in (_PREFERRED_MANY, _PREFERRED)[
        : 2 if len(nodes) == 1 else 1
    ]:  # kernels before 5.15 prefer one alone
        if not system(ctypes.c_long(set_policy), ctypes.c_int(policy), words, n_bits):
            return
