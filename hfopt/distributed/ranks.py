"""The processes that have a model together, and what they do and decide together."""

from __future__ import annotations

import hashlib
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hfopt.distributed.cluster import ClusterGroup
from hfopt.distributed.group import SharedGroup
from hfopt.distributed.placement import take_share
from hfopt.errors import UnsupportedModel
from hfopt.kernels.shared.member import DONE

LIMIT = 10.0  # seconds after which a rank that has not come is taken for one that hangs
_BETWEEN_REQUESTS = 1800.0  # the same while all wait for the next request
_WATCH = 0.5  # seconds from look to look at the other processes


class Ranks:
    """The ranks of a process group, of which this process is one; each has to make the same calls in the same order.

    Sums go through memory that the ranks of a machine share.

    rank, size: of this process, and how many there are. words: for the collectives of a program, int64 [2], see
    `kernels.instruction.Group`; None of several machines. lock: held while a request runs. group: of
    torch.distributed, None for all. shared: those of this machine.

    Methods raise `RankError` when a rank has ended, does not come within `LIMIT`, or does something else.
    """

    def __init__(self, group: Any) -> None:
        take_share(group)  # before threads start that wait for others
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.lock = threading.RLock()
        self._status = np.full(1, DONE, np.int64)
        self.words: np.ndarray | None = None
        # the ranks of a part of all processes have to be of one machine
        is_whole = self.size == dist.get_world_size()
        self._collectives = ClusterGroup(limit=LIMIT) if is_whole else SharedGroup(group, limit=LIMIT)
        self.shared = (
            self._collectives.shared if isinstance(self._collectives, ClusterGroup) else self._collectives
        )
        if self.shared.size == self.size:
            self.words = np.array([self.shared.address, self._status.ctypes.data], np.int64)
        watch = threading.Thread(target=_watch, args=(weakref.ref(self.shared),), daemon=True)
        watch.start()

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self  # a copy of a model belongs to the same processes

    def __reduce__(self) -> Any:
        raise UnsupportedModel("a model that processes have together cannot be pickled: use save_pretrained")

    # ---- sums -----------------------------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over all ranks, in place, with the same bits on all of them: contiguous float32, bfloat16 or float16."""
        self._collectives.all_reduce(tensor)

    @contextmanager
    def running(self) -> Iterator[None]:
        """In the block a program runs, whose collectives use `words`."""
        with self.shared.used():
            yield
        status, self._status[0] = int(self._status[0]), DONE
        if status != DONE:
            self.shared.look(status)

    # ---- decisions ------------------------------------------------------------------------------------------------------

    @contextmanager
    def patient(self) -> Iterator[None]:
        """In the block, one may take its time: compiling, or measuring on a busy machine."""
        with self.shared.limited(_BETWEEN_REQUESTS):
            yield

    def first(self, value: int) -> int:
        """What the first of them has given."""
        told = torch.tensor([value], dtype=torch.long, device="cpu")
        return int(self._collectives.broadcast(told))

    def first_flags(self, flags: np.ndarray) -> np.ndarray:
        """The same of several at once: bool [n]."""
        told: np.ndarray = self._collectives.broadcast(torch.from_numpy(flags.copy())).numpy()
        return told

    def agree(self, reason: str | None) -> str | None:
        """The reason against something that the first rank with one has given, in words; None if none has."""
        given = ((rank, each) for rank, each in enumerate(self._told(reason)) if each is not None)
        rank, found = next(given, (None, None))
        return found if rank in (None, self.rank) else f"{found} (in rank {rank})"

    def different(self, parts: dict[str, str]) -> tuple[int, str] | None:
        """Begin a request: (a rank, the name of a part that is another than in the first one), None if all are equal."""
        # without words as long as all are equal
        digest = hashlib.blake2b(repr(sorted(parts.items())).encode(), digest_size=16).digest()
        own = torch.frombuffer(bytearray(digest), dtype=torch.long)[None]
        with self.patient():
            told = self._collectives.all_gather(own)
        if bool((told == told[0]).all()):
            return None
        first, *_ = given = self._told(parts)
        for rank, others in enumerate(given):
            names = sorted(others.keys() | first.keys())
            name = next((name for name in names if others.get(name) != first.get(name)), None)
            if name is not None:
                return rank, name
        return None

    def _told(self, value: Any) -> list[Any]:
        """What each of them has given, in order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def _watch(group: weakref.ref[SharedGroup]) -> None:
    """End the waiting of this process for one that has ended, as long as the group is used."""
    while (shared := group()) is not None and not shared.is_over:
        shared.watch()
        del shared
        time.sleep(_WATCH)
