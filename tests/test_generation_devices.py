"""Requests under a default device that is not the model's: `torch.device` as a context, `torch.set_default_device`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hfopt
from tests.generation_cases import FAMILIES, Model, assert_same, bloom, needs_programs, one_thread, prompts

pytestmark = [
    pytest.mark.usefixtures(one_thread.__name__),
    # of transformers 4, where it makes positions of chunks itself
    pytest.mark.filterwarnings("ignore:`position_ids` have no functionality in BLOOM"),
]

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "processors and scores": {
        "repetition_penalty": 1.3,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    },
    "chunks of the prompt": {"prefill_chunk_size": 4},
}
BEAMS: dict[str, dict[str, Any]] = {
    "beam search": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
}
PROMPTS: dict[str, Callable[[], dict[str, Any]]] = {
    "padding": prompts,
    "one row": lambda: prompts(1),
    "no mask": lambda: {"input_ids": prompts(1)["input_ids"]},
}


@pytest.fixture(scope="module", params=["llama", "opt", "bloom"])
def stock(request: pytest.FixtureRequest) -> Model:
    return {**FAMILIES, "bloom": bloom}[request.param]()


def tokens(model: Model, given: dict[str, Any], options: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    return model.generate(**given, max_new_tokens=12, **options)


def elsewhere(model: Model, given: dict[str, Any], options: dict[str, Any]) -> Any:
    with torch.device("meta"):  # where torch puts what is made from sizes alone
        return tokens(model, given, options)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("prompt", list(PROMPTS))
@pytest.mark.parametrize("mode", list(MODES))
def test_results_are_those_of_transformers(stock: Model, mode: str, prompt: str) -> None:
    given, options = PROMPTS[prompt](), MODES[mode]
    known = elsewhere(stock, given, options)
    model = hfopt.optimize(copy.deepcopy(stock))
    assert_same(elsewhere(model, given, options), known)
    assert_same(tokens(model, given, options), known)  # nothing made there has stayed


@needs_programs
@pytest.mark.parametrize("prompt", list(PROMPTS))
@pytest.mark.parametrize("mode", list(BEAMS))
def test_beams(stock: Model, mode: str, prompt: str) -> None:
    """For which transformers' own loop makes tensors on the default device, and fails."""
    given, options = PROMPTS[prompt](), BEAMS[mode]
    known = tokens(stock, given, options)
    model = hfopt.optimize(copy.deepcopy(stock))
    assert_same(elsewhere(model, given, options), known)


def test_modules_make_the_steps(stock: Model) -> None:
    given = prompts()
    known = elsewhere(stock, given, {})
    model = hfopt.optimize(copy.deepcopy(stock))
    model.register_forward_hook(lambda *_: None)  # of which a program knows nothing
    assert_same(elsewhere(model, given, {}), known)


def test_optimised_there(stock: Model) -> None:
    model = copy.deepcopy(stock)
    with torch.device("meta"):
        hfopt.optimize(model)
    counts = model.hfopt.counts
    assert counts == hfopt.optimize(copy.deepcopy(stock)).hfopt.counts and counts
    assert_same(tokens(model, prompts(), {}), tokens(stock, prompts(), {}))


def test_the_default_of_the_process() -> None:
    stock = FAMILIES["llama"]()
    model, given = hfopt.optimize(copy.deepcopy(stock)), prompts()
    torch.set_default_device("meta")
    try:
        ours = tokens(model, given, {})
    finally:
        torch.set_default_device(None)
    assert_same(ours, tokens(stock, given, {}))
