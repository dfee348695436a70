"""A release of transformers that nobody has seen makes hfopt slower at worst: never wrong, and never silent."""

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests import tomorrow, tomorrow_requests

Answers: TypeAlias = dict[str, Any]
Ask: TypeAlias = Callable[[str], Answers]

TODAY = ""  # the installed release
SECONDS = 300

each_variant = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if variant.is_slow else [])
        for name, variant in tomorrow.VARIANTS.items()
    ],
)


@pytest.fixture(scope="module")
def ask(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """The answers of each release to `tomorrow_requests`, from a process of its own; two of them run at a time.

    They are forked from one that has imported what all of them need, which takes longer than everything else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(tomorrow_requests.THIRD_PARTIES)
    items: list[Any] = [item for item in request.session.items if item.path == request.path]
    names = dict.fromkeys(item.callspec.params["name"] for item in items)
    pool = ThreadPoolExecutor(2)
    today = pool.submit(_answers, context, "", tmp_path_factory.mktemp("today"))
    asked = {
        name: pool.submit(_make_and_ask, context, name, tmp_path_factory.mktemp(name), today)
        for name in names
    }

    def answers(name: str) -> Answers:
        try:
            return asked[name].result() if name else today.result()
        except tomorrow.Inapplicable as reason:
            pytest.skip(f"transformers {tomorrow.Release().version}: {reason}")

    yield answers
    pool.shutdown(cancel_futures=True)


def _make_and_ask(context: Any, name: str, folder: Path, today: "Future[Answers]") -> Answers:
    release = folder / "release"
    release.mkdir()
    tomorrow.make(name, release)
    if tomorrow.VARIANTS[name].keeps_version:
        today.result()  # has left behind what it found out about a release of this version
    return _answers(context, str(release), folder)


def _answers(context: Any, release: str, folder: Path) -> Answers:
    path = folder / "answers.json"
    process = context.Process(target=tomorrow_requests.answer, args=(release, str(path)))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, f"{folder.name}: the process ended with {process.exitcode}"
    answers: Answers = json.loads(path.read_text())
    return answers


def _used(answers: Answers) -> dict[str, Any]:
    """The families, of which hfopt could be asked something at all."""
    families: dict[str, Any] = answers["families"]
    broken = [each["broken"] for each in (answers, *families.values()) if each["broken"]]
    assert not broken, "\n".join(broken)
    return families


def _raised(outcome: Any) -> str | None:
    """The exception that is part of an outcome, in words."""
    if isinstance(outcome, list):
        return next(filter(None, map(_raised, outcome)), None)
    return outcome if isinstance(outcome, str) else None


@each_variant
def test_the_release_itself(name: str, ask: Ask) -> None:
    """Stock does every request, as today if the variant is about no result, and otherwise if it is."""
    families, today = ask(name)["families"], ask(TODAY)["families"]
    is_same = []
    for family, entry in families.items():
        for request, outcome in entry["requests"].items():
            assert not _raised(outcome["stock"]), f"{family}, {request}"
            is_same.append(outcome["stock"] == today[family]["requests"][request]["stock"])
        assert entry["requests"]["beams"]["reorders"], family
    assert all(is_same) == tomorrow.VARIANTS[name].is_neutral


@each_variant
def test_results_are_those_of_stock(name: str, ask: Ask) -> None:
    wrong = [
        f"{family}, {request}: {outcome['difference'][:200]}"
        for family, entry in _used(ask(name)).items()
        for request, outcome in entry["requests"].items()
        if outcome["difference"]
    ]
    assert not wrong, "\n".join(wrong)


@each_variant
def test_what_is_not_used_is_said(name: str, ask: Ask) -> None:
    """`strict` refuses exactly those models that do not run as they do today, and the report and the log say why."""
    today, answers = _used(ask(TODAY)), ask(name)
    warnings = " ".join(each["message"] for each in answers["records"] if each["level"] == "WARNING")
    for family, entry in _used(answers).items():
        is_whole = (
            today[family]["strict"] is None
            and entry["counts"] == today[family]["counts"]
            and entry["by_module"] is None
            and entry["takes_steps"]
            and not entry["loops"]
        )
        assert (entry["strict"] is None) == is_whole, entry["report"]
        assert (entry["by_module"] or "") in entry["report"]
        for mode, reason in entry["loops"].items():
            for text in (entry["report"], warnings):
                assert mode in text and reason in text
