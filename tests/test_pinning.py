"""Shares of a machine's cores for processes that work together, and processes that keep to them."""

import os
from pathlib import Path

import pytest

from hfopt.distributed.facts import Facts
from hfopt.distributed.placement import threads_of
from hfopt.machine import cores, pinning
from hfopt.machine.topology import Core, in_words, physical_cores, share_of
from tests import fake_machine, fresh

CPU, NODE = "/sys/devices/system/cpu", "/sys/devices/system/node"


def machine(root: Path, nodes: dict[int, str], siblings: dict[int, str]) -> None:
    files = {f"{NODE}/node{node}/cpulist": f"{cpus}\n" for node, cpus in nodes.items()}
    for cpu, pair in siblings.items():
        files[f"{CPU}/cpu{cpu}/topology/thread_siblings_list"] = f"{pair}\n"
    fake_machine.write(root, files)


def two_sockets(root: Path) -> None:
    """Eight cores, a node for each four; the second hyperthread of core i is processor i + 8; a node without processors."""
    pairs = {cpu: f"{cpu % 8},{cpu % 8 + 8}" for cpu in range(16)}
    machine(root, {0: "0-3,8-11", 1: "4-7,12-15", 2: ""}, pairs)


def shares(root: Path, allowed: set[int], n: int) -> list[tuple[str, str]]:
    """(processors, nodes) of each process."""
    found = physical_cores(allowed, root)
    own = [share_of(found, index, n) for index in range(n)]
    return [
        (in_words(cpu for core in each for cpu in core.cpus), in_words({core.node for core in each}))
        for each in own
    ]


@pytest.mark.parametrize(
    ("allowed", "n", "expected"),
    [
        (range(16), 1, [("0-15", "0-1")]),
        # whole nodes, and equal parts of a node
        (range(16), 2, [("0-3,8-11", "0"), ("4-7,12-15", "1")]),
        (range(16), 4, [("0-1,8-9", "0"), ("2-3,10-11", "0"), ("4-5,12-13", "1"), ("6-7,14-15", "1")]),
        # equal shares, with cores left over
        (range(16), 3, [("0-1,8-9", "0"), ("2-3,10-11", "0"), ("4-5,12-13", "1")]),
        # a mask that cuts through: never beyond it, physical cores first
        ({0, 1, 2, 4}, 2, [("0-1", "0"), ("2,4", "0-1")]),
        ({0, 8, 4, 12}, 2, [("0,8", "0"), ("4,12", "1")]),
        # hyperthreads where there are more processes than cores
        ({0, 8}, 2, [("0", "0"), ("8", "0")]),
        ({0, 8}, 3, [("", "")] * 3),
    ],
)
def test_shares_follow_cores_and_nodes(
    allowed: set[int], n: int, expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    two_sockets(tmp_path)
    assert shares(tmp_path, set(allowed), n) == expected


def test_shares_are_disjoint_and_equal(tmp_path: Path) -> None:
    two_sockets(tmp_path)
    for n in range(1, 17):
        own = [share_of(physical_cores(range(16), tmp_path), index, n) for index in range(n)]
        cpus = [cpu for each in own for core in each for cpu in core.cpus]
        assert len(cpus) == len(set(cpus)) and len({len(each) for each in own}) == 1 and own[0], n


def test_several_nodes_in_a_share(tmp_path: Path) -> None:
    machine(tmp_path, {node: f"{2 * node}-{2 * node + 1}" for node in range(4)}, {})
    assert shares(tmp_path, set(range(8)), 2) == [("0-3", "0-1"), ("4-7", "2-3")]


def test_nothing_is_known_of_the_machine(tmp_path: Path) -> None:
    assert physical_cores({3, 1}, tmp_path) == [Core(0, (1,)), Core(0, (3,))]


@pytest.mark.parametrize(
    ("n_cores", "n_ranks", "quota", "threads"),
    [(8, 2, None, 8), (8, 2, 8.0, 4), (8, 2, 3.0, 2), (8, 4, 1.0, 1), (0, 3, None, 1), (2, 2, 64.0, 2)],
)
def test_threads_fit_cores_and_the_common_quota(
    n_cores: int, n_ranks: int, quota: float | None, threads: int
) -> None:
    facts = Facts(1, 0, ("here",), frozenset(range(16)), quota, 1)
    assert threads_of([Core(0, (core,)) for core in range(n_cores)], [facts] * n_ranks) == threads


@pytest.mark.parametrize(
    ("name", "value"), [("HFOPT_PIN", "0"), ("OMP_PLACES", "cores"), ("GOMP_CPU_AFFINITY", "0-3")]
)
def test_users_say_where_threads_run(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pinning.obstacle() is None
    monkeypatch.setenv(name, value)
    assert pinning.obstacle() == f"{name}={value}"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity masks")
def test_threads_that_run_and_those_that_begin_follow() -> None:
    code = """
import os, threading
from hfopt.machine import pinning
cpu = min(os.sched_getaffinity(0))
def masks():
    return [os.sched_getaffinity(int(each)) for each in os.listdir("/proc/self/task")]
hold = threading.Event()
before = threading.Thread(target=hold.wait)
before.start()
assert pinning.pin([cpu], [0])
after = threading.Thread(target=hold.wait)
after.start()
found = masks()
hold.set()
assert len(found) >= 3 and all(mask == {cpu} for mask in found), found
assert not pinning.pin([100_000], [0]) and masks()[0] == {cpu}
bytearray(1 << 24)  # memory is there under any policy
"""
    fresh.run(code)


@pytest.mark.parametrize(
    ("begun_with", "run_id", "number", "is_ours"),
    [
        ("PATH=/bin\0HOME=/\0", "1", "1", True),
        ("PATH=/bin\0OMP_NUM_THREADS=1\0", "1", "1", False),  # the user's, given to torchrun
        ("PATH=/bin\0", "1", "3", False),
        ("PATH=/bin\0", None, "1", False),
        (None, "1", "1", False),  # nobody knows
    ],
)
def test_threads_of_torchrun_are_not_the_users(
    begun_with: str | None,
    run_id: str | None,
    number: str,
    is_ours: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(cores.torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(cores.torch, "get_num_threads", lambda: int(number))
    monkeypatch.setenv("OMP_NUM_THREADS", number)
    if run_id is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    if begun_with is not None:
        fake_machine.write(tmp_path, {f"/proc/{os.getppid()}/environ": begun_with})
    cores.share_threads(5, tmp_path)
    assert set_to == ([5] if is_ours else [])
