"""The cores that this process may use, and as many threads as fit them."""

from __future__ import annotations

import functools
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from hfopt.machine import linux

logger = logging.getLogger(__name__)

# by which a user says how many threads torch begins with
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Cores:
    """What this process may use of the machine's cores.

    online: of the machine. allowed: by the affinity mask. quota: cores' worth of time that control groups grant; None
    without a limit.
    """

    online: int
    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads that can run at the same time: whole cores, and one more where at least half of it is granted."""
        granted = self.allowed if self.quota is None else math.floor(self.quota + 0.5)
        return max(1, min(granted, self.allowed))

    @property
    def reason(self) -> str:
        """In words, what sets that number."""
        limits = []
        if self.quota is not None and self.quota < self.allowed:
            limits.append(f"the cgroup quota grants {self.quota:g}")
        if self.allowed < self.online:
            limits.append(f"the affinity mask allows {self.allowed}")
        return f"{' and '.join(limits)} of {self.online} online cores" if limits else "all online cores"

    def __str__(self) -> str:
        return f"{self.usable} core{'' if self.usable == 1 else 's'} ({self.reason})"


def cores_of_process(root: Path = linux.ROOT) -> Cores:
    """The cores of this process as they are now. root: of the tree of files that tells."""
    online = os.cpu_count() or 1
    return Cores(online, len(_allowed() or range(online)), _quota(root))


def _allowed() -> set[int]:
    """Numbers of the cores in the affinity mask; none where the system has no such mask."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _quota(root: Path) -> float | None:
    """The smallest of the quotas of all groups that this process is in."""
    quotas = []
    for folder, is_second in linux.control_groups("cpu", root):
        if is_second:
            quota, _, period = linux.text(folder / "cpu.max").strip().partition(" ")
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = (linux.text(folder / name).strip() for name in names)
        if quota.isdigit() and period.isdigit() and int(period) > 0:  # without a limit it is max, or -1
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


@functools.cache  # later numbers are the user's
def fit_threads(root: Path = linux.ROOT) -> None:
    """Let torch, and the kernels with it, run on no more threads than fit, unless the user has said how many.

    Threads wait for each other spinning. Those that are more than a quota grants spin it away, and then all of them stand
    still for most of each tenth of a second; the same holds for torch's own operations between the kernels.
    """
    cores, threads = cores_of_process(root), torch.get_num_threads()
    if threads <= cores.usable:
        return
    if (chosen := _chosen(threads, root)) is not None:
        logger.warning(
            "%d threads, as %s says, and %s: steps may take many times as long as with %d.",
            threads,
            chosen,
            cores.reason,
            cores.usable,
        )
        return
    torch.set_num_threads(cores.usable)
    logger.warning(
        "torch and hfopt run on %d instead of %d threads: %s. Another number: torch.set_num_threads() from now on, or"
        " %s in the environment.",
        cores.usable,
        threads,
        cores.reason,
        _VARIABLES[0],
    )


def share_threads(n: int, root: Path = linux.ROOT) -> None:
    """Let torch, and the kernels with it, run on n threads, unless the user has said how many."""
    if _chosen(torch.get_num_threads(), root) is None:
        torch.set_num_threads(n)


def _chosen(threads: int, root: Path) -> str | None:
    """By what a user has said that there shall be so many threads; None if torch or `fit_threads` has chosen."""
    for name in _VARIABLES:
        if os.environ.get(name) and not (name == _VARIABLES[0] and _is_of_torchrun(root)):
            return f"{name}={os.environ[name]}"
    if threads == 1 and _is_of_torchrun(root):
        return None
    siblings = {}
    for file in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list"):
        siblings[int(file.parts[-3][3:])] = linux.text(file)
    numbers = {os.cpu_count() or 1, cores_of_process(root).usable}
    for cores in (siblings.keys(), _allowed()):  # the mask may have changed since
        # of all, or of each pair of hyperthreads one
        numbers |= {len(cores), len({siblings.get(core, str(core)) for core in cores})}
    return None if threads in numbers else "torch.set_num_threads()"


def _is_of_torchrun(root: Path) -> bool:
    """Whether torchrun has set OMP_NUM_THREADS, to 1, because the user has not: it is not in what torchrun began with."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get(_VARIABLES[0]) != "1":
        return False
    try:
        begun_with = (root / "proc" / str(os.getppid()) / "environ").read_bytes()
    except OSError:
        return False
    return not any(each.startswith(f"{_VARIABLES[0]}=".encode()) for each in begun_with.split(b"\0"))
