"""Classes that prepare their own steps: a program makes those for which they prepare what a plain step gets."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import hfopt
from hfopt.cache import IndirectCache
from hfopt.errors import UnsupportedModel
from hfopt.generation import install
from tests.generation_cases import (
    CACHE,
    VOCABULARY,
    Model,
    assert_same,
    cache_of,
    llama,
    needs_programs,
    one_thread,
    prompts,
)
from tests.step_cases import MODES, optimized, passes, prove, rehearsals

__all__ = ["passes", "rehearsals"]  # fixtures

pytestmark = [pytest.mark.usefixtures(one_thread.__name__), needs_programs]

PLACE = 20  # of the token for which a class prepares something else
N_PROMPT, N_NEW = 9, 24


class Through(LlamaForCausalLM):
    """Prepares what every model does, and counts."""

    n_prepared = 0

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        self.n_prepared += 1
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


class Dropping(LlamaForCausalLM):
    """Begins a new cache when the text has grown to a length, as Phi-3 does."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        if cache is not None and input_ids.shape[1] > PLACE >= cache.get_seq_length():
            kwargs |= {CACHE: None, "next_sequence_length": None}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


class Rereading(LlamaForCausalLM):
    """Reads its last two tokens at one length."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        if input_ids.shape[1] == PLACE:
            kwargs[CACHE].crop(-1)
            kwargs["next_sequence_length"] = 2
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


class Adding(LlamaForCausalLM):
    """Reads a token more than its text has at one length, which the mask does not know of from then on."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if input_ids.shape[1] == PLACE:
            inputs["input_ids"] = inputs["input_ids"].repeat(1, 2)
            inputs["position_ids"] = inputs["position_ids"].repeat(1, 2)
        return inputs


class Moving(LlamaForCausalLM):
    """Counts positions otherwise from one length on."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if input_ids.shape[1] >= PLACE:
            inputs["position_ids"] = inputs["position_ids"] + 3
        return inputs


class Hiding(LlamaForCausalLM):
    """Hides a token from one length on, in the mask that it is given."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        if input_ids.shape[1] == PLACE:
            kwargs["attention_mask"][:, 7] = 0
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


class Copying(LlamaForCausalLM):
    """Goes on with a copy of its cache at one length."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        if input_ids.shape[1] == PLACE:
            old, kwargs[CACHE] = kwargs[CACHE], DynamicCache(config=self.config)
            for index, layer in enumerate(old.layers):
                kwargs[CACHE].update(layer.keys.clone(), layer.values.clone(), index)
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


class Other(LlamaForCausalLM):
    """Gives each step a mask of another type."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs["attention_mask"] = inputs["attention_mask"].bool()
        return inputs


N_STEPS = N_NEW - 1
N_BEHIND = N_PROMPT + N_NEW - PLACE  # steps from PLACE on
# class -> how many tokens a row its modules read, in each pass but for the prompt's
BY_MODULES: dict[type, list[int]] = {
    Through: [],
    Dropping: [PLACE + 1],
    Rereading: [2],
    Adding: [2] + [1] * (N_BEHIND - 1),
    Moving: [1] * N_BEHIND,
    Hiding: [1] * N_BEHIND,
    Copying: [1] * N_BEHIND,
    Other: [1] * N_STEPS,
}


def of_class(kind: type) -> Model:
    model = llama()
    model.__class__ = kind
    return model


def results(*models: Model, **given: Any) -> list[Any]:
    found = []
    for model in models:
        torch.manual_seed(3)
        wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        found.append(model.generate(**{**prompts(2, N_PROMPT), "max_new_tokens": N_NEW, **wanted, **given}))
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BY_MODULES)
def test_results_are_those_of_the_class(kind: type, mode: str, passes: list[int]) -> None:
    stock, model = of_class(kind), optimized(of_class(kind))
    if kind is not Other:
        prove(model)
    (expected,) = results(stock, **MODES[mode])
    passes.clear()
    (found,) = results(model, **MODES[mode])
    assert passes == BY_MODULES[kind] or (kind is Other and passes[1:] == BY_MODULES[kind][1:])
    assert_same(found, expected)


@pytest.mark.parametrize("kind", BY_MODULES)
def test_tokens_alone(kind: type, passes: list[int]) -> None:
    """Without logits, which lets the program choose."""
    stock, model = of_class(kind), optimized(of_class(kind))
    given = {**prompts(2, N_PROMPT), "max_new_tokens": N_NEW, "do_sample": False}
    free = stock.generate(**given)
    ends = {"eos_token_id": free[0, 15:].tolist()[:1], "pad_token_id": 0}
    for options in ({}, ends):
        expected = stock.generate(**given, **options)
        passes.clear()
        assert torch.equal(model.generate(**given, **options), expected)
        if not options:
            assert passes[-len(BY_MODULES[kind]) :] == BY_MODULES[kind] or not BY_MODULES[kind]


def test_each_step_is_prepared_once() -> None:
    model = optimized(of_class(Through))
    model.n_prepared = 0
    model.generate(**prompts(2, N_PROMPT), max_new_tokens=N_NEW, do_sample=False)
    assert model.n_prepared == N_NEW


@pytest.mark.parametrize("kind", BY_MODULES)
def test_what_is_said_of_it(kind: type) -> None:
    if kind is Other:
        with pytest.raises(
            UnsupportedModel, match="its class has other ways to prepare or to make the steps"
        ):
            hfopt.optimize(of_class(kind), strict=True)
        assert "its class has other ways" in str(optimized(of_class(kind)).hfopt.by_module)
    else:
        assert hfopt.optimize(of_class(kind), strict=True).hfopt.by_module is None


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_that_is_too_long_for_its_cache(mode: str, passes: list[int]) -> None:
    """The class drops the cache that the request has begun with."""
    stock, model = of_class(Dropping), optimized(of_class(Dropping))
    prove(model)
    (expected,) = results(stock, **prompts(2, PLACE + 4), **MODES[mode])
    passes.clear()
    (found,) = results(model, **prompts(2, PLACE + 4), **MODES[mode])
    assert not passes and isinstance(cache_of(found), IndirectCache)
    assert_same(found, expected)


@pytest.mark.parametrize("kind", [DynamicCache, IndirectCache])
@pytest.mark.parametrize("n_past", [4, PLACE - 1])
def test_a_cache_of_the_user_that_is_dropped(kind: type, n_past: int) -> None:
    """It stays as long as it was when its request left it."""
    stock, model = of_class(Dropping), optimized(of_class(Dropping))
    ids = prompts(1, PLACE + 3)["input_ids"]
    lengths, found = [], []
    for each, length in ((stock, PLACE - 1), (model, PLACE - 1), (stock, PLACE + 3), (model, PLACE + 3)):
        cache = (DynamicCache if each is stock else kind)(config=each.config)
        with torch.no_grad():
            each(input_ids=ids[:, :n_past], use_cache=True, **{CACHE: cache})
        given = {"max_new_tokens": 8, "do_sample": False, CACHE: cache}
        if n_past < length:
            found.append(each.generate(ids[:, :length], **given))
            lengths.append(cache.get_seq_length())
    assert lengths[::2] == lengths[1::2]
    assert all(torch.equal(*pair) for pair in zip(found[::2], found[1::2], strict=True))


# ---- Phi-3 -------------------------------------------------------------------------------------------------


def phi3() -> Model:
    """It has a rotation for texts of up to 32 tokens, and another one for longer ones."""
    torch.manual_seed(7)
    config: Any = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0 + 0.1 * index for index in range(8)],
            "long_factor": [2.0 + index for index in range(8)],
        },
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Phi3ForCausalLM(config).eval()


@pytest.mark.parametrize("length", [9, 31, 32, 33, 40])
@pytest.mark.parametrize("mode", MODES)
def test_phi3_over_its_boundary(mode: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[int] = []
    forward = Phi3ForCausalLM.forward

    @functools.wraps(forward)
    def noting(self: Any, **inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] > 32:
            dropped.append(inputs["input_ids"].shape[1])
        return forward(self, **inputs)

    stock, looped, model = phi3(), phi3(), optimized(phi3())
    install(looped)
    monkeypatch.setattr(Phi3ForCausalLM, "forward", noting)
    given = {**prompts(2, length), **MODES[mode], "max_new_tokens": 40}
    expected, same, found = results(stock, looped, model, **given)
    # a prompt beyond the boundary is read by the program, a text that comes to it by the modules
    assert dropped == [max(33, length)] * (3 if length <= 32 else 2)
    assert all(isinstance(cache_of(each), IndirectCache) for each in (same, found))
    assert_same(same, expected)
    assert torch.equal(found.sequences, expected.sequences)  # rounding may turn two beams round
