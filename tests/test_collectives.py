"""Collectives of processes over shared memory."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Ranks, results

SHARED = Path("/dev/shm")
DIFFERENT = {
    2: [
        ([("all_reduce", 8192), ("all_reduce", 4096)], ["all_reduce of 8192 float32", "all_reduce of 4096 float32"]),
        ([("all_reduce", 9), ("broadcast", 9)], ["all_reduce of 9 float32", "broadcast of 36 bytes"]),
        ([("all_reduce", 900_000), ("all_reduce", 900_001)], ["900000 float32", "900001 float32"]),
    ],
    3: [([("all_reduce", 9), ("all_reduce", 9), ("barrier", 0)], ["all_reduce of 9 float32", "barrier"])],
}  # fmt: skip


def call(name: str, *arguments: Any) -> tuple[str, tuple[Any, ...]]:
    return f"tests.collective_work:{name}", arguments


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = {path.name for path in SHARED.glob("hfopt-*")}
    yield
    assert {path.name for path in SHARED.glob("hfopt-*")} <= before


# ---- results ----------------------------------------------------------------------------------------------------------


def test_one_rank() -> None:
    assert results(1, call("sums"), call("others")) == [[True], [True]]


def test_two_ranks() -> None:
    *right, rounds, again = results(
        2, call("sums"), call("others"), call("rounds", 1000), call("rounds", 1000)
    )
    assert right == [[True] * 2] * 2
    assert len({*rounds, *again}) == 1


def test_four_ranks() -> None:
    calls = (
        call("sums"),
        call("others"),
        call("several"),
        call("machines"),
        call("rounds", 200),
        call("rounds", 200),
    )
    *right, rounds, again = results(4, *calls)
    assert right == [[True] * 4] * 4
    assert len({*rounds, *again}) == 1


# ---- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", DIFFERENT)
def test_different_calls_are_named_on_all_ranks(size: int) -> None:
    found = results(size, *(call("different", calls) for calls, _ in DIFFERENT[size]))
    for (_, words), ranks in zip(DIFFERENT[size], found, strict=True):
        for first, again in ranks:
            assert first == again and first.count("rank") == 2
            assert all(word in first for word in words), first


@pytest.mark.parametrize(("size", "n"), [(2, 8), (3, 3_000_000)])
def test_a_killed_rank_is_named(size: int, n: int) -> None:
    ranks = Ranks(size, call("killed", 1, n))
    for rank, found in enumerate(ranks.wait(killed=[1])):
        if rank != 1:
            ((said, seconds),) = found
            assert f"rank 1 (pid {ranks.processes[1].id})" in said and "has ended" in said, said
            assert seconds < 10


def test_ranks_that_do_not_come_are_named() -> None:
    late, left, interrupted = results(2, call("late", 0.5), call("left"), call("interrupted"))
    assert "rank 1 (pid" in late[0] and "did not come within 0.5 s" in late[0]
    assert "rank 0 (pid" in late[1] and "has given up" in late[1]
    assert "rank 1 (pid" in left[0] and "has closed the group" in left[0]
    assert left[1] == "the group is closed"
    (first, seconds), (second, _) = interrupted
    assert first.startswith("KeyboardInterrupt") and seconds < 10
    assert "rank 0 (pid" in second and "was interrupted" in second


def test_wrong_tensors_are_refused() -> None:
    assert results(1, call("refused")) == [[True]]


# ---- files ------------------------------------------------------------------------------------------------------------


def test_no_file_is_there_while_a_group_is_used_and_leftovers_are_deleted() -> None:
    other = f"hfopt-{os.geteuid()}-1-999999999-{'0' * 32}"  # of another namespace: not touched
    dead = f"hfopt-{os.geteuid()}-{os.stat('/proc/self/ns/pid').st_ino}-999999999-{'0' * 32}"
    for name in (other, dead):
        (SHARED / name).touch(0o600)
    try:
        assert results(2, call("leftovers")) == [[[other]] * 2]
    finally:
        (SHARED / other).unlink()
        (SHARED / dead).unlink(missing_ok=True)


def test_segments_of_others_are_refused() -> None:
    assert results(1, call("foreign")) == [[True]]
