"""The processes that have a model together, and what they do and decide together."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hfopt.distributed.group import SharedGroup
from hfopt.errors import RankError
from hfopt.kernels.shared.member import DONE

logger = logging.getLogger(__name__)


class Ranks:
    """The ranks of a process group, of which this process is one; each has to make the same calls in the same order.

    Sums go through memory that the ranks share, or, of several machines, through the process group itself.

    rank, size: of this process, and how many there are. words: for the collectives of a program, int64 [2], see
    `kernels.instruction.Group`; None of several machines. lock: held while a program or a request runs.

    Methods raise `RankError` when a rank has ended or does something else.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.lock = threading.RLock()
        self._status = np.full(1, DONE, np.int64)
        self.words: np.ndarray | None = None
        try:
            self._shared: SharedGroup | None = SharedGroup(group)
        except RankError as error:  # on all ranks
            logger.info("Sums go through torch.distributed: %s.", error)
            self._shared = None
        if self._shared is not None:
            self.words = np.array([self._shared.address, self._status.ctypes.data], np.int64)

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over all ranks, in place, with the same bits on all of them: contiguous float32, bfloat16 or float16."""
        if self._shared is not None:
            self._shared.all_reduce(tensor)
        else:
            dist.all_reduce(tensor, group=self._group)

    def first(self, value: int) -> int:
        """What the first of them has given."""
        told = torch.tensor([value], dtype=torch.long, device="cpu")
        if self._shared is not None:
            self._shared.broadcast(told)
        else:
            dist.broadcast(told, group=self._group, group_src=0)
        return int(told)

    def told(self, value: Any) -> list[Any]:
        """What each of them has given, in order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def agree(self, reason: str | None) -> str | None:
        """The reason against something that the first rank with one has given, in words; None if none has."""
        given = ((rank, each) for rank, each in enumerate(self.told(reason)) if each is not None)
        rank, found = next(given, (None, None))
        return found if rank in (None, self.rank) else f"{found} (in rank {rank})"

    def check(self) -> None:
        """Raises RankError if a collective of a program has not been done."""
        status = int(self._status[0])
        if status != DONE and self._shared is not None:
            self._status[0] = DONE
            self._shared.look(status)
