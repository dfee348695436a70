"""Where the ranks of a machine run: each on its share of the cores, with as many threads."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from hfopt.distributed.facts import Facts, exchange, facts_of_process
from hfopt.errors import RankError
from hfopt.machine.cores import share_threads
from hfopt.machine.pinning import VARIABLE, obstacle, pin
from hfopt.machine.topology import Core, in_words, physical_cores, share_of
from hfopt.words import counted, first_line

logger = logging.getLogger(__name__)

_READING = timedelta(hours=2)  # for all to read their parts of a model, as transformers has it
_done: list[bool] = []  # once in a process: later numbers of threads are the user's


def take_share(group: dist.ProcessGroup | None) -> None:
    """Keep this process to its share of the cores of its machine; all ranks of a group call it at the same time.

    Ranks that may run on different processors already stay where they are, and all do where a user says so
    (`machine.pinning`); threads are shared out all the same.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    facts = exchange(facts_of_process(), size, group)
    if _done:
        return
    here = [other for other, each in enumerate(facts) if each.place and each.place == facts[rank].place]
    if len(here) < 2:
        return
    _done.append(True)
    beside = [other for other in here if facts[other].cores == facts[rank].cores]
    share = share_of(physical_cores(facts[rank].cores), beside.index(rank), len(beside))
    share_threads(threads_of(share, [facts[other] for other in here]))
    reason = obstacle()
    if reason is None and len(beside) < len(here):
        reason = "the ranks have been given different processors"
    if reason is None and not share:
        reason = f"there are {len(here)} ranks and {counted(len(facts[rank].cores), 'processor')}"
    cpus = [cpu for core in share for cpu in core.cpus]
    nodes = {core.node for core in share}
    if reason is None and not pin(cpus, nodes):
        reason = "the system does not allow anything else"
    threads = counted(torch.get_num_threads(), "thread")
    if reason is not None:
        logger.info("Rank %d of %d runs on %s where it was: %s.", rank, size, threads, reason)
        return
    where = f"processors {in_words(cpus)} (memory node {in_words(nodes)})"
    # one of a machine's ranks is enough to say so
    level = logging.WARNING if rank == here[0] else logging.INFO
    logger.log(level, "Rank %d of %d keeps to %s, with %s; the others of this machine to equal shares. %s=0 in the"
               " environment leaves them where they are.", rank, size, where, threads, VARIABLE)  # fmt: skip


def threads_of(share: Sequence[Core], ranks: Sequence[Facts]) -> int:
    """Threads for a share: one on each core, and no more than its part of the quota that all have together."""
    quotas = [facts.quota for facts in ranks if facts.quota is not None]
    granted = min(quotas, default=math.inf) / len(ranks)
    return max(1, math.floor(min(len(share), granted + 0.5)))


def begin_ranks() -> None:
    """Make the process group of all that torchrun has started, if there is none, and take the share of this one."""
    if not dist.is_initialized():
        try:
            dist.init_process_group("gloo", timeout=_READING)
        except (ValueError, RuntimeError) as error:
            raise RankError(f"the ranks do not find each other: {first_line(error)}") from error
    take_share(None)
