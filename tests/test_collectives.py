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


@pytest.fixture(scope="module")
def pair() -> dict[str, list[Any]]:
    """What two ranks have found; processes take seconds to start."""
    calls = {
        "sums": call("sums"),
        "others": call("others"),
        "threads": call("threads"),
        "stopped": call("stopped"),
        "rounds": call("rounds", 1000),
        "again": call("rounds", 1000),
        "late": call("late", 0.5),
        "left": call("left"),
        "interrupted": call("interrupted"),
        **{f"different {place}": call("different", calls) for place, (calls, _) in enumerate(DIFFERENT[2])},
    }
    return dict(zip(calls, results(2, *calls.values()), strict=True))


# ---- results ----------------------------------------------------------------------------------------------------------


def test_one_rank() -> None:
    assert results(1, *map(call, ("sums", "others", "refused", "foreign"))) == [[True]] * 4


@pytest.mark.parametrize("name", ["sums", "others", "threads"])
def test_two_ranks(pair: dict[str, list[Any]], name: str) -> None:
    assert pair[name] == [True, True]


def test_two_ranks_say_the_same_at_any_time(pair: dict[str, list[Any]]) -> None:
    assert len({*pair["rounds"], *pair["again"]}) == 1


def test_sums_go_on_where_they_were(pair: dict[str, list[Any]]) -> None:
    assert pair["stopped"][0] >= 1


def test_four_ranks() -> None:
    calls = (
        call("sums"),
        call("others"),
        call("several"),
        call("machines"),
        call("rounds", 100),
        call("rounds", 100),
    )
    *right, rounds, again = results(4, *calls)
    assert right == [[True] * 4] * 4
    assert len({*rounds, *again}) == 1


# ---- failures ---------------------------------------------------------------------------------------------------------


def _assert_named(said: list[str], words: list[str]) -> None:
    first, again = said
    assert first == again and first.count("rank") == 2
    assert all(word in first for word in words), first


@pytest.mark.parametrize("place", range(len(DIFFERENT[2])))
def test_different_calls_are_named_on_both_ranks(pair: dict[str, list[Any]], place: int) -> None:
    for said in pair[f"different {place}"]:
        _assert_named(said, DIFFERENT[2][place][1])


def test_different_calls_are_named_on_all_ranks() -> None:
    ((calls, words),) = DIFFERENT[3]
    (found,) = results(3, call("different", calls))
    for said in found:
        _assert_named(said, words)


@pytest.mark.parametrize(("size", "n"), [(2, 8), (3, 3_000_000)])
def test_a_killed_rank_is_named(size: int, n: int) -> None:
    ranks = Ranks(size, call("killed", 1, n))
    for rank, found in enumerate(ranks.wait(killed=[1])):
        if rank != 1:
            ((said, seconds),) = found
            assert f"rank 1 (pid {ranks.processes[1].id})" in said and "has ended" in said, said
            assert seconds < 10


def test_a_late_rank_is_named(pair: dict[str, list[Any]]) -> None:
    first, second = pair["late"]
    assert "rank 1 (pid" in first and "did not come within 0.5 s" in first
    assert "rank 0 (pid" in second and "has given up" in second


def test_a_rank_that_has_left_is_named(pair: dict[str, list[Any]]) -> None:
    first, second = pair["left"]
    assert "rank 1 (pid" in first and "has closed the group" in first
    assert second == "the group is closed"


def test_an_interrupt_ends_the_waiting(pair: dict[str, list[Any]]) -> None:
    (first, seconds), (second, _) = pair["interrupted"]
    assert first.startswith("KeyboardInterrupt") and seconds < 10
    assert "rank 0 (pid" in second and "was interrupted" in second


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
