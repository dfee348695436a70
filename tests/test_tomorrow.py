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

TODAY = ""
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
    pool = ThreadPoolExecutor(2)
    asked: dict[str, Future[Answers]] = {
        name: pool.submit(_answers, context, name, tmp_path_factory.mktemp(name or "today"))
        for name in dict.fromkeys([TODAY, *(item.callspec.params["name"] for item in items)])
    }

    def answers(name: str) -> Answers:
        try:
            return asked[name].result()
        except tomorrow.Inapplicable as reason:
            pytest.skip(f"transformers {tomorrow.Release().version}: {reason}")

    yield answers
    pool.shutdown(cancel_futures=True)


def _answers(context: Any, name: str, folder: Path) -> Answers:
    release, path = folder / "release", folder / "answers.json"
    if name != TODAY:
        # what another release answers must not depend on what this one has left behind
        if tomorrow.VARIANTS[name].keeps_version:
            _answers(context, TODAY, folder / "before")
        release.mkdir(parents=True)
        tomorrow.make(name, release)
    folder.mkdir(exist_ok=True)
    process = context.Process(target=tomorrow_requests.answer, args=(str(release) if name else "", str(path)))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0, f"{name or 'today'}: the process ended with {process.exitcode}"
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
def test_strict_lets_nothing_pass(name: str, ask: Ask) -> None:
    """If it refuses no model, every model runs as it does with the release of today."""
    today = _used(ask(TODAY))
    for family, entry in _used(ask(name)).items():
        if entry["strict"] is None:
            assert entry["counts"] == today[family]["counts"], entry["report"]
            assert entry["by_module"] is None, entry["report"]
