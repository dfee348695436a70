"""Gemma 4: layers that read the keys and values of others, values that are keys, and an input of each layer's own."""

import itertools
from typing import Any

import pytest
import torch
import transformers

import hfopt
from hfopt import functional
from hfopt.cache import IndirectCache
from hfopt.errors import InvalidInput
from hfopt.functional import Mask, Scoring
from tests.generation_cases import (
    VOCABULARY,
    Model,
    assert_same,
    llama_like,
    needs_programs,
    one_thread,
    prompts,
)
from tests.pairs import pairs_of
from tests.reference import DTYPES
from tests.step_cases import (
    MODES,
    assert_as_close_as_stock,
    assert_program_is_the_modules,
    generated,
    modules_alone,
    optimized,
    passes,
    prove,
    rehearsals,
)

__all__ = ["passes", "rehearsals"]  # fixtures

pytestmark = [
    pytest.mark.usefixtures(one_thread.__name__),
    needs_programs,
    pytest.mark.skipif(
        not hasattr(transformers, "Gemma4ForCausalLM"), reason="this transformers has no Gemma 4"
    ),
]

WINDOW = 16
_KINDS = ["sliding_attention", "full_attention"]
_SIZES: dict[str, Any] = {
    "head_dim": 16,
    "global_head_dim": 24,
    "sliding_window": WINDOW,
    "max_position_embeddings": 256,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 0,
    "layer_types": 2 * _KINDS,
    "num_hidden_layers": 4,
}
_EFFICIENT = {
    "layer_types": 3 * _KINDS,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "use_double_wide_mlp": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "keys as values": {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "final_logit_softcapping": 5.0,
    },
    "efficient": _EFFICIENT,
    "all at once": {**_EFFICIENT, "attention_k_eq_v": True, "num_kv_shared_layers": 4},
}


def gemma4(**changes: Any) -> Model:
    model = llama_like(transformers.Gemma4ForCausalLM, transformers.Gemma4TextConfig, **{**_SIZES, **changes})
    for name, each in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("norm.weight", "layer_scalar")):  # they begin as ones
            torch.nn.init.normal_(each, 1.0, 0.2)
    return model


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("name", "mode"), list(itertools.product(MODELS, MODES)))
def test_fifty_tokens_are_those_of_transformers(name: str, mode: str, passes: list[int]) -> None:
    model = gemma4(**MODELS[name])
    expected = generated(model, MODES[mode], max_new_tokens=50)
    optimized(model)
    passes.clear()
    found = generated(model, MODES[mode], max_new_tokens=50)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=2e-4)
    assert not passes, "modules make none of the steps"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_16_bits_are_as_close_to_float32_as_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    assert_as_close_as_stock(gemma4(**MODELS[name]), dtype, prompts(3, 20))


@pytest.mark.parametrize(("name", "dtype", "mode"), pairs_of(MODELS, DTYPES, MODES))
def test_the_program_has_the_bits_of_the_modules(
    name: str, dtype: torch.dtype, mode: str, passes: list[int]
) -> None:
    # a limit of logits takes torch's tanh in modules
    model = optimized(gemma4(**{**MODELS[name], "final_logit_softcapping": None}).to(dtype))
    prove(model)
    assert_program_is_the_modules(model, passes, max_new_tokens=40, **MODES[mode])


@pytest.mark.parametrize("name", ("keys as values", "efficient"))
def test_quantised_weights_and_cache(name: str) -> None:
    model = gemma4(**{**MODELS[name], "final_logit_softcapping": None})
    hfopt.optimize(model, kernels="hfopt", quantization="int8", kv_cache="int8", strict=True)
    options: dict[str, Any] = {"max_new_tokens": 24, "num_beams": 3}
    found = generated(model, **options)
    assert hfopt.explain(model).by_module is None
    with modules_alone(model):
        expected = generated(model, **options)
    assert_same(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


def test_only_the_last_token_of_a_prompt_goes_through_layers_that_store_nothing() -> None:
    model = optimized(gemma4(**MODELS["efficient"]))
    prove(model)
    program = hfopt.explain(model).program
    assert program is not None
    names = [each.name for each in program.instructions]
    first = names.index("take last")
    assert first > max(index for index, name in enumerate(names) if name == "rotate and store")
    assert names[first:].count("attend") == 2 and names[first:].count("rotate") == 2


@pytest.mark.parametrize("path", ("model.layers.2.self_attn", "model.layers.5.self_attn"))
def test_layers_of_both_kinds_read_what_the_other_has_stored(path: str, passes: list[int]) -> None:
    """A hook keeps one layer from kernels: the last one of its kind that stores, or one that reads."""
    model, stock = gemma4(**MODELS["efficient"]), gemma4(**MODELS["efficient"])
    optimized(model)
    model.get_submodule(path).register_forward_hook(lambda module, args, output: None)
    for mode in ("greedy", "beams"):
        passes.clear()
        found = generated(model, MODES[mode], max_new_tokens=30)
        assert passes, "a program knows no hooks"
        expected = generated(stock, MODES[mode], max_new_tokens=30)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(
            torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=2e-4
        )


@pytest.mark.parametrize("has_cache", (True, False))
def test_calls_of_the_model_itself(has_cache: bool) -> None:
    """Logits of all tokens: layers that read are given as many as those that store."""
    stock = gemma4(**MODELS["efficient"])
    model = optimized(gemma4(**MODELS["efficient"]))
    options = {"use_cache": has_cache, "output_hidden_states": True}
    with torch.no_grad():
        found, expected = (each(**prompts(3, 24), **options) for each in (model, stock))
    seen = prompts(3, 24)["attention_mask"] == 1
    for ours, theirs in zip(
        (found.logits, *found.hidden_states), (expected.logits, *expected.hidden_states), strict=True
    ):
        torch.testing.assert_close(ours[seen], theirs[seen], rtol=1e-4, atol=2e-4)


def test_a_second_text_behind_the_first() -> None:
    stock, model = (gemma4(**MODELS["efficient"]) for _ in range(2))
    optimized(model)
    ids = prompts(1, 60)["input_ids"]
    for each in (model, stock):
        cache = IndirectCache(each.config) if each is model else transformers.DynamicCache(config=each.config)
        with torch.no_grad():
            for part in ids.split((30, 20, 1, 9), dim=1):
                each.found = each(part, cache=cache, use_cache=True).logits
    torch.testing.assert_close(model.found, stock.found, rtol=1e-4, atol=2e-4)


def test_a_scalar_that_is_written_is_noticed() -> None:
    model, stock = gemma4(**MODELS["plain"]), gemma4(**MODELS["plain"])
    prove(optimized(model))
    for each in (model, stock):
        each.model.layers[1].layer_scalar.fill_(-0.7)
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(**prompts(), **options), stock.generate(**prompts(), **options))


def test_experts_are_left_to_modules() -> None:
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    model, stock = gemma4(**experts), gemma4(**experts)
    hfopt.optimize(model)
    report = hfopt.explain(model)
    assert report.by_module is not None and report.counts["attention"] == 4
    options = {"max_new_tokens": 30, "do_sample": False}
    assert torch.equal(model.generate(**prompts(), **options), stock.generate(**prompts(), **options))


# ---- the operation underneath -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_new", (1, 5))
def test_attention_of_queries_alone(dtype: torch.dtype, n_new: int) -> None:
    heads = (4, 2, 24)
    qkv = torch.randn(2, 9, 8 * 24).to(dtype)
    appended = IndirectCache().append(0, 2, 9, *heads[1:], dtype)
    functional.rotate_and_store(qkv, None, None, appended, *heads, "none")
    appended, last = appended._replace(n_new=n_new), qkv[:, -n_new:].contiguous()
    mask = Mask("causal" if n_new > 1 else "none")
    expected = functional.attend(last, appended, mask, Scoring(0.2), *heads)
    queries = last[..., : 4 * 24].contiguous()
    assert torch.equal(functional.attend(queries, appended, mask, Scoring(0.2), *heads), expected)
    for width in (4 * 24 - 1, 6 * 24):
        with pytest.raises(InvalidInput, match="qkv"):
            functional.attend(last[..., :width].contiguous(), appended, mask, Scoring(0.2), *heads)
