"""The processes of several machines that work on a model together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from hfopt.distributed.facts import exchange, facts_of_process
from hfopt.distributed.group import SharedGroup, address_of_sum
from hfopt.errors import InvalidInput, RankError


class ClusterGroup:
    """All ranks of torch.distributed, on any number of machines: memory that is shared within each, and between them what
    the process group does, which the first rank of each machine calls for all of its own.

    Methods, arguments and errors are those of `SharedGroup`. A sum is added in float32 within each machine in the order of
    ranks, then over machines as the backend does it, and rounded once: the same bits on all ranks.

    rank, size: of this process, and of all. shared: the ranks of this machine, with the bodies for compiled steps where
    n_machines is 1. limit: as in `SharedGroup`; between machines the process group's own time holds.

    >>> import torch
    >>> import torch.distributed as dist
    >>> from hfopt.distributed import ClusterGroup
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun: without arguments
    >>> group = ClusterGroup()
    >>> group.n_machines, group.all_gather(torch.ones(2))
    (1, tensor([1., 1.]))
    >>> group.close()
    >>> dist.destroy_process_group()
    """

    def __init__(self, *, limit: float = 60.0) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InvalidInput("torch.distributed is not initialised: call init_process_group first")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        facts = exchange(facts_of_process(), self.size, None)
        machines: dict[object, list[int]] = {}
        for rank, each in enumerate(facts):
            machines.setdefault((each.place, each.user), []).append(rank)
        self._machines = list(machines.values())  # in the order of their first ranks
        self.n_machines = len(self._machines)
        groups = [dist.new_group(ranks) for ranks in self._machines]
        self._leaders = dist.new_group([ranks[0] for ranks in self._machines])
        mine = next(place for place, ranks in enumerate(self._machines) if self.rank in ranks)
        self.shared = SharedGroup(groups[mine], limit=limit)

    def all_reduce(self, x: Tensor) -> Tensor:
        """As `SharedGroup.all_reduce`."""
        address_of_sum(x)
        if self.n_machines == 1 or x.dtype is torch.float32:
            return self._all_reduce(x)
        return x.copy_(self._all_reduce(x.float()))

    def _all_reduce(self, x: Tensor) -> Tensor:
        self.shared.all_reduce(x)
        self._between(lambda: dist.all_reduce(x, group=self._leaders))
        return self.shared.broadcast(x) if self.n_machines > 1 else x

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """As `SharedGroup.all_gather`."""
        if self.n_machines == 1:
            return self.shared.all_gather(x, dim)
        if not -x.ndim <= dim < x.ndim:
            raise InvalidInput(f"dim is {dim} and x has {x.ndim} dimensions: one of them is needed")
        mine = self.shared.all_gather(x[None])
        parts = torch.empty((self.size, *x.shape), dtype=x.dtype)

        def gather() -> None:
            for ranks in self._machines:
                of_machine = (
                    mine if self.rank == ranks[0] else torch.empty((len(ranks), *x.shape), dtype=x.dtype)
                )
                dist.broadcast(of_machine.view(torch.uint8), ranks[0], group=self._leaders)
                parts[ranks] = of_machine

        self._between(gather)
        return torch.cat(tuple(self.shared.broadcast(parts)), dim)

    def broadcast(self, x: Tensor) -> Tensor:
        """As `SharedGroup.broadcast`."""
        self._between(lambda: dist.broadcast(x, 0, group=self._leaders))
        return self.shared.broadcast(x)

    def arg_max(self, values: Tensor, indices: Tensor) -> None:
        """As `SharedGroup.arg_max`."""
        self.shared.arg_max(values, indices)
        if self.n_machines == 1:
            return

        def choose() -> None:
            all_values = [torch.empty_like(values) for _ in self._machines]
            all_indices = [torch.empty_like(indices) for _ in self._machines]
            dist.all_gather(all_values, values, group=self._leaders)
            dist.all_gather(all_indices, indices, group=self._leaders)
            values.copy_(all_values[0])
            indices.copy_(all_indices[0])
            for value, index in zip(all_values[1:], all_indices[1:], strict=True):
                is_nan, was_nan = value.isnan(), values.isnan()
                is_equal = (value == values) | (is_nan & was_nan)
                is_better = (value > values) & ~was_nan | (is_nan & ~was_nan) | (is_equal & (index < indices))
                values.copy_(torch.where(is_better, value, values))
                indices.copy_(torch.where(is_better, index, indices))

        self._between(choose)
        self.shared.broadcast(values)
        self.shared.broadcast(indices)

    def barrier(self) -> None:
        """As `SharedGroup.barrier`."""
        self.shared.barrier()
        self._between(lambda: dist.barrier(group=self._leaders))
        self.shared.barrier()

    def close(self) -> None:
        """As `SharedGroup.close`."""
        self.shared.close()

    def _between(self, work: Callable[[], object]) -> None:
        """What the first rank of each machine does for all of its own."""
        if self.n_machines > 1 and self.shared.rank == 0:
            with self._telling():
                work()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """The other ranks of this machine are told when its first rank fails: they wait for it."""
        self.shared.check()
        try:
            yield
        except BaseException as error:
            self.shared.close()
            if isinstance(error, RuntimeError):  # what the backend raises, DistBackendError among them
                raise RankError(f"between machines: {error}") from error
            raise
