"""What the ranks of `test_collectives` do: functions that return what the tests look at."""

import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hfopt.distributed import ClusterGroup, SharedGroup, facts
from hfopt.distributed.segment import FOLDER, Segment
from hfopt.errors import InvalidInput, RankError
from hfopt.functional.checks import ELEMENTS
from hfopt.kernels.shared import launches as kernels
from hfopt.machine.process import place_of_process

SIZES = (0, 1, 15, 16, 17, 33, 4096, 16385, 32769, 100_003, 131_072, 400_001)


def part_of(rank: int, seed: int, n: int, dtype: torch.dtype) -> Tensor:
    """What a rank has before a sum."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return (torch.randn(n, generator=generator) * 3).to(dtype)


def oracle(size: int, seed: int, n: int, dtype: torch.dtype) -> Tensor:
    """The sum over ranks: float32 in the order of ranks, rounded once. By numpy."""
    total = part_of(0, seed, n, dtype).float().numpy()
    for rank in range(1, size):
        total = total + part_of(rank, seed, n, dtype).float().numpy()
    return torch.from_numpy(total).to(dtype)


def sums() -> bool:
    group = SharedGroup()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for seed, n in enumerate(SIZES):
            x = part_of(group.rank, seed, n, dtype)
            assert group.all_reduce(x) is x
            assert torch.equal(x, oracle(group.size, seed, n, dtype)), (dtype, n)
    x = torch.ones(40_000)
    with group.lock:
        group.check()
        assert kernels.all_reduce_again(ELEMENTS[x.dtype], group.address, x.data_ptr(), len(x), 3) == 0
    assert torch.equal(x, torch.full_like(x, group.size**3))
    group.close()
    return True


def threads() -> bool:
    """Parts that are shared out among threads."""
    torch.set_num_threads(2)
    try:
        group = SharedGroup()
        x = part_of(group.rank, 1, 400_001, torch.bfloat16)
        group.all_reduce(x)
        assert torch.equal(x, oracle(group.size, 1, 400_001, torch.bfloat16))
        group.close()
    finally:
        torch.set_num_threads(1)
    return True


def stopped() -> int:
    """Rank 1 stands still at times, in the middle of sums that take several exchanges; how often rank 0 looked after it."""
    group = SharedGroup()
    expected = float(sum(range(1, group.size + 1)))

    def stop() -> None:
        for _ in range(3):
            time.sleep(0.05)
            os.kill(group._facts[1].process, signal.SIGSTOP)
            time.sleep(0.3)
            os.kill(group._facts[1].process, signal.SIGCONT)

    thread = threading.Thread(target=stop)
    with mock.patch.object(group, "look", wraps=group.look) as look:
        goes_on = torch.ones(1)
        if group.rank == 0:
            thread.start()
        while group.broadcast(goes_on).item():
            x = torch.full((1_000_003,), group.rank + 1.0)
            assert (group.all_reduce(x) == expected).all()
            goes_on.fill_(thread.is_alive())
    group.close()
    return look.call_count


def rounds(count: int) -> str:
    """Digest of sums of random sizes, the ranks coming at random times."""
    group = SharedGroup()
    sizes, delays = random.Random(1), random.Random(group.rank)
    digest = hashlib.sha256()
    for seed in range(count):
        n = sizes.choice((1, 100, 2048, 5000, 40_000))
        if delays.random() < 0.05:
            time.sleep(delays.random() * 0.002)
        x = part_of(group.rank, seed, n, torch.bfloat16)
        group.all_reduce(x)
        if seed % 50 == 0:
            assert torch.equal(x, oracle(group.size, seed, n, torch.bfloat16))
        digest.update(x.view(torch.int16).numpy().tobytes())
    group.close()
    return digest.hexdigest()


def others() -> bool:
    """Everything but sums."""
    group = SharedGroup()
    rank, size = group.rank, group.size
    for shape in ((), (1,), (3, 5), (2, 3, 70_001)):
        for dtype in (torch.bfloat16, torch.int64, torch.bool):
            parts = [_random(r, shape, dtype) for r in range(size)]
            x = parts[rank].clone()
            group.broadcast(x)
            assert torch.equal(x, parts[0])
            for dim in range(-len(shape), len(shape)):
                assert torch.equal(group.all_gather(parts[rank], dim), torch.cat(parts, dim))
    group.barrier()
    for n in (0, 1, 5, 50_000):
        generator = torch.Generator().manual_seed(n)
        values = torch.randint(0, 4, (size, n), generator=generator).float()
        values[torch.rand(size, n, generator=generator) < 0.05] = torch.nan
        indices = torch.randint(0, 1 << 40, (size, n), generator=generator)
        expected = _best(values.numpy(), indices.numpy())
        own = values[rank].clone(), indices[rank].clone()
        group.arg_max(*own)
        assert np.array_equal(own[0].numpy(), expected[0], equal_nan=True)
        assert np.array_equal(own[1].numpy(), expected[1])
    group.close()
    return True


def _random(rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 2 if dtype is torch.bool else 200, tuple(shape), generator=generator).to(dtype)


def _best(values: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each column the largest value, NaN before all, and the lowest of its indices."""
    keys = np.where(np.isnan(values), np.inf, values)
    is_best = keys == keys.max(0)
    place = np.where(is_best, indices, np.iinfo(np.int64).max).argmin(0)
    columns = np.arange(values.shape[1])
    return values[place, columns], indices[place, columns]


def different(calls: Sequence[tuple[str, int]]) -> list[str]:
    """What a rank is told when it calls something else than others, twice."""
    group = SharedGroup()
    group.barrier()
    method, n = calls[group.rank]
    said = []
    for _ in range(2):
        try:
            if method == "barrier":
                group.barrier()
            else:
                getattr(group, method)(torch.zeros(n))
        except RankError as error:
            said.append(str(error))
    return said


def killed(rank: int, n: int) -> tuple[str, float]:
    """A rank kills itself in the middle."""
    group = SharedGroup()
    x = torch.zeros(n)
    for _ in range(3):
        group.all_reduce(x)
    begin = time.monotonic()
    if group.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        group.all_reduce(x)
    except RankError as error:
        return str(error), time.monotonic() - begin
    return "", 0.0


def late(limit: float) -> str:
    """The last rank does not come in time."""
    group = SharedGroup(limit=limit)
    group.barrier()
    if group.rank == group.size - 1:
        time.sleep(3 * limit)
    try:
        group.all_reduce(torch.zeros(8))
    except RankError as error:
        return str(error)
    return ""


def left() -> str:
    """The last rank closes the group, right behind an operation."""
    group = SharedGroup()
    group.all_reduce(torch.zeros(8))
    if group.rank == group.size - 1:
        group.close()
    try:
        group.all_reduce(torch.zeros(8))
    except RankError as error:
        return str(error)
    return ""


def interrupted() -> tuple[str, float]:
    """Rank 0 waits, and gets Ctrl-C."""
    group = SharedGroup()
    group.barrier()
    if group.rank == 1:
        time.sleep(0.5)
        os.kill(int(group._facts[0].process), signal.SIGINT)
        time.sleep(1.0)
    begin = time.monotonic()
    try:
        group.barrier()
    except (KeyboardInterrupt, RankError) as error:
        return f"{type(error).__name__} {error}", time.monotonic() - begin
    return "", 0.0


def leftovers() -> list[str]:
    """Names in /dev/shm while a group is in use."""
    group = SharedGroup()
    group.barrier()
    names = [name for name in os.listdir("/dev/shm") if name.startswith("hfopt-")]
    group.barrier()
    return names


def refused() -> bool:
    """What no collective takes."""
    group = SharedGroup()
    for x in (torch.zeros(4, 4).T, torch.zeros(4, dtype=torch.int64), torch.zeros(4, device="meta"), [1.0]):
        with pytest.raises(InvalidInput, match=r"^x "):
            group.all_reduce(x)  # type: ignore[arg-type]
    for x in (torch.zeros(4, 4).T, torch.zeros(4, device="meta"), torch.zeros(4).to_sparse()):
        for method in (group.broadcast, group.all_gather):
            with pytest.raises(InvalidInput, match=r"^x "):
                method(x)
    with pytest.raises(InvalidInput, match="requires a gradient"):
        group.all_reduce(torch.zeros(4, requires_grad=True))
    with pytest.raises(InvalidInput, match="dim is 1"):
        group.all_gather(torch.zeros(4), 1)
    with pytest.raises(InvalidInput, match="indices are"):
        group.arg_max(torch.zeros(4), torch.zeros(4, dtype=torch.int32))
    with pytest.raises(InvalidInput, match="limit is 0"):
        SharedGroup(limit=0)
    with group.lock:
        thread = threading.Thread(target=lambda: found.append(_error_of(group.barrier)))
        found: list[str] = []
        thread.start()
        thread.join()
    assert "another thread" in found[0]
    x = torch.ones(3)
    group.all_reduce(x)
    assert torch.equal(x, torch.ones(3))
    with mock.patch("os.getpid", return_value=1):
        assert "was forked" in _error_of(group.barrier)
    group.barrier()
    group.close()
    group.close()
    assert "closed" in _error_of(group.barrier)
    return True


def _error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except (InvalidInput, RankError) as error:
        return str(error)
    return ""


def foreign() -> bool:
    """Files in the place of a segment that are none, and one for which there is no room."""
    assert "has no" in _error_of(partial(Segment.create, 2, 1 << 45))
    segment = Segment.create(2, 4096)
    path = FOLDER / segment.name
    try:
        assert path.stat().st_mode & 0o777 == 0o600
        Segment.open(segment.name, 2, 4096)
        for size, capacity in ((3, 4096), (2, 8192)):
            assert "is not what rank 0 has made" in _error_of(
                partial(Segment.open, segment.name, size, capacity)
            )
        path.chmod(0o644)
        assert "is not what rank 0 has made" in _error_of(partial(Segment.open, segment.name, 2, 4096))
        path.chmod(0o600)
        segment._head()[4] += 1
        assert "of another group" in _error_of(partial(Segment.open, segment.name, 2, 4096))
    finally:
        segment.unlink()
    assert "cannot be opened" in _error_of(partial(Segment.open, segment.name, 2, 4096))
    path.symlink_to("/etc/passwd")
    try:
        assert "cannot be opened" in _error_of(partial(Segment.open, segment.name, 2, 4096))
    finally:
        path.unlink()
    return True


def machines() -> bool:
    """As if ranks 0 and 2 ran on one machine, and 1 and 3 on another one."""
    place = (*place_of_process(FOLDER), str(dist.get_rank() % 2))
    with mock.patch.object(facts, "place_of_process", lambda folder: place):
        with pytest.raises(RankError, match="ranks 0 and 1 run on different machines"):
            SharedGroup()
        group = ClusterGroup()
    rank, size = group.rank, group.size
    assert group.n_machines == 2 and group.shared.size == 2
    for dtype in (torch.float32, torch.bfloat16):
        parts = [part_of(r, 1, 5000, dtype) for r in range(size)]
        x = parts[rank].clone()
        assert group.all_reduce(x) is x
        a, b, c, d = (part.float() for part in parts)
        assert torch.equal(x, ((a + c) + (b + d)).to(dtype))
        assert torch.equal(group.broadcast(parts[rank].clone()), parts[0])
        assert torch.equal(
            group.all_gather(parts[rank].view(50, 100), 1), torch.cat([p.view(50, 100) for p in parts], 1)
        )
    values = torch.tensor([1.0, float(rank == 2), torch.nan if rank == 1 else 9.0, -torch.inf])
    indices = torch.tensor([5 - rank, rank, rank, 10 - rank])
    group.arg_max(values, indices)
    assert indices.tolist() == [2, 2, 1, 7] and values[2].isnan() and values[:2].tolist() == [1.0, 1.0]
    group.barrier()
    group.close()
    return True


def several() -> bool:
    """Groups of some of the ranks beside the one of all."""
    everyone = SharedGroup()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = SharedGroup(pairs[everyone.rank // 2])
    assert (pair.rank, pair.size) == (everyone.rank % 2, 2)
    x = torch.tensor([float(everyone.rank)])
    pair.all_reduce(x)
    assert x.item() == (1.0 if everyone.rank < 2 else 5.0)
    everyone.all_reduce(x)
    assert x.item() == 12.0
    return True
