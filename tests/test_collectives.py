"""Collectives of processes over shared memory."""

import os
from pathlib import Path

import pytest

from tests.ranks import Ranks, results

WORK = "tests.collective_work"
SHARED = Path("/dev/shm")


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before = {path.name for path in SHARED.glob("hfopt-*")}
    yield
    assert {path.name for path in SHARED.glob("hfopt-*")} <= before


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sums(size: int) -> None:
    assert results(f"{WORK}:sums", size) == [True] * size


@pytest.mark.parametrize("size", [2, 4])
def test_the_other_operations(size: int) -> None:
    assert results(f"{WORK}:others", size) == [True] * size


def test_many_rounds_at_random_times() -> None:
    first = results(f"{WORK}:rounds", 2, 1000)
    assert len(set(first)) == 1


def test_four_ranks_say_the_same_in_every_run() -> None:
    runs = [results(f"{WORK}:rounds", 4, 200) for _ in range(2)]
    assert len(set(runs[0] + runs[1])) == 1


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([("all_reduce", 8192), ("all_reduce", 4096)], ["all_reduce of 8192 float32", "all_reduce of 4096 float32"]),
        ([("all_reduce", 9), ("broadcast", 9)], ["all_reduce of 9 float32", "broadcast of 36 bytes"]),
        ([("all_reduce", 9), ("all_reduce", 9), ("barrier", 0)], ["all_reduce of 9 float32", "barrier"]),
        ([("all_reduce", 900_000), ("all_reduce", 900_001)], ["900000 float32", "900001 float32"]),
    ],
)  # fmt: skip
def test_different_calls_are_named_on_all_ranks(calls: list[tuple[str, int]], words: list[str]) -> None:
    for said in results(f"{WORK}:different", len(calls), calls):
        first, again = said
        assert first == again and first.count("rank") == 2
        assert all(word in first for word in words), first


@pytest.mark.parametrize(("size", "n"), [(2, 8), (3, 3_000_000)])
def test_a_killed_rank_is_named(size: int, n: int) -> None:
    ranks = Ranks(f"{WORK}:killed", size, 1, n)
    found = ranks.wait(killed=[1])
    for rank, each in enumerate(found):
        if rank != 1:
            said, seconds = each
            assert f"rank 1 (pid {ranks.processes[1].pid})" in said and "has ended" in said, said
            assert seconds < 10


def test_a_late_rank_is_named() -> None:
    first, second, third = results(f"{WORK}:late", 3, 0.5)
    assert any("rank 2 (pid" in said and "did not come within 0.5 s" in said for said in (first, second))
    assert all(said for said in (first, second, third))


def test_a_rank_that_has_left_is_named() -> None:
    first, second = results(f"{WORK}:left", 2)
    assert "rank 1 (pid" in first and "has closed the group" in first
    assert second == "the group is closed"


def test_interrupts_end_the_waiting() -> None:
    first, second = results(f"{WORK}:interrupted", 2)
    assert first[0].startswith("KeyboardInterrupt") and first[1] < 2
    assert "rank 0 (pid" in second[0] and "was interrupted" in second[0]


def test_no_file_is_there_while_a_group_is_used() -> None:
    name = f"hfopt-{os.geteuid()}-1-999999999-{'0' * 32}"  # of another namespace: not touched
    (SHARED / name).touch(0o600)
    try:
        assert results(f"{WORK}:leftovers", 2) == [[name], [name]]
    finally:
        (SHARED / name).unlink()


def test_groups_of_some_ranks() -> None:
    assert results(f"{WORK}:several", 4) == [True] * 4
