"""Sums over the ranks of this machine: hfopt's over shared memory and gloo's, in turn.

    python scripts/collectives.py                                2 ranks of one thread
    python scripts/collectives.py --ranks 4 --dtype float32      others
    python scripts/collectives.py --pin                          each rank on a core of its own

Each round measures all sizes with one and with the other, from Python, and ours in a compiled loop as in a program: the
median of a round's calls, of the loop that of five means, and of the rounds the median and the best, since others may use
the machine.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from hfopt.distributed import SharedGroup
from hfopt.functional.checks import ELEMENTS
from hfopt.kernels.shared import launches as kernels
from hfopt.machine import env

_SIZES = (4 << 10, 8 << 10, 64 << 10, 1 << 20, 16 << 20)
_SECONDS = 0.15  # of a round for a size
_KINDS = ("from Python", "compiled loop", "gloo")


class Sums:
    """Sums of one size, in the three ways, which take turns."""

    def __init__(self, group: SharedGroup, n_bytes: int, dtype: torch.dtype) -> None:
        self._group = group
        self._x = torch.zeros(n_bytes // dtype.itemsize, dtype=dtype)
        self.n_bytes = n_bytes
        self.medians: dict[str, list[float]] = {kind: [] for kind in _KINDS}

    def measure(self) -> None:
        """One round of each."""
        for kind, work in (("from Python", self._shared), ("gloo", self._gloo)):
            self.medians[kind].append(statistics.median(self._times(work)))
        count = self._count(self._shared)
        self._group.barrier()
        spans = []
        for _ in range(5):
            begin = time.perf_counter()
            self._loop(count)
            spans.append((time.perf_counter() - begin) / count)
        self.medians["compiled loop"].append(statistics.median(spans))

    def _times(self, work: Callable[[], object]) -> list[float]:
        count = self._count(work)
        spans = []
        self._group.barrier()
        for _ in range(count):
            begin = time.perf_counter()
            work()
            spans.append(time.perf_counter() - begin)
        return spans

    def _count(self, work: Callable[[], object]) -> int:
        """How often it goes into a round; the same on all ranks."""
        begin = time.perf_counter()
        for _ in range(3):
            work()
        count = torch.tensor([max(5.0, 3 * _SECONDS / (time.perf_counter() - begin))])
        self._group.broadcast(count)
        return min(int(count), 3000)

    def _shared(self) -> None:
        self._group.all_reduce(self._x)

    def _gloo(self) -> None:
        dist.all_reduce(self._x)

    def _loop(self, count: int) -> None:
        like, address, n = ELEMENTS[self._x.dtype], self._x.data_ptr(), self._x.numel()
        status = kernels.all_reduce_again(like, self._group.address, address, n, count)
        if status:
            self._group.look(status)


def _measure(rounds: int, dtype: torch.dtype, pin: bool) -> None:
    """What each rank does."""
    if pin:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = SharedGroup()
    cases = [Sums(group, n_bytes, dtype) for n_bytes in _SIZES]
    for _ in range(rounds):
        for case in cases:
            case.measure()
    if group.rank == 0:
        load = os.getloadavg()[0]
        print(
            f"{env.cpu_model()}, {os.cpu_count()} cores, load {load:.1f}; {group.size} ranks of 1 thread",
            end="",
        )
        print(
            f"{' on cores of their own' if pin else ''}, {dtype}; microseconds, median (best) of {rounds} rounds"
        )
        print(f"{'bytes':>10}" + "".join(f"{kind:>22}" for kind in _KINDS) + f"{'gloo / ours':>22}")
        for case in cases:
            found = [[1e6 * each for each in case.medians[kind]] for kind in _KINDS]
            cells = [f"{statistics.median(each):.1f} ({min(each):.1f})" for each in found]
            ratios = [theirs / ours for ours, theirs in zip(found[0], found[2], strict=True)]
            ratio = f"{statistics.median(ratios):.1f} ({min(found[2]) / min(found[0]):.1f})"
            print(f"{case.n_bytes:>10}" + "".join(f"{cell:>22}" for cell in (*cells, ratio)))
    group.barrier()
    group.close()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--pin", action="store_true", help="each rank on a core of its own")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        _measure(arguments.rounds, getattr(torch, arguments.dtype), arguments.pin)
        return 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.call([*command, str(arguments.ranks), *sys.argv])


if __name__ == "__main__":
    sys.exit(main())
