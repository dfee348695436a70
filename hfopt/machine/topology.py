"""The physical cores of the machine by memory nodes, and shares of them for processes that work together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from hfopt.machine import linux


class Core(NamedTuple):
    """A physical core. node: of the memory near it. cpus: numbers of its logical processors, those that may be used."""

    node: int
    cpus: tuple[int, ...]


def physical_cores(allowed: Iterable[int], root: Path = linux.ROOT) -> list[Core]:
    """Of these logical processors, in the order of nodes; each is a core where no file tells. root: of the tree of files."""
    nodes = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        for cpu in _numbers(linux.text(folder / "cpulist")):
            nodes[cpu] = int(folder.name[4:])
    cores: dict[tuple[int, str], list[int]] = {}
    for cpu in sorted(allowed):
        siblings = linux.text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault((nodes.get(cpu, 0), siblings or str(cpu)), []).append(cpu)
    return sorted(Core(node, tuple(cpus)) for (node, _), cpus in cores.items())


def share_of(cores: Sequence[Core], index: int, n: int) -> list[Core]:
    """What the process `index` of n takes: as many as each other one, since all wait for the slowest.

    cores: in the order of nodes. Shares are whole nodes, or lie in one, where the numbers divide. Logical processors are
    shared where there are not enough cores; nothing where there are not enough of those.
    """
    if len(cores) < n:
        cores = [Core(core.node, (cpu,)) for core in cores for cpu in core.cpus]
    nodes = [list(each) for _, each in itertools.groupby(cores, lambda core: core.node)]
    if nodes and len({len(each) for each in nodes}) == 1 and n % len(nodes) == 0:
        per_node = n // len(nodes)
        cores, index, n = nodes[index // per_node], index % per_node, per_node
    size = len(cores) // n  # some are left over where it does not divide
    return list(cores[index * size : (index + 1) * size])


def in_words(numbers: Iterable[int]) -> str:
    """As Linux lists them: 0-3,8."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def _numbers(listed: str) -> list[int]:
    found: list[int] = []
    for part in filter(None, listed.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
