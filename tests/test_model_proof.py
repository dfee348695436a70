"""A model generates as it was and as it is now before anybody gets it; what differs is left to transformers, and said so."""

import copy
import functools
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.llama import modeling_llama

import hfopt
from hfopt.errors import UnsupportedModel
from hfopt.generation import installed
from hfopt.patches.shadow import shadow
from tests.generation_cases import (
    VOCABULARY,
    Model,
    assert_same,
    llama,
    needs_programs,
    one_thread,
    prompts,
)
from tests.reference import DTYPES

pytestmark = [pytest.mark.usefixtures(one_thread.__name__), needs_programs]

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
}


class LayeredAttention(modeling_llama.LlamaAttention):
    """Weaker in each further layer."""

    @functools.wraps(modeling_llama.LlamaAttention.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # mypy cannot see through `wraps`
        output, weights = super().forward(*args, **kwargs)
        return output / (self.layer_idx + 1), weights


def gain_of(config: Any) -> float:
    gain: float = getattr(config, "attention_gain", 1.0)
    return gain


class ConfiguredAttention(modeling_llama.LlamaAttention):
    """Stronger or weaker by a field of the configuration, which a function reads."""

    @functools.wraps(modeling_llama.LlamaAttention.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        output, weights = super().forward(*args, **kwargs)
        return output * gain_of(self.config), weights


class Remembering(LlamaForCausalLM):
    """Keeps something of each row of the prompt."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        ids = kwargs["input_ids"]
        if ids.shape[1] > 1:
            self.n_tokens = (ids != 0).sum(1)[:, None, None]
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * (1 + 0.01 * self.n_tokens)
        return outputs


class Choosing(LlamaForCausalLM):
    """Has a part of beam search of its own."""

    def _get_top_k_continuations(self, *args: Any, **kwargs: Any) -> Any:
        scores, tokens, beams = super()._get_top_k_continuations(*args, **kwargs)
        return scores, torch.full_like(tokens, 7), beams


def of_class(kind: type, model: Model) -> Model:
    model.__class__ = kind
    return model


def with_layered_attention(model: Model) -> Model:
    for layer in model.model.layers:
        layer.self_attn.__class__ = LayeredAttention
    return model


def assert_same_results(model: Model, stock: Model) -> None:
    for given in REQUESTS.values():
        results = []
        for each in (stock, model):
            torch.manual_seed(3)
            options = {
                "max_new_tokens": 12,
                "do_sample": False,
                "return_dict_in_generate": True,
                "output_scores": True,
            }
            results.append(each.generate(**prompts(), **{**options, **given}))
        assert_same(results[1], results[0])


def test_a_model_that_is_whole() -> None:
    model = hfopt.optimize(llama(), strict=True)
    assert installed(model).verdict == (None, None)


def test_attention_that_depends_on_the_layer(caplog: pytest.LogCaptureFixture) -> None:
    model, stock = with_layered_attention(llama()), with_layered_attention(llama())
    with pytest.raises(UnsupportedModel, match="the model as a whole gives logits that differ"):
        hfopt.optimize(model, strict=True)
    hfopt.optimize(model)
    assert not model.hfopt.swapped and model.hfopt.by_module is not None
    assert "the model as a whole gives logits that differ" in str(hfopt.explain(model))
    assert installed(model).verdict.refusal is None
    assert_same_results(model, stock)


def test_a_field_that_a_helper_reads_is_changed() -> None:
    model, stock = llama(), llama()
    for each in (model, stock):
        each.config.attention_gain = 1.0
        for layer in each.model.layers:
            layer.self_attn.__class__ = ConfiguredAttention
    hfopt.optimize(model, strict=True)
    assert_same_results(model, stock)
    for each in (model, stock):
        each.config.attention_gain = 0.5
    assert "config.attention_gain is 0.5 now, not 1.0" in str(hfopt.explain(model).by_module)
    assert_same_results(model, stock)


def test_a_model_that_keeps_something_of_its_prompt(caplog: pytest.LogCaptureFixture) -> None:
    model, stock = of_class(Remembering, llama()), of_class(Remembering, llama())
    reason = "in hfopt's loops, over its cache, it "
    before = hfopt.explain(model)
    assert reason in str(before.by_module) and vars(model).keys() == vars(stock).keys()
    with pytest.raises(UnsupportedModel, match=reason):
        hfopt.optimize(model, strict=True)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hfopt"):
        hfopt.optimize(model)
    assert reason in caplog.text
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert reason in str(hfopt.explain(each).by_module)
        assert_same_results(each, stock)
    hfopt.optimize(model)  # once more
    assert reason in str(model.hfopt.by_module)
    hfopt.restore(model)
    assert installed(model).verdict == (None, None) and not [name for name in vars(model) if "hfopt" in name]
    assert_same_results(model, stock)


def test_a_method_of_the_class() -> None:
    model, stock = of_class(Choosing, llama()), of_class(Choosing, llama())
    with pytest.raises(UnsupportedModel, match="its class has other ways to prepare or to make the steps"):
        hfopt.optimize(model, strict=True)
    hfopt.optimize(model)
    assert "its class has other ways" in str(model.hfopt.by_module)
    assert_same_results(model, stock)


def test_a_method_of_the_instance() -> None:
    model, stock = hfopt.optimize(llama()), llama()
    for each in (model, stock):
        each._get_top_k_continuations = functools.partial(
            Choosing._get_top_k_continuations, of_class(Choosing, copy.copy(each))
        )
    assert_same_results(model, stock)


def test_an_option_that_only_the_loop_of_transformers_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = GenerationMixin._sample

    @functools.wraps(sample)
    def ending_early(self: Any, *args: Any, **kwargs: Any) -> Any:
        early = getattr(kwargs["generation_config"], "early", None)
        found = sample(self, *args, **kwargs)
        return found if early is None else found[:, :early]

    model = hfopt.optimize(llama())
    monkeypatch.setattr(GenerationMixin, "_sample", ending_early)
    config = copy.deepcopy(model.generation_config)
    config.early, config.max_new_tokens = 11, 6
    assert model.generate(**prompts(), generation_config=config).shape[1] == 11


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("request_of", REQUESTS)
def test_prompts_of_any_integers(request_of: str, dtype: torch.dtype) -> None:
    results = []
    for model in (llama(), hfopt.optimize(llama())):
        torch.manual_seed(3)
        given = {key: value.to(dtype) for key, value in prompts().items()}
        results.append(
            model.generate(**given, max_new_tokens=3, **{"do_sample": False, **REQUESTS[request_of]})
        )
    assert results[0].dtype is results[1].dtype and torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_that_rounding_may_change(dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_local_experts": 8,
    }
    for seed in range(3):
        torch.manual_seed(seed)
        config = MixtralConfig(
            **sizes, vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=2, sliding_window=None
        )
        model: Model = MixtralForCausalLM(config)
        hfopt.optimize(model.to(dtype).eval())
        assert model.hfopt.swapped and installed(model).verdict.refusal is None


# ---- shadows -----------------------------------------------------------------------------------------------


def test_shadows() -> None:
    model = hfopt.optimize(llama(num_hidden_layers=5), kernels="torch")
    model.register_forward_hook(lambda *given: None)
    short, original = shadow(model, is_short=True), shadow(model, is_original=True)
    assert len(short.model.layers) == 3 and len(original.model.layers) == len(model.model.layers) == 5
    assert not short._forward_hooks and len(model._forward_hooks) == 2
    assert short.lm_head.weight is model.lm_head.weight
    assert (
        short.model.layers[0].mlp._hfopt.kernels == "hfopt"
        and model.model.layers[0].mlp._hfopt.kernels == "torch"
    )
    assert type(original.model.layers[4].mlp) is modeling_llama.LlamaMLP
    given = prompts()
    with torch.no_grad():
        found, expected = original(**given).logits, llama(num_hidden_layers=5)(**given).logits
    assert isinstance(found, Tensor) and torch.equal(found, expected)


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_outputs_of_inner_modules_are_collected_once(name: str) -> None:
    """transformers leaves hooks on the modules of a model that is asked for them."""
    model, stock = llama(attn_implementation="eager"), llama(attn_implementation="eager")
    with torch.no_grad():
        for n_optimized in range(2):
            found, expected = (each(**prompts(), **{name: True}) for each in (model, stock))
            field = name.removeprefix("output_")
            assert len(found[field]) == len(expected[field])
            hfopt.optimize(model, strict=True)
            assert model.hfopt.by_module is None, n_optimized


def test_what_a_forward_keeps_stays_with_the_shadow() -> None:
    model = llama()
    hooked, tables = shadow(model), [dict(module._buffers) for module in model.modules()]
    for module in hooked.modules():
        module.register_buffer("more", torch.zeros(1), persistent=False)
        module.register_forward_hook(lambda *given: None)
    assert [dict(module._buffers) for module in model.modules()] == tables
    assert not any(module._forward_hooks for module in model.modules())
