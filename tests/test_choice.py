"""The measured choice between hfopt's kernels and torch's: what is taken, when it is timed, where it is kept."""

import json
import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hfopt.errors import InvalidInput
from hfopt.functional import choice, choice_file, trials
from hfopt.kernels.jit import launch as jit
from hfopt.words import DTYPES

_path, _measure = choice_file.path, choice._measure  # the real ones: conftest puts others in their place

FLOAT, BFLOAT = torch.float32, torch.bfloat16
TORCH, HFOPT = [0.8] * 5, [1.5] * 5


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a timing is to give ("ratios"), and which ones there were ("calls")."""
    state: dict[str, Any] = {"ratios": TORCH, "calls": []}

    def measure(*arguments: Any) -> list[float]:
        state["calls"].append(arguments)
        return state["ratios"]

    monkeypatch.setattr(choice, "_measure", measure)
    return state


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of a machine that has none yet."""
    monkeypatch.setattr(choice_file, "path", lambda n_threads: tmp_path / f"choices-{n_threads}.json")
    return tmp_path / f"choices-{torch.get_num_threads()}.json"


def new_process() -> None:
    choice._used.clear()


def takes_torch(size: int = 1, operation: str = "linear", dtype: torch.dtype = FLOAT) -> bool:
    return choice.takes_torch("auto", operation, dtype, size)


# ---- what follows from a timing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "is_torch", "is_kept"),
    [
        ([0.8] * 5, True, True),
        ([0.94] * 5, True, True),
        ([0.96] * 5, False, True),  # faster, but by less than 5 %
        ([1.3] * 5, False, True),
        ([0.8, 0.8, 0.9, 0.9, 1.1], True, True),
        ([0.8, 0.8, 0.8, 1.1, 1.1], False, False),  # they disagree
        ([1.3, 1.3, 1.3, 0.5, 0.5], False, True),
        ([], False, False),  # it could not be timed
    ],
)
def test_torch_is_taken_where_it_is_clearly_faster(
    measured: dict[str, Any], file: Path, ratios: list[float], is_torch: bool, is_kept: bool
) -> None:
    measured["ratios"] = ratios
    assert takes_torch() is is_torch
    assert file.exists() is is_kept
    (shown,) = [each for each in choice.choices() if each.kernels is not None]
    assert shown.kernels == ("torch" if is_torch else "hfopt") and shown.label == "linear, float32, 1 row"
    assert (shown.ratio is None) is (not ratios)


def test_every_class_is_timed_once_at_a_size_of_its_own(measured: dict[str, Any]) -> None:
    for operation, classes in choice.CLASSES.items():
        for dtype in DTYPES:
            for index, each in enumerate(classes):
                behind = classes[index + 1].first if index + 1 < len(classes) else 1 << 20
                assert each.first <= each.timed < behind
                measured["calls"].clear()
                for size in (each.first, each.first + 1, behind - 1):
                    if each.first <= size < behind:
                        assert takes_torch(size, operation, dtype)
                assert measured["calls"] == [(operation, dtype, each.timed)]
    assert all(each.kernels == "torch" for each in choice.choices())


def test_an_answer_never_changes_within_a_process(measured: dict[str, Any], file: Path) -> None:
    assert takes_torch()
    measured["ratios"] = HFOPT
    choice_file.add(torch.get_num_threads(), "linear, float32, 1 row", 2.0)  # another process, later
    assert takes_torch()
    new_process()
    assert not takes_torch()
    assert len(measured["calls"]) == 1


def test_each_number_of_threads_has_its_own_answer(measured: dict[str, Any], file: Path) -> None:
    torch.set_num_threads(1)
    assert takes_torch()
    measured["ratios"] = HFOPT
    torch.set_num_threads(2)
    assert not takes_torch()
    torch.set_num_threads(1)
    assert takes_torch()
    assert len(measured["calls"]) == 2
    assert choice_file._identity(1) != choice_file._identity(2)


def test_no_timing_where_the_user_has_chosen(measured: dict[str, Any]) -> None:
    assert choice.takes_torch("torch", "linear", FLOAT, 1)
    assert not choice.takes_torch("hfopt", "linear", FLOAT, 1)
    assert not measured["calls"]


@pytest.mark.parametrize("wrong", ["", "Torch", "onednn", None, 1, []])
def test_other_kernels_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidInput, match="'auto', 'hfopt', 'torch' are allowed"):
        choice.takes_torch(wrong, "linear", FLOAT, 1)


def test_threads_that_ask_at_once_share_one_timing(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_ask = threading.Barrier(8)
    inner, answers = choice._measure, []

    def slow(*arguments: Any) -> list[float]:
        result = inner(*arguments)
        measured["ratios"] = HFOPT  # what a second timing would give
        return result

    def ask() -> None:
        all_ask.wait()
        answers.append(takes_torch())

    monkeypatch.setattr(choice, "_measure", slow)
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8 and len(measured["calls"]) == 1


# ---- the file ----------------------------------------------------------------------------------------------


def test_the_next_process_reads_what_was_measured(measured: dict[str, Any], file: Path) -> None:
    assert takes_torch() and takes_torch(600, "attention", BFLOAT)
    measured["ratios"] = HFOPT
    assert not takes_torch(8)
    shown = choice.choices()
    new_process()
    measured["ratios"] = [math.nan]
    assert choice.choices() == shown  # before anything is asked for
    assert takes_torch() and takes_torch(600, "attention", BFLOAT) and not takes_torch(8)
    assert len(measured["calls"]) == 3
    assert file.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in file.parent.iterdir()] == [file.name]


_IDENTITY = choice_file._identity(2)


def _content(ratios: Any, **changes: Any) -> str:
    return json.dumps({"identity": {**_IDENTITY, **changes}, "ratios": ratios})


_WRONG: tuple[Any, ...] = (None, True, "0.1", -1.0, 0, [], 10**400)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95\x00",  # a pickle
        b"\xff\xfe{}",
        b"null",
        b"[]",
        b"{}",
        b'{"identity": 3',
        b"[" * 100_000,
        _content([1, 2]),
        _content("linear, float32, 1 row"),
        _content(None),
        *(_content({"linear, float32, 1 row": wrong}) for wrong in _WRONG),
        b'{"identity": %s, "ratios": {"linear, float32, 1 row": NaN}}' % json.dumps(_IDENTITY).encode(),
        b'{"identity": %s, "ratios": {"linear, float32, 1 row": -Infinity}}' % json.dumps(_IDENTITY).encode(),
        *(_content({"linear, float32, 1 row": 2.0}, **{name: "x"}) for name in _IDENTITY),
    ],
    ids=str,
)
def test_a_damaged_or_foreign_file_is_measured_again(
    measured: dict[str, Any], file: Path, content: bytes | str
) -> None:
    torch.set_num_threads(2)
    file = choice_file.path(2) or file
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert takes_torch()
    assert len(measured["calls"]) == 1
    new_process()
    assert takes_torch()  # mended
    assert len(measured["calls"]) == 1


def test_the_file_lies_beside_the_kernels_unless_others_can_write_there(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(choice_file, "path", _path)
    monkeypatch.setattr(jit, "cache_folder", jit.cache_folder.__wrapped__)
    monkeypatch.setenv("HFOPT_CACHE_DIR", str(tmp_path / "base"))
    assert takes_torch()
    folder, _ = jit.cache_folder()
    assert folder is not None
    (file,) = folder.iterdir()
    assert file.name.startswith("choices-")

    new_process()
    measured["ratios"] = HFOPT
    assert takes_torch()
    new_process()
    (tmp_path / "base").chmod(0o777)
    assert not takes_torch()  # the file is not read
    assert json.loads(file.read_text())["ratios"] == {"linear, float32, 1 row": 0.8}


@pytest.mark.parametrize("cache", ["off", "nowhere"])
def test_without_a_place_to_keep_it_an_answer_lasts_as_long_as_the_process(
    measured: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    cache: str,
) -> None:
    places: dict[str, Callable[[int], Path | None]] = {
        "off": lambda n: None,
        "nowhere": lambda n: tmp_path / "gone" / "file",
    }
    monkeypatch.setattr(choice_file, "path", places[cache])
    with caplog.at_level(logging.WARNING, "hfopt"):
        assert takes_torch() and takes_torch()
    assert len(measured["calls"]) == 1
    assert ("could not be kept" in caplog.text) is (cache == "nowhere")
    new_process()
    assert takes_torch() and len(measured["calls"]) == 2


def test_writers_at_the_same_time_leave_a_sound_file(file: Path) -> None:
    n_threads = torch.get_num_threads()
    labels = [f"label {index}" for index in range(4)]

    def write(label: str) -> None:
        for _ in range(25):
            choice_file.add(n_threads, label, 2.0)
            assert choice_file.read(n_threads)

    threads = [threading.Thread(target=write, args=(label,)) for label in labels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(choice_file.read(n_threads)) <= set(labels)
    assert len(list(file.parent.iterdir())) == 1


# ---- timing ------------------------------------------------------------------------------------------------


class Clock:
    """A machine on which torch takes 3 seconds and hfopt 2, and other work takes half the time of some of the calls."""

    def __init__(self, disturbed: tuple[int, ...] = ()) -> None:
        self.calls: list[str] = []
        self.seconds = self.seconds_on_core = 0.0
        self._disturbed = disturbed

    def run(self, by: str) -> None:
        needed = 3.0 if by == "torch" else 2.0
        self.seconds_on_core += needed
        self.seconds += 2 * needed if len(self.calls) in self._disturbed else needed
        self.calls.append(by)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], list[float]]:
    """`_measure` on such a machine."""

    def measure(clock: Clock) -> list[float]:
        monkeypatch.setitem(trials.TRIALS, "linear", lambda dtype, size: clock.run)
        monkeypatch.setattr(choice.time, "perf_counter", lambda: clock.seconds)
        monkeypatch.setattr(choice.time, "thread_time", lambda: clock.seconds_on_core)
        return _measure("linear", FLOAT, 1)

    return measure


def test_both_ways_are_timed_in_turn_after_a_warm_up(timed: Callable[[Clock], list[float]]) -> None:
    clock = Clock()
    assert timed(clock) == [1.5] * choice.PAIRS
    assert len(clock.calls) == 2 + 2 * choice.PAIRS
    assert clock.calls[2:10] == ["hfopt", "torch", "torch", "hfopt", "hfopt", "torch", "torch", "hfopt"]


def test_disturbed_pairs_do_not_count(timed: Callable[[Clock], list[float]]) -> None:
    assert timed(Clock(disturbed=(2, 7))) == [1.5] * choice.PAIRS
    busy = Clock(disturbed=tuple(range(2, 100)))
    assert timed(busy) == []
    assert len(busy.calls) == 2 + choice.SPARE_PAIRS + 1


def test_a_machine_without_memory_for_it_is_not_timed(
    timed: Callable[[Clock], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "available_memory", lambda: choice.SCRATCH)
    clock = Clock()
    assert timed(clock) == [] and not clock.calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", choice.CLASSES)
def test_the_trials_run_both_ways_and_leave_the_random_numbers_alone(
    operation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "SCRATCH", 1 << 25)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        for each in choice.CLASSES[operation]:
            run = trials.TRIALS[operation](dtype, each.timed)
            run("hfopt")
            run("torch")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
