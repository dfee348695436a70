"""Models whose texts repeat, and what programs check of guessed tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

import hfopt
from hfopt.generation.speculation import Speculation, StepCosts
from hfopt.program.run import Run
from tests.generation_cases import Model


class Checks:
    """What programs check while it is installed: calls for several tokens, tokens that were guessed, as the programs and as
    the loop count them, and how many of those were right.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = self.checked = self.guessed = self.right = 0
        note, logits = Speculation.note, Run.logits

        def counted(speculation: Speculation, n_guessed: int, n_right: int) -> None:
            self.guessed += n_guessed
            self.right += n_right
            note(speculation, n_guessed, n_right)

        def checking(run: Run, *args: Any, **kwargs: Any) -> Tensor:
            self.calls += run.n_new > 1
            self.checked += run.n_new - 1
            return logits(run, *args, **kwargs)

        monkeypatch.setattr(Speculation, "note", counted)
        monkeypatch.setattr(Run, "logits", checking)


def steady_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is guessed must not depend on how busy the machine is."""
    monkeypatch.setattr(StepCosts, "seconds", lambda costs, n_rows, n_tokens: 1 + 0.05 * (n_tokens - 1))


def cycling(model: Model, share: float = 0.2) -> Model:
    """The model with layers that hardly matter: what follows a token is almost always the same, so that texts repeat."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part.isdigit() for part in name.split(".")):
                parameter.mul_(share)
    return model


def pair(make: Any, share: float = 0.2, **changes: Any) -> tuple[Model, Model]:
    return cycling(make(**changes), share), hfopt.optimize(cycling(make(**changes), share))
