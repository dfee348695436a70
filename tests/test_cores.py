"""Cores that a process may use, and threads that fit them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hfopt.machine import cores, linux
from hfopt.machine.cores import Cores, cores_of_process
from tests import fake_machine, fresh

WHOLE = "/docker/12 ab"


@pytest.mark.parametrize(
    ("membership", "mounts", "files", "quota"),
    [
        ("0::/pod/box\n", fake_machine.SECOND, {"pod/cpu.max": "150000 100000"}, 1.5),
        (
            "0::/pod/box\n",
            fake_machine.SECOND,
            {"cpu.max": "max 100000", "pod/box/cpu.max": "5000 10000"},
            0.5,
        ),
        (
            "0::/pod/box\n",
            fake_machine.SECOND,
            {"pod/cpu.max": "150000 100000", "pod/box/cpu.max": "400000 100000"},
            1.5,
        ),
        # in a container that sees its own group as the root, or under the name that the host has for it
        ("0::/\n", fake_machine.SECOND, {"cpu.max": "300000 100000"}, 3.0),
        ("0::/not/here\n", fake_machine.SECOND, {"cpu.max": "300000 100000"}, 3.0),
        ("0::/../other\n", fake_machine.SECOND, {"cpu.max": "300000 100000"}, 3.0),
        ("0::/\n", fake_machine.SECOND, {"cpu.max": "max 100000"}, None),
        ("0::/\n", fake_machine.SECOND, {"cpu.max": "nonsense"}, None),
        ("0::/\n", fake_machine.SECOND, {}, None),
        ("0::/\n", "", {"cpu.max": "300000 100000"}, None),
        (
            "4:cpu,cpuacct:/box\n0::/\n",
            fake_machine.FIRST + fake_machine.BESIDE,
            {"cpu,cpuacct/box/cpu.cfs_quota_us": "50000", "cpu,cpuacct/box/cpu.cfs_period_us": "20000"},
            2.5,
        ),
        (
            "4:cpu,cpuacct:/box\n",
            fake_machine.FIRST,
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/box/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        # the host's name for the group, of which this container has the folder alone, in a place with a blank
        (
            f"4:cpu:{WHOLE}/inner\n",
            f"40 24 0:27 {WHOLE.replace(' ', chr(92) + '040')} /my\\040groups rw - cgroup cgroup rw,cpu\n",
            {"/my groups/inner/cpu.cfs_quota_us": "70000", "/my groups/inner/cpu.cfs_period_us": "100000"},
            0.7,
        ),
        # another controller's tree is none for processors
        ("4:memory:/\n", fake_machine.FIRST, {"memory/cpu.cfs_quota_us": "1000"}, None),
    ],
)
def test_the_quota_is_the_smallest_of_all_groups(
    membership: str, mounts: str, files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    process = {"/proc/self/cgroup": membership, "/proc/self/mountinfo": mounts}
    fake_machine.write(tmp_path, {**process, **files})
    assert cores_of_process(tmp_path).quota == quota


@pytest.mark.parametrize(
    ("online", "allowed", "quota", "usable", "words"),
    [
        (64, 64, None, 64, "all online cores"),
        (64, 64, 80.0, 64, "all online cores"),
        (64, 64, 2.0, 2, "the cgroup quota grants 2 of 64 online cores"),
        (64, 64, 1.49, 1, "the cgroup quota grants 1.49 of"),
        (64, 64, 1.5, 2, "the cgroup quota grants 1.5 of"),
        (64, 64, 0.1, 1, "the cgroup quota grants 0.1 of"),
        (64, 4, None, 4, "the affinity mask allows 4 of 64 online cores"),
        (64, 4, 8.0, 4, "the affinity mask allows 4 of 64 online cores"),
        (64, 4, 3.0, 3, "the cgroup quota grants 3 and the affinity mask allows 4 of 64 online cores"),
    ],
)
def test_usable_are_whole_cores(
    online: int, allowed: int, quota: float | None, usable: int, words: str
) -> None:
    found = Cores(online, allowed, quota)
    assert found.usable == usable and words in found.reason
    assert str(found).startswith(f"{usable} core{'' if usable == 1 else 's'} (")


def test_the_affinity_mask_is_that_of_the_process() -> None:
    code = (
        "import json, os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "from hfopt.machine.cores import cores_of_process; found = cores_of_process();"
        "print(json.dumps([found.allowed, found.usable, found.online]))"
    )
    assert json.loads(fresh.run(code)) == [1, 1, os.cpu_count()]


# ---- threads -----------------------------------------------------------------------------------------------


class Machine:
    """64 cores, of which the quota grants 2, in pairs of hyperthreads; `threads` is what torch is told."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.threads = root, 64
        process = {"/proc/self/cgroup": "0::/\n", "/proc/self/mountinfo": fake_machine.SECOND}
        fake_machine.write(root, {**process, "cpu.max": "200000 100000"})
        for core in range(64):
            siblings = root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
            siblings.parent.mkdir(parents=True)
            siblings.write_text(f"{core % 32},{core % 32 + 32}\n")
        patch.setattr(os, "cpu_count", lambda: 64)
        patch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
        patch.setattr(torch, "get_num_threads", lambda: self.threads)
        patch.setattr(torch, "set_num_threads", lambda number: setattr(self, "threads", number))
        for name in cores._VARIABLES:
            patch.delenv(name, raising=False)

    def fit(self, threads: int) -> int:
        self.threads = threads
        cores.fit_threads.__wrapped__(self.root)
        return self.threads


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with pytest.MonkeyPatch.context() as patch:
        yield Machine(tmp_path, patch)


def test_as_many_threads_as_torch_begins_with_are_lowered(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    assert machine.fit(64) == 2 and machine.fit(32) == 2
    (line, other) = caplog.messages
    assert "run on 2 instead of 64 threads: the cgroup quota grants 2 of 64 online cores" in line
    assert "torch.set_num_threads()" in line and "OMP_NUM_THREADS" in line and "of 32 threads" in other


def test_threads_that_fit_stay_without_a_word(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    assert machine.fit(2) == 2 and machine.fit(1) == 1
    (machine.root / "sys/fs/cgroup/cpu.max").write_text("max 100000")
    assert machine.fit(64) == 64
    assert caplog.messages == []


def test_a_number_of_the_user_stays(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert machine.fit(8) == 8
    assert "8 threads, as torch.set_num_threads() says" in caplog.messages[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert machine.fit(64) == 64
    assert "as OMP_NUM_THREADS=64 says" in caplog.messages[1] and "with 2" in caplog.messages[1]
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert machine.fit(64) == 2


def test_a_mask_that_changes_later_lowers_what_torch_began_with(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine.root / "sys/fs/cgroup/cpu.max").write_text("max 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 32})
    assert machine.fit(64) == 5 and machine.fit(32) == 5  # 32 cores, with two threads each
    assert machine.fit(5) == 5 and machine.fit(6) == 6


# ---- in a process of its own -------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group whose quota is 0.6 cores."""
    parent, is_second = next(linux.control_groups("cpu"), (None, False))
    if parent is None or (os.cpu_count() or 1) < 2:
        pytest.skip("no control groups, or one core")
    folder = parent / f"hfopt-test-{os.getpid()}"
    limits = [("cpu.max", "60000 100000")] if is_second else [("cpu.cfs_quota_us", "60000")]
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this process may not make a control group")
    try:
        for name, value in limits:
            try:
                (folder / name).write_text(value)
            except OSError:
                pytest.skip("this process may not limit a control group")
        yield folder
    finally:
        folder.rmdir()


_IN_GROUP = """
import os, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as members:
    members.write(str(os.getpid()))
import torch
torch.set_num_threads(int(sys.argv[2]))
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2)).eval()
hfopt = sys.modules["hfopt"]
hfopt.optimize(model, kernels="hfopt")
numbers = [torch.get_num_threads()]
from hfopt.kernels.jit import openmp
numbers.append(openmp.max_threads())
torch.set_num_threads(2)
hfopt.optimize(model)
print(numbers, torch.get_num_threads(), "grants 0.6 of" in str(model.hfopt))
"""


def test_optimize_fits_threads_to_a_real_quota_once(group: Path) -> None:
    begun_with = str(os.cpu_count())
    process = fresh.Process(_IN_GROUP, str(group), begun_with, OMP_NUM_THREADS=None, MKL_NUM_THREADS=None)
    finished = process.wait()
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "[1, 1] 2 True"
    lines = [line for line in finished.stderr.splitlines() if "threads" in line]
    assert len(lines) == 1 and "run on 1 instead of" in lines[0] and "quota grants 0.6 of" in lines[0]
