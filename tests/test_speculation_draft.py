"""Guesses of a draft model: `generate(assistant_model=...)` in our loop, against requests without one."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import hfopt
from hfopt.cache import IndirectCache
from hfopt.generation.decoding import Decoding
from hfopt.generation.draft import DraftModel
from hfopt.generation.speculation import Speculation
from hfopt.program.run import Run
from tests.generation_cases import (
    CACHE,
    FAMILIES,
    IS_WHOLE,
    NOT_WHOLE,
    VOCABULARY,
    Model,
    llama,
    mistral,
    one_thread,
    prompts,
)

pytestmark = [
    pytest.mark.usefixtures(one_thread.__name__),
    pytest.mark.skipif(not IS_WHOLE, reason=NOT_WHOLE),
]

GREEDY: dict[str, Any] = {"do_sample": False}
MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling": {"do_sample": True},
    "warped": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7},
    "processors": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


def noisy(make: Any = llama, part: float = 0.03) -> Model:
    """A model that mostly says what the one without noise does."""
    model = make()
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += part * parameter.std() * torch.randn_like(parameter)
    return model


DRAFTS: dict[str, Any] = {
    "right": llama,
    "near": noisy,
    "wrong": lambda: llama(num_hidden_layers=1, hidden_size=32, num_attention_heads=2),
}


class Checks:
    """What programs checked while it is installed: tokens that were guessed, and how many of those were right."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.guessed = self.right = self.calls = 0
        note, logits = Speculation.note, Run.logits

        def counted(speculation: Speculation, n_guessed: int, n_right: int) -> None:
            self.guessed += n_guessed
            self.right += n_right
            note(speculation, n_guessed, n_right)

        def checking(run: Run, *args: Any, **kwargs: Any) -> Tensor:
            self.calls += run.n_new > 1
            return logits(run, *args, **kwargs)

        def theirs(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("transformers' own assisted loop runs")

        monkeypatch.setattr(Speculation, "note", counted)
        monkeypatch.setattr(Run, "logits", checking)
        monkeypatch.setattr(GenerationMixin, "_assisted_decoding", theirs)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    return Checks(monkeypatch)


@pytest.fixture(params=[1, 4, 31])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens of each guess, whatever calls cost on the machine."""
    n: int = request.param
    monkeypatch.setattr(Speculation, "_worth", lambda speculation, n_rows, most: min(n, most))
    return n


@pytest.fixture(scope="module")
def stock() -> Model:
    return llama()


@pytest.fixture(scope="module")
def ours() -> Model:
    return hfopt.optimize(llama())


@pytest.fixture(scope="module", params=list(DRAFTS))
def draft(request: pytest.FixtureRequest) -> Model:
    return hfopt.optimize(DRAFTS[request.param]())


@pytest.fixture(scope="module")
def near() -> Model:
    return hfopt.optimize(noisy())


def seeded(model: Model, **arguments: Any) -> Any:
    torch.manual_seed(5)
    tokens = model.generate(**arguments)
    return tokens, torch.rand(1)


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_without_a_draft(
    mode: str, n_rows: int, stock: Model, ours: Model, draft: Model, size: int, checks: Checks
) -> None:
    arguments = {**prompts(n_rows), **MODES[mode], "max_new_tokens": 50}
    expected, random = seeded(stock, **arguments)
    tokens, our_random = seeded(ours, **arguments, assistant_model=draft)
    assert torch.equal(tokens, expected)
    assert torch.equal(our_random, random), "the random streams differ"
    assert checks.calls > 0 and checks.guessed > 0
    is_right = draft.config.num_hidden_layers == 2 and torch.equal(draft.lm_head.weight, ours.lm_head.weight)
    assert not is_right or checks.right == checks.guessed


@pytest.mark.parametrize("mode", MODES)
def test_a_near_draft_is_mostly_right(mode: str, ours: Model, near: Model, checks: Checks) -> None:
    """Also of what is drawn: with the random numbers that the loop draws next."""
    for seed in range(4):
        torch.manual_seed(seed)
        arguments = {**prompts(1), **MODES[mode], "max_new_tokens": 50}
        ours.generate(**arguments, assistant_model=near)
    assert checks.right > checks.guessed / 2


@pytest.mark.parametrize("name", list(FAMILIES))
def test_families(name: str, size: int, checks: Checks) -> None:
    stock, ours = FAMILIES[name](), hfopt.optimize(FAMILIES[name]())
    if ours.hfopt.by_module is not None:
        pytest.skip("no program")
    draft = hfopt.optimize(noisy(FAMILIES[name]))
    for mode in ("greedy", "sampling"):
        arguments = {**prompts(3), **MODES[mode], "max_new_tokens": 50}
        expected, _ = seeded(stock, **arguments)
        assert torch.equal(seeded(ours, **arguments, assistant_model=draft)[0], expected)
    assert checks.guessed > 0
