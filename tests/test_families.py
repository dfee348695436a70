"""The families whose whole decoder is a program, relatives of Llama: tokens, errors, formats, and the way there and back."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hfopt
from tests.generation_cases import (
    LONG,
    RELATIVES,
    Model,
    assert_same,
    needs_programs,
    one_thread,
    phi3,
    phi4_mini,
    prompts,
    qwen3,
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

pytestmark = [pytest.mark.usefixtures(one_thread.__name__), needs_programs]

MODELS: dict[str, Callable[..., Model]] = {**RELATIVES, "phi4-mini": phi4_mini}
FORMATS = ("int8", "int4", "nf4")
# 4-bit formats need groups that divide what a row has
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("name", "mode"), list(itertools.product(MODELS, MODES)))
def test_fifty_tokens_are_those_of_transformers(name: str, mode: str, passes: list[int]) -> None:
    model = MODELS[name]()
    expected = generated(model, MODES[mode], max_new_tokens=50)
    optimized(model)
    passes.clear()
    found = generated(model, MODES[mode], max_new_tokens=50)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=2e-4)
    # modules make none of the steps, but for the text that Phi-4-mini reads anew where its angles change
    assert all(n_tokens > LONG for n_tokens in passes) if name == "phi4-mini" else not passes


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_16_bits_are_as_close_to_float32_as_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    assert_as_close_as_stock(MODELS[name](), dtype, prompts(3, 20))


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("name", "dtype", "mode"), pairs_of(MODELS, DTYPES, MODES))
def test_the_program_has_the_bits_of_the_modules(
    name: str, dtype: torch.dtype, mode: str, passes: list[int]
) -> None:
    model = optimized(
        MODELS[name](**({"original_max_position_embeddings": 96} if "mini" in name else {})).to(dtype)
    )
    prove(model)
    assert_program_is_the_modules(model, passes, max_new_tokens=40, **MODES[mode])


@pytest.mark.parametrize(
    ("name", "dtype", "quantization", "kv_cache"), pairs_of(MODELS, DTYPES, FORMATS, [None, "int8"])
)
def test_quantised_weights_and_cache(
    name: str, dtype: torch.dtype, quantization: str, kv_cache: str | None
) -> None:
    model = MODELS[name](**WIDE).to(dtype)
    hfopt.optimize(model, kernels="hfopt", quantization=quantization, kv_cache=kv_cache, strict=True)
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 3}
    found = generated(model, **options)
    with modules_alone(model):
        expected = generated(model, **options)
    assert_same(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    model, stock = MODELS[name](), MODELS[name]()
    before = {path: type(module) for path, module in model.named_modules()}
    hfopt.optimize(model, strict=True)
    report = hfopt.explain(model)
    assert report.by_module is None and report.program is not None and not report.idle
    assert report.counts["layer"] == report.counts["attention"] == report.counts["mlp"] == 2
    hfopt.restore(model)
    assert {path: type(module) for path, module in model.named_modules()} == before
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**prompts(), **options), stock.generate(**prompts(), **options))
    hfopt.optimize(model, quantization="int8")
    expected = model.generate(**prompts(), **options)
    hfopt.save(model, tmp_path)
    loaded: Model = hfopt.load(tmp_path)
    assert torch.equal(loaded.generate(**prompts(), **options), expected)


# ---- what is their own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_angles_that_change_within_a_request(mode: str) -> None:
    """Behind the prompt of 9 tokens, a text of 24 tokens gets other angles, and is read anew."""
    model, stock = phi4_mini(), phi4_mini()
    hfopt.optimize(model, strict=True)
    for length in (LONG - 2, LONG - 1, LONG, LONG + 1, LONG + 3):
        arguments = {**prompts(3, length), **MODES[mode], "max_new_tokens": 5}
        torch.manual_seed(0)
        expected = stock.generate(**arguments)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**arguments), expected)


def test_a_window_that_is_reached(passes: list[int]) -> None:
    """Requests that end beyond the window go by program as those that do not."""
    model, stock = phi3(sliding_window=24), phi3(sliding_window=24)
    optimized(model)
    for max_new_tokens in (15, 16, 40):
        passes.clear()
        arguments: dict[str, Any] = {**prompts(3, 9), "max_new_tokens": max_new_tokens, "do_sample": False}
        found = model.generate(**arguments)
        assert not passes
        assert torch.equal(found, stock.generate(**arguments))


def test_a_cache_that_grows_beyond_the_window() -> None:
    model, stock = phi3(sliding_window=24), phi3(sliding_window=24)
    optimized(model)
    ids = prompts(1, 9)["input_ids"]
    options = {"max_new_tokens": 15, "do_sample": False, "return_dict_in_generate": True}
    for each in (model, stock):
        first = each.generate(ids, **options)
        cache = next(value for value in first.values() if hasattr(value, "get_seq_length"))
        name = next(key for key, value in first.items() if value is cache)
        more = torch.cat([first.sequences, ids[:, :4]], dim=1)
        each.found = each.generate(more, **{name if name != "cache" else "cache": cache}, **options).sequences
    assert torch.equal(model.found, stock.found)


def test_a_norm_of_heads_that_does_more_is_left_alone() -> None:
    model, stock = qwen3(), qwen3()
    for each in (model, stock):
        norm = each.model.layers[1].self_attn.k_norm
        norm.register_forward_hook(lambda module, args, output: 2 * output)
    hfopt.optimize(model)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**prompts(), **options), stock.generate(**prompts(), **options))
    assert "k_norm" in str(hfopt.explain(model).by_module)
