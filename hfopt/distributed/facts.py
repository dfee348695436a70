"""What the processes of a group know of each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from hfopt.distributed.segment import FOLDER
from hfopt.errors import RankError
from hfopt.kernels.shared import system
from hfopt.machine.cores import cores_of_process
from hfopt.machine.process import place_of_process

_SPIN = 50_000  # nanoseconds that a rank waits awake where each thread has a core, hardly at all elsewhere
_SHORT_SPIN = 2_000


class Facts(NamedTuple):
    """What the ranks have to know of each other."""

    process: int
    user: int
    place: tuple[str, ...]
    cores: frozenset[int]
    quota: float | None
    threads: int


def facts_of_process() -> Facts:
    cores = cores_of_process()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(cores.online)
    user = os.geteuid() if hasattr(os, "geteuid") else -1
    place = place_of_process(FOLDER) if system.IS_KNOWN else ()
    return Facts(os.getpid(), user, place, frozenset(allowed), cores.quota, torch.get_num_threads())


def exchange(mine: Any, size: int, group: dist.ProcessGroup | None) -> list[Any]:
    """What each rank has to say."""
    found: list[Any] = [None] * size
    dist.all_gather_object(found, mine, group)
    return found


def check_one_machine(ranks: Sequence[Facts]) -> None:
    """Raise `RankError`, on all ranks or none, unless all are processes of one machine and user."""
    first = ranks[0]
    for rank, facts in enumerate(ranks):
        if not facts.place:
            raise RankError(
                f"rank {rank} runs on a system without futexes: ranks share memory on Linux alone"
            )
        if facts.user != first.user:
            raise RankError(
                f"rank {rank} is of user {facts.user} and rank 0 of {first.user}: they share no memory"
            )
        if facts.place != first.place:
            raise RankError(f"ranks 0 and {rank} run on different machines or in different containers: {first.place[0]}"
                            f" and {facts.place[0]}; they share no {FOLDER}, or do not see each other")  # fmt: skip


def spin_of(ranks: Sequence[Facts]) -> int:
    """Nanoseconds to wait awake: long only where no thread takes another one's core by that."""
    cores = float(len(frozenset[int]().union(*(facts.cores for facts in ranks))))
    quotas = [facts.quota for facts in ranks if facts.quota is not None]
    return _SPIN if min([cores, *quotas]) >= sum(facts.threads for facts in ranks) else _SHORT_SPIN
