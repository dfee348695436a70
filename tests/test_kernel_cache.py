"""The folder of compiled kernels."""

import json
from pathlib import Path
from typing import Any

import pytest

from hfopt.kernels.jit import disk_cache, turn
from tests import fresh

# Runs one kernel, and says what became of the cache.
_PROGRAM = """
import json, logging, torch
messages = []
class Keep(logging.Handler):
    def emit(self, record): messages.append(record.getMessage())
logging.getLogger("hfopt").addHandler(Keep())
from hfopt import functional
from hfopt.kernels.jit import launch as jit
compiled = []
jit.compile_listeners.append(compiled.append)
x, weight = torch.randn(2, 64), torch.rand(64)
exact = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
right = torch.allclose(functional.rms_norm(x, weight, 1e-5), exact, atol=1e-5)
folder, reason = jit.cache_folder()
print(json.dumps([right, compiled, messages, folder and str(folder), reason]))
"""


def _run(cache: str) -> dict[str, Any]:
    keys = ("right", "compiled", "messages", "folder", "reason")
    printed = fresh.run(_PROGRAM, HFOPT_CACHE_DIR=cache)
    return dict(zip(keys, json.loads(printed.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder into which one process has compiled a kernel."""
    base = tmp_path_factory.mktemp("kernels") / "base"
    first = _run(str(base))
    assert first["right"] and first["compiled"] == ["norm"]
    return base


def test_the_next_process_compiles_nothing(filled: Path) -> None:
    again = _run(str(filled))
    assert again["right"] and again["compiled"] == [] and again["messages"] == []


def test_the_folder_is_private(filled: Path) -> None:
    (folder,) = filled.iterdir()
    assert filled.stat().st_mode & 0o777 == 0o700 and folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.thinned(3)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty index"])
def test_a_damaged_entry_is_compiled_again(filled: Path, damage: str) -> None:
    suffix = "*/*.nbi" if damage == "empty index" else "*/*.nbc"
    for entry in filled.glob(suffix):
        content = bytearray(entry.read_bytes())
        if damage == "truncated":
            content = content[: len(content) // 2]
        elif damage == "flipped":
            content[len(content) // 2] ^= 1
        else:
            content = bytearray()
        entry.write_bytes(content)
    run = _run(str(filled))
    assert run["right"] and run["compiled"] == ["norm"]
    assert any("damaged" in message for message in run["messages"])
    assert _run(str(filled))["compiled"] == []  # mended


def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    base = tmp_path / "open"
    base.mkdir()
    base.chmod(0o777)
    run = _run(str(base))
    assert run["right"] and run["folder"] is None
    assert "can be written by others" in run["reason"] and any(str(base) in text for text in run["messages"])


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = _run(str(tmp_path / "file" / "base"))
    assert run["right"] and run["folder"] is None and "cannot be made" in run["reason"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    run = _run(str(tmp_path / "link"))
    assert run["right"] and run["folder"] is None and "links are not followed" in run["reason"]


def test_off() -> None:
    run = _run("off")
    assert run["right"] and run["folder"] is None and run["compiled"] == ["norm"]


def test_the_folder_is_named_by_sources_in_folders_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(disk_cache, "__file__", str(tmp_path / "jit" / "disk_cache.py"))
    keys = [disk_cache._content_key()]
    for place, text in (("linear/tile.py", "1"), ("linear/tile.py", "2"), ("attention/tile.py", "2")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
        keys.append(disk_cache._content_key())
    (tmp_path / "linear/tile.py").rename(tmp_path / "tile.py")
    assert len({*keys, disk_cache._content_key()}) == 5


def test_kernels_of_one_name_have_files_of_their_own(tmp_path: Path) -> None:
    def named(module: str) -> str:
        def tile() -> None: ...

        tile.__module__ = module
        return disk_cache._PrivateCacheImpl(tile, tmp_path).filename_base

    assert named("hfopt.kernels.linear.tile") != named("hfopt.kernels.attention.tile")


# Compiles a kernel for these dtypes, in order, and says which of them were compiled here.
_SEVERAL = """
import json, sys, torch
from hfopt import functional
from hfopt.kernels.jit import launch as jit
compiled = []
jit.compile_listeners.append(compiled.append)
found = []
for name in sys.argv[1:]:
    functional.rms_norm(torch.randn(2, 64, dtype=getattr(torch, name)), None, 1e-5)
    found += [name] * len(compiled)
    compiled.clear()
print(json.dumps(found))
"""


def test_of_several_processes_one_compiles_and_all_keep(tmp_path: Path) -> None:
    dtypes, cache = ("float32", "bfloat16", "float16"), str(tmp_path / "base")
    orders = (dtypes, dtypes[::-1], dtypes)
    processes = [fresh.Process(_SEVERAL, *order, HFOPT_CACHE_DIR=cache) for order in orders]
    ends = [process.wait() for process in processes]
    assert not any(each.returncode for each in ends), [each.stderr for each in ends]
    compiled = [json.loads(each.stdout.splitlines()[-1]) for each in ends]
    assert sorted(name for each in compiled for name in each) == sorted(dtypes)
    assert json.loads(fresh.run(_SEVERAL, *dtypes, HFOPT_CACHE_DIR=cache).splitlines()[-1]) == []


def test_a_turn_that_is_not_given_back_ends_with_its_process_or_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn, "_PATIENCE", 0.1)
    mine, other = (turn.Turn(tmp_path / "lock") for _ in range(2))
    mine.take()
    other.take()  # goes on without
    assert other._file is None and mine._file is not None
    mine.give()
    with other:
        assert other._file is not None
    program = (
        "import sys, pathlib; from hfopt.kernels.jit.turn import Turn; Turn(pathlib.Path(sys.argv[1])).take()"
    )
    fresh.run(program, str(tmp_path / "lock"))
    mine.take()
    assert mine._file is not None
    mine.give()
    with turn.Turn(tmp_path / "missing" / "lock") as nobody:
        assert nobody._file is None


# An interrupt in the middle of compiling, and a fork there: neither may keep others waiting.
_INTERRUPTED = """
import os, pathlib, sys, torch
from hfopt import functional
from hfopt.kernels.jit import turn
from hfopt.kernels.norm import norm
def interrupt(*arguments):
    assert len(turn._held) == 1
    child = os.fork()
    if child == 0:
        os._exit(len(turn._held))
    assert os.waitpid(child, 0)[1] == 0
    raise KeyboardInterrupt
norm.dispatcher._compiler.compile = interrupt
try:
    functional.rms_norm(torch.randn(2, 64), None, 1e-5)
except KeyboardInterrupt:
    print(len(turn._held))
"""


def test_an_interrupt_ends_the_turn(tmp_path: Path) -> None:
    printed = fresh.run(_INTERRUPTED, HFOPT_CACHE_DIR=str(tmp_path / "base"))
    assert printed.split() == ["0"]
