"""`hfopt doctor --distributed`: where ranks run, and how long their sums take."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from hfopt.console.output import progress, say, show_table
from hfopt.errors import InvalidInput
from hfopt.machine import pinning
from hfopt.machine.topology import in_words, physical_cores
from hfopt.words import counted

from .ranks import n_ranks

_SIZES = {8 << 10: "8 KB", 1 << 20: "1 MB"}
_ROUNDS, _CALLS = 5, 40


class _Place(NamedTuple):
    """Of a rank. cpus: logical processors that it may run on, of so many cores."""

    machine: str
    cpus: frozenset[int]
    n_cores: int
    nodes: frozenset[int]
    threads: int

    def in_words(self) -> list[str]:
        n_cores, n_threads = str(self.n_cores), str(self.threads)
        return [self.machine, in_words(self.cpus), n_cores, in_words(self.nodes), n_threads]


def run(args: argparse.Namespace) -> int:
    """What one of the ranks does."""
    if n_ranks() == 1:
        raise InvalidInput(f"--tp {args.tp}: at least 2 ranks are needed")
    from hfopt.distributed import ClusterGroup
    from hfopt.distributed.placement import begin_ranks

    begin_ranks()
    group = ClusterGroup()
    places: list[_Place] = [_place()] * group.size
    dist.all_gather_object(places, _place())
    with progress("Adding up over the ranks"):
        rows = [[label, *_sums(group.all_reduce, n_bytes)] for n_bytes, label in _SIZES.items()]
    say(f"{counted(group.size, 'rank')} on {counted(group.n_machines, 'machine')}\n")
    show_table(
        ["rank", "machine", "processors", "cores", "memory nodes", "threads"],
        [[str(rank), *place.in_words()] for rank, place in enumerate(places)],
    )
    say("")
    show_table(["all-reduce of bfloat16", "hfopt", "gloo", "gloo's time / hfopt's"], rows)
    say("")
    for line in [*_advice(places)] or ["No problem found."]:
        say(f"- {line}")
    group.barrier()
    group.close()
    return 0


def _place() -> _Place:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = physical_cores(allowed)
    nodes = frozenset(core.node for core in cores)
    return _Place(platform.node(), frozenset(allowed), len(cores), nodes, torch.get_num_threads())


def _sums(ours: Callable[[torch.Tensor], object], n_bytes: int) -> list[str]:
    """Medians of calls, in turn."""
    x = torch.zeros(n_bytes // 2, dtype=torch.bfloat16)
    spans: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for work, found in zip((ours, dist.all_reduce), spans, strict=True):
            for _ in range(_CALLS):
                begin = time.perf_counter()
                work(x)
                found.append(time.perf_counter() - begin)
    own, gloo = map(statistics.median, spans)
    return [f"{own * 1e6:.1f} µs", f"{gloo * 1e6:.1f} µs", f"{gloo / own:.1f}"]


def _advice(places: Sequence[_Place]) -> Iterator[str]:
    by_machine: dict[str, list[_Place]] = {}
    for place in places:
        by_machine.setdefault(place.machine, []).append(place)
    for machine, here in by_machine.items():
        cpus, threads = (
            frozenset[int]().union(*(each.cpus for each in here)),
            sum(each.threads for each in here),
        )
        if threads > len(cpus):
            fitting = len(cpus) // len(here)
            remedy = f"set OMP_NUM_THREADS={fitting}" if fitting else f"start {len(cpus)} ranks at most"
            of_what = f"{counted(threads, 'thread')} of {counted(len(here), 'rank')}"
            yield f"{machine}: {of_what} on {counted(len(cpus), 'processor')}: {remedy}."
        if len(here) > 1 and len(cpus) < sum(len(each.cpus) for each in here):
            reason = pinning.obstacle()
            yield f"{machine}: ranks run on the same processors" + (f" ({reason})." if reason else ".")
