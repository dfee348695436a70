"""The processes of a torch.distributed group, and what they do and decide together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of a group, of which this is one; each has to make the same calls in the same order."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over all, in place, with the same bits everywhere: contiguous float32, bfloat16 or float16."""
        dist.all_reduce(tensor, group=self._group)

    def first(self, value: int) -> int:
        """What the first of them has given."""
        told = torch.tensor([value], dtype=torch.long, device="cpu")
        dist.broadcast(told, group=self._group, group_src=0)
        return int(told)

    def agree(self, reason: str | None) -> str | None:
        """The reason against something that the first process with one has given, in words; None if none has."""
        reasons: list[str | None] = [None] * self.size
        dist.all_gather_object(reasons, reason, group=self._group)
        given = ((rank, each) for rank, each in enumerate(reasons) if each is not None)
        rank, found = next(given, (None, None))
        return found if rank in (None, self.rank) else f"{found} (in rank {rank})"
