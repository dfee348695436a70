"""The processes of one machine that work on a model together, and their collectives."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hfopt.distributed.facts import check_one_machine, exchange, facts_of_process, spin_of
from hfopt.distributed.failures import failure_in_words
from hfopt.distributed.segment import Segment
from hfopt.errors import InvalidInput, RankError
from hfopt.functional.checks import (
    ELEMENTS,
    address_of,
    check_contiguous,
    check_floats,
    plain_address,
    prepare_threads,
)
from hfopt.kernels.shared import launches as kernels
from hfopt.kernels.shared import member as layout
from hfopt.machine.process import Watched

_CAPACITY = 1 << 18  # bytes of a buffer: what is larger goes in parts, which stay in the cores' own caches
_PATIENCE = 100_000_000  # nanoseconds after which Python may look after signals and the other processes
_LIMIT = 60.0  # seconds


class SharedGroup:
    """The ranks of a process group, all of them processes of this machine, over memory that they share.

    All ranks make it at the same time, and then call the same methods in the same order, with tensors of the same sizes and
    dtypes. Results have the same bits on all ranks and in every run. When a rank ends, does not come, or calls something
    else, all others raise `RankError`, and the group cannot be used any more.

    group: of torch.distributed, which must be initialised; None: all ranks. limit: seconds to wait for a rank that lives.

    rank, size: of this process, and of the group. address: of this rank's record, for the bodies in
    `kernels.shared.collectives`, whose statuses other than 0 are given to `look`; held as long as this object.
    lock: to be held while bodies run; methods take it themselves.

    Raises `RankError` on all ranks where they cannot share memory: several machines, containers or users, no room in
    /dev/shm, not Linux.

    >>> import torch
    >>> import torch.distributed as dist
    >>> from hfopt.distributed import SharedGroup
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun: without arguments
    >>> group = SharedGroup()
    >>> group.all_reduce(torch.ones(3))
    tensor([1., 1., 1.])
    >>> group.close()
    >>> dist.destroy_process_group()
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, limit: float = _LIMIT) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InvalidInput("torch.distributed is not initialised: call init_process_group first")
        if not (isinstance(limit, int | float) and 0 < limit <= 1e9):
            raise InvalidInput(f"limit is {limit!r}: seconds are needed, more than 0")
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.lock = threading.RLock()
        self._process = os.getpid()
        self._facts = exchange(facts_of_process(), self.size, group)
        check_one_machine(self._facts)
        self._segment: Segment | None = shared_segment(self.rank, self.size, _CAPACITY, group)
        self._watched = [Watched(facts.process) for facts in self._facts]
        self._had_ended = False  # a process, when that was looked after
        self._failure: str | None = None
        self._record = np.zeros(layout.MEMBER_WORDS, np.int64)
        numbers = (self._segment.address, self.rank, self.size, _CAPACITY)
        times = (spin_of(self._facts), _PATIENCE, int(limit * 1e9))
        member = layout.Member(*numbers, *times)
        self._record[: len(member)] = member
        self.address: int = self._record.ctypes.data
        self._segment.rank_words(self.rank)[layout.PROCESS] = self._process

    # ---- collectives ------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor) -> Tensor:
        """x = its sum over ranks, in place: added in float32 in the order of ranks, and rounded once.

        x: float32, bfloat16 or float16, contiguous. Returns x. Raises `InvalidInput`, `RankError`.
        """
        address = address_of_sum(x)
        self._run(kernels.all_reduce, ELEMENTS[x.dtype], self.address, address, x.numel())
        return x

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """The tensors of all ranks behind each other along a dimension, as `torch.cat` does it.

        x: contiguous, of any dtype. Raises `InvalidInput`, `RankError`.
        """
        address = _bytes_at("x", x)
        if not -x.ndim <= dim < x.ndim:
            raise InvalidInput(f"dim is {dim} and x has {x.ndim} dimensions: one of them is needed")
        dim %= x.ndim
        shape = list(x.shape)
        shape[dim] *= self.size
        out = torch.empty(shape, dtype=x.dtype)
        n_rows = int(np.prod(x.shape[:dim], dtype=np.int64))
        n_bytes = x.numel() * x.itemsize
        row_bytes = n_bytes // n_rows if n_rows else 0
        self._run(kernels.all_gather, self.address, address, n_rows, row_bytes, out.data_ptr())
        return out

    def broadcast(self, x: Tensor) -> Tensor:
        """x = that of rank 0, in place.

        x: contiguous, of any dtype. Returns x. Raises `InvalidInput`, `RankError`.
        """
        address = _bytes_at("x", x)
        self._run(kernels.broadcast, self.address, address, x.numel() * x.itemsize)
        return x

    def arg_max(self, values: Tensor, indices: Tensor) -> None:
        """In each row, the largest value of all ranks and its index, in place; of equal ones the lowest index.

        values: float32, contiguous; a NaN is larger than all numbers. indices: int64, of the same shape. Raises
        `InvalidInput`, `RankError`.
        """
        address = _address("values", values, torch.float32)
        indices_at = _bytes_at("indices", indices)
        if indices.dtype != torch.int64 or indices.shape != values.shape:
            given = f"{indices.dtype} of shape {tuple(indices.shape)}"
            raise InvalidInput(f"indices are {given}: torch.int64 of shape {tuple(values.shape)} is needed")
        self._run(kernels.arg_max, self.address, address, indices_at, values.numel())

    def barrier(self) -> None:
        """Wait until all ranks have called it. Raises `RankError`."""
        self._run(kernels.barrier, self.address)

    def _run(self, kernel: Any, *arguments: Any) -> None:
        with self.used():
            prepare_threads()
            while status := kernel(*arguments):
                self.look(status)

    @contextmanager
    def used(self) -> Iterator[None]:
        """In the block bodies run, of this thread alone; an exception there ends the group."""
        if not self.lock.acquire(blocking=False):
            raise InvalidInput(
                "another thread is in a call of this group: the order of calls would be left to chance"
            )
        try:
            self.check()
            yield
        except BaseException:
            self._leave(layout.INTERRUPTED)
            raise
        finally:
            self.lock.release()

    @contextmanager
    def limited(self, limit: float) -> Iterator[None]:
        """In the block, so many seconds to wait for a rank that lives."""
        place = layout.Member._fields.index("limit")
        before, self._record[place] = int(self._record[place]), int(limit * 1e9)
        try:
            yield
        finally:
            self._record[place] = before

    # ---- failures ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `RankError` if the group has failed or was closed, or in a child of `fork`: before bodies run."""
        if self._failure is not None:
            raise RankError(self._failure)
        if self._segment is None:
            raise RankError("the group is closed")
        if os.getpid() != self._process:
            raise RankError(f"the group is that of process {self._process}, from which this one was forked")

    @property
    def is_over(self) -> bool:
        """Whether the group cannot be used any more."""
        return self._segment is None or self._failure is not None

    def watch(self) -> None:
        """End the waiting in bodies of this process, and of the others, if a process has ended."""
        segment = self._segment
        if segment is not None and any(process.has_ended() for process in self._watched):
            segment.fail(layout.ENDED, self.rank)

    def look(self, status: int) -> None:
        """See after a status of a body that is not 0: returns if it is to be called again with the same arguments.

        Raises `RankError`, which all ranks will do then. Who does not call a body again that has to be, because of an
        interrupt, has to call `close`.
        """
        self.check()
        assert self._segment is not None
        ended = [rank for rank, process in enumerate(self._watched) if process.has_ended()]
        # a rank may end right behind its last operation, which this one has not left yet: so it is called once more
        had_ended, self._had_ended = self._had_ended, bool(ended)
        if status == layout.NOT_YET and not (ended and had_ended):
            return
        processes = [facts.process for facts in self._facts]
        limit = float(self._record[layout.Member._fields.index("limit")]) / 1e9
        message = failure_in_words(self._segment, self.rank, processes, status, ended, limit)
        self._leave(layout.ENDED if ended else layout.GIVEN_UP)
        self._failure = message
        raise RankError(message)

    def _leave(self, reason: int) -> None:
        """Tell the other ranks that this one does not come any more; the first reason stays."""
        if self._segment is not None and os.getpid() == self._process and self._failure is None:
            self._failure = "the group has failed before"
            self._segment.fail(reason, self.rank)

    def close(self) -> None:
        """Give the memory back. Ranks that wait for this one raise `RankError`; bodies return CLOSED."""
        if self._segment is None:
            return
        self._leave(layout.LEFT)  # ends the waiting of other threads
        with self.lock:
            self._record[layout.Member._fields.index("segment")] = 0
            self._segment = self._failure = None
        for process in self._watched:
            process.close()


# ---- how a group comes about ---------------------------------------------------------------------------------


def shared_segment(rank: int, size: int, capacity: int, group: dist.ProcessGroup | None) -> Segment:
    """Memory of a group, with buffers of so many bytes, of which no file is left; raises `RankError` on all ranks or
    none.
    """
    segment, error = None, None
    try:
        if rank == 0:
            try:
                segment = Segment.create(size, capacity)
            except RankError as failure:
                error = str(failure)
        said = exchange((segment.name if segment else None, error), size, group)
        name, error = said[0]
        if rank > 0 and name is not None:
            try:
                segment = Segment.open(name, size, capacity)
            except RankError as failure:
                error = str(failure)
        errors = exchange(error, size, group)
    finally:
        if rank == 0 and segment is not None:
            segment.unlink()
    for other, error in enumerate(errors):
        if error is not None:
            raise RankError(f"rank {other}: {error}")
    assert segment is not None
    return segment


def address_of_sum(x: Tensor) -> int:
    """Address of what can be added up in place; raises `InvalidInput` for anything else."""
    address = _address("x", x)
    if x.requires_grad and torch.is_grad_enabled():
        raise InvalidInput("x requires a gradient: sums over ranks carry none")
    return address


def _address(name: str, x: Tensor, dtype: torch.dtype | None = None) -> int:
    """Address of a contiguous tensor of one of `DTYPES`, or just `dtype`; raises `InvalidInput` for anything else."""
    address = plain_address(x, dtype)
    if address:
        return address
    check_floats(name, x, dtype)
    check_contiguous(name, x)
    return address_of(name, x)


def _bytes_at(name: str, x: Tensor) -> int:
    """Address of a tensor whose bytes lie behind each other in CPU memory; raises `InvalidInput` for anything else."""
    if (
        not isinstance(x, Tensor)
        or not x.is_cpu
        or x.layout is not torch.strided
        or x.is_neg()
        or x.is_conj()
    ):
        raise InvalidInput(f"{name} is {x!r:.80}: a plain tensor in CPU memory is needed")
    check_contiguous(name, x)
    return address_of(name, x)
