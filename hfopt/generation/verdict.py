"""What the proof of a whole model says of its requests."""

from typing import Any, NamedTuple

_VERDICT = "_hfopt_verdict"  # attribute of an optimized model


class Verdict(NamedTuple):
    """refusal: why requests run in transformers' own loops, over its own cache. obstacle: why their steps are none that a
    program could take. Both in words, or None."""

    refusal: str | None = None
    obstacle: str | None = None


def verdict_of(model: Any) -> Verdict:
    """That of a model which is optimized."""
    found: Verdict = vars(model).get(_VERDICT, Verdict())
    return found


def keep_verdict(model: Any, verdict: Verdict | None) -> None:
    """Leave it on the model; None takes away what is there."""
    vars(model).pop(_VERDICT, None)
    if verdict is not None and verdict != Verdict():
        vars(model)[_VERDICT] = verdict
