"""Decode steps by the program and by the modules of one model, and the comparison of both, bit by bit."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    BloomForCausalLM,
    FalconForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GPTJForCausalLM,
    GPTNeoForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MptForCausalLM,
    OPTForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

import hfopt
from hfopt import model_proof
from hfopt.generation import Installed, installed, keep
from hfopt.model_proof import verdict_on
from hfopt.program import programs, rehearsal
from tests.generation_cases import (
    FAMILIES,
    IS_WHOLE,
    NOT_WHOLE,
    Model,
    cache_of,
    prompts,
)

_KINDS = (
    LlamaForCausalLM, GPTJForCausalLM, OPTForCausalLM, Qwen2ForCausalLM, MistralForCausalLM, Qwen3ForCausalLM,
    Phi3ForCausalLM, GraniteForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM, BloomForCausalLM, MptForCausalLM,
    GPTNeoForCausalLM, FalconForCausalLM,
    *(getattr(transformers, name) for name in ("Gemma4ForCausalLM", "ApertusForCausalLM") if hasattr(transformers, name)),
)  # fmt: skip
ALL_OUTPUTS = {"return_dict_in_generate": True, "output_logits": True}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 4},
    "several of a prompt": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.fixture
def rehearsals() -> list[str | None]:
    """Kind of cache of each rehearsal of a program, in a test that has `passes` too."""
    return []


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, rehearsals: list[str | None]) -> list[int]:
    """How many tokens a row each forward pass had that went through modules, but for those of proofs."""
    found: list[int] = []

    def rehearsed(model: Model, program: Any, kv_cache: str | None) -> str | None:
        n_before = len(found)
        rehearsals.append(kv_cache)
        try:
            return rehearsal.difference(model, program, kv_cache)
        finally:
            del found[n_before:]

    def proven(walk: Any, model: Model, ranks: Any = None) -> Any:
        n_before = len(found)
        try:
            return verdict_on(walk, model, ranks)
        finally:
            del found[n_before:]

    monkeypatch.setattr(programs, "difference", rehearsed)
    monkeypatch.setattr(model_proof, "verdict_on", proven)
    for kind in _KINDS:
        monkeypatch.setattr(kind, "forward", _noting(kind.forward, found))
    return found


def _noting(forward: Any, found: list[int]) -> Any:
    @functools.wraps(forward)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    return noting


def optimized(model: Model) -> Model:
    """The model in hfopt's kernels alone, whose results have the same bits at any number of threads."""
    return hfopt.optimize(model, kernels="hfopt")


def programs_of(model: Model) -> Any:
    """Where requests of an optimized model take their programs from."""
    return installed(model).programs


def take_programs(model: Model) -> Any:
    """Let the model's requests go module by module from now on; what they have taken their programs from."""
    state: Installed = installed(model)
    keep(model, replace(state, programs=None))
    return state.programs


@contextmanager
def modules_alone(model: Model) -> Iterator[None]:
    """Within, the model has no program."""
    found = take_programs(model)
    try:
        yield
    finally:
        keep(model, replace(installed(model), programs=found))


def generated(model: Model, arguments: dict[str, Any] | None = None, **options: Any) -> Any:
    """The result of `generate` from the same random state, with logits."""
    torch.manual_seed(5)
    return model.generate(**{**prompts(), **ALL_OUTPUTS, **(arguments or {}), **options})


def assert_as_close_as_stock(exact: Model, dtype: torch.dtype, ids: dict[str, Any]) -> None:
    """Of these prompts' last 8 logits, in 16 bits, an error against float32 of at most 1.5 times transformers' own."""
    stock = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(stock.state_dict())  # both from the same weights
    with torch.no_grad():
        reference = exact(**ids).logits[:, -8:]

        def error(model: Model) -> float:
            return float((model(**ids).logits[:, -8:].float() - reference).square().mean().sqrt())

        before = error(stock)
        assert 0 < error(hfopt.optimize(stock, strict=True)) <= 1.5 * before


def prove(model: Model) -> None:
    """See that the model has a program, and use it once."""
    if not IS_WHOLE:
        pytest.skip(NOT_WHOLE)
    model.generate(**prompts(1, 4), max_new_tokens=2, do_sample=False)
    assert hfopt.explain(model).by_module is None
    with torch.no_grad():
        assert programs_of(model).of(model, 1) is not None


def proven(model: Model) -> Model:
    """The model with its program."""
    prove(optimized(model))
    return model


@functools.cache
def proven_family(name: str, dtype: torch.dtype = torch.float32) -> Model:
    """A model with its program, for all tests that leave it as it is."""
    return proven(FAMILIES[name]().to(dtype))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same_bits(one: Any, other: Any) -> None:
    """Tokens, logits of every step, and what the cache holds."""
    assert torch.equal(one.sequences, other.sequences)
    assert len(one.logits) == len(other.logits)
    for step, (ours, theirs) in enumerate(zip(one.logits, other.logits, strict=True)):
        assert torch.equal(bits(ours), bits(theirs)), f"logits of step {step}"
    for ours, theirs in zip(cache_of(one).layers, cache_of(other).layers, strict=True):
        assert torch.equal(bits(ours.keys), bits(theirs.keys))
        assert torch.equal(bits(ours.values), bits(theirs.values))


def assert_program_is_the_modules(
    model: Model, passes: list[int], n_calls: int | None = None, **arguments: Any
) -> Any:
    """`generate` of a proven model takes prompt and steps from the program, with the bits that the modules give.

    n_calls: of the modules; None: as many as there are tokens.
    """
    passes.clear()
    ours = generated(model, arguments)
    assert not passes, "prompt and steps of the program"
    with modules_alone(model):
        passes.clear()
        theirs = generated(model, arguments)
        assert len(passes) == (n_calls or len(theirs.logits)), "prompt and steps of the modules"
    assert_same_bits(ours, theirs)
    return ours
