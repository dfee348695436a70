"""A release of transformers that nobody has seen makes hfopt slower at worst: never wrong, and never silent."""

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from tests import tomorrow, tomorrow_answers
from tests.tomorrow_answers import TODAY, Answers

Ask: TypeAlias = Callable[[str], Answers]

each_variant = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if variant.is_slow else [])
        for name, variant in tomorrow.VARIANTS.items()
    ],
)


@pytest.fixture
def ask(request: pytest.FixtureRequest) -> Ask:
    """The answers of a release to `tomorrow_requests`, from processes that conftest began."""

    def answers(name: str) -> Answers:
        try:
            return tomorrow_answers.begun(request.session).answers(name)
        except tomorrow.Inapplicable as reason:
            pytest.skip(f"transformers {tomorrow.Release().version}: {reason}")

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
