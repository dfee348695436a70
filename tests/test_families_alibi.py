"""Decoders whose scores know distances: ALiBi (BLOOM, MPT, Falcon), windows in a cache that holds everything (GPT-Neo)."""

import itertools
import re
from typing import Any

import pytest
import torch
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.mpt import modeling_mpt

import hfopt
from hfopt.cache import IndirectCache
from hfopt.errors import InvalidInput
from hfopt.functional import Mask
from hfopt.patches.slopes import bias_of, is_bias_of, ranked_bias_of, slopes_of
from tests.generation_cases import (
    CACHE,
    DISTANT,
    VOCABULARY,
    assert_same,
    bloom,
    falcon_alibi,
    gpt_neo,
    mpt,
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
    programs_of,
    prove,
    rehearsals,
)

__all__ = ["passes", "rehearsals"]  # fixtures

pytestmark = [pytest.mark.usefixtures(one_thread.__name__), needs_programs]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("name", "mode"), list(itertools.product(DISTANT, MODES)))
def test_fifty_tokens_are_those_of_transformers(name: str, mode: str, passes: list[int]) -> None:
    model = DISTANT[name]()
    expected = generated(model, MODES[mode], max_new_tokens=50)
    optimized(model)
    passes.clear()
    found = generated(model, MODES[mode], max_new_tokens=50)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=2e-4)
    assert not passes
    with modules_alone(model):
        found = generated(model, MODES[mode], max_new_tokens=50)
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", DISTANT)
def test_16_bits_are_as_close_to_float32_as_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    assert_as_close_as_stock(DISTANT[name](), dtype, prompts(3, 20))


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("name", "dtype", "mode"), pairs_of(DISTANT, DTYPES, MODES))
def test_the_program_has_the_bits_of_the_modules(
    name: str, dtype: torch.dtype, mode: str, passes: list[int]
) -> None:
    model = optimized(DISTANT[name]().to(dtype))
    prove(model)
    assert_program_is_the_modules(model, passes, max_new_tokens=40, **MODES[mode])


@pytest.mark.parametrize("name", DISTANT)
def test_all_parts_are_swapped_and_given_back(name: str) -> None:
    model, stock = DISTANT[name](), DISTANT[name]()
    before = {path: type(module) for path, module in model.named_modules()}
    hfopt.optimize(model, strict=True)
    report = hfopt.explain(model)
    assert report.by_module is None and report.program is not None and not report.idle
    assert report.counts["layer"] == report.counts["attention"] == report.counts["mlp"] == 2
    hfopt.restore(model)
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert_same(generated(model, max_new_tokens=6).sequences, generated(stock, max_new_tokens=6).sequences)


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTANT)
def test_masks_that_hide_keys_in_the_middle(name: str, passes: list[int]) -> None:
    """BLOOM and Falcon do not count them, MPT does; a program whose scores count columns leaves such texts to modules."""
    model, stock = optimized(DISTANT[name]()), DISTANT[name]()
    given = prompts()
    given["attention_mask"][0, 3:5] = 0
    given["attention_mask"][2, -1] = 0
    passes.clear()
    for mode in ("greedy", "beams"):
        options = {**given, **MODES[mode], "max_new_tokens": 12}
        found, expected = generated(model, options), generated(stock, options)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(
            torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=2e-4
        )
    n_calls = len(passes) - 2 * 12  # of the stock model
    assert n_calls == (0 if name == "gpt_neo" else 2 * 12)


@pytest.mark.parametrize("name", DISTANT)
def test_a_text_in_parts_and_without_a_mask(name: str) -> None:
    model, stock = optimized(DISTANT[name]()), DISTANT[name]()
    ids = prompts(2, 40)["input_ids"]
    with torch.no_grad():
        expected = stock(ids).logits
        cache = IndirectCache(model.config)
        found = [
            model(each, **{CACHE: cache}, use_cache=True).logits for each in ids.split((17, 1, 15, 7), 1)
        ]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=2e-4)


# ---- ALiBi ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8, 12, 16, 25, 112])
def test_slopes_are_those_of_both_models(n_heads: int) -> None:
    ours = slopes_of(n_heads)
    assert ours.dtype is torch.float32
    theirs = modeling_bloom._get_alibi_slopes(n_heads, torch.device("cpu"))
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    bias = modeling_mpt.build_mpt_alibi_tensor(n_heads, 40)
    torch.testing.assert_close(bias_of(n_heads, 40, torch.float32), bias, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_heads", [6, 16])
def test_a_bias_is_recognised_by_its_numbers(n_heads: int, dtype: torch.dtype) -> None:
    seen = torch.ones(2, 700, dtype=torch.long)
    seen[1, :30] = 0
    mask = Mask("bytes", seen[:, None].to(torch.uint8).contiguous().numpy())
    sizes = 2, 1, 700
    bias = modeling_bloom.build_alibi_tensor(seen, n_heads, dtype)
    assert is_bias_of(bias, n_heads, mask, sizes)
    longer = modeling_mpt.build_mpt_alibi_tensor(n_heads, 900)
    assert is_bias_of(longer, n_heads, mask, sizes)
    for wrong in (
        1.05 * bias,
        bias[:-1],
        bias.flip(0),
        -bias,
        bias[..., :699],
        bias[None],
        None,
        bias.long(),
    ):
        assert not is_bias_of(wrong, n_heads, mask, sizes)
    moved = bias.clone()
    moved[n_heads, 0, 600:690] *= 1.03
    assert not is_bias_of(moved, n_heads, mask, sizes)
    hidden = bias.clone()
    hidden[n_heads:, :, :30] = 3.0
    assert is_bias_of(hidden, n_heads, mask, sizes)


@pytest.mark.parametrize("model_of", [bloom, mpt], ids=["bloom", "mpt"])
def test_another_bias_is_left_to_the_model(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stock = model_of(), model_of()
    optimized(model)
    for each in (model, stock):
        inner = each.transformer
        name = "build_alibi_tensor" if model_of is bloom else "build_mpt_alibi_tensor"
        build = getattr(inner, name)
        monkeypatch.setattr(inner, name, lambda *args, b=build, **more: 2 * b(*args, **more))
    found, expected = generated(model, max_new_tokens=12), generated(stock, max_new_tokens=12)
    assert torch.equal(found.sequences, expected.sequences)
    assert not torch.equal(expected.sequences, generated(model_of(), max_new_tokens=12).sequences)


# ---- Falcon, which counts keys in bfloat16 --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_heads", [1, 6, 32, 71, 112])
def test_counts_are_those_of_falcon(n_heads: int, dtype: torch.dtype) -> None:
    seen = torch.ones(2, 700, dtype=torch.long)
    seen[1, :30] = 0
    theirs = modeling_falcon.build_alibi_tensor(seen, n_heads, dtype).view(2, n_heads, 1, 700)
    assert torch.equal(ranked_bias_of(n_heads, seen != 0, dtype), theirs)


_NEW = {"new_decoder_architecture": True, "num_kv_heads": 2, "parallel_attn": True}
FALCONS: dict[str, dict[str, Any]] = {
    "one key head": {"multi_query": True, "parallel_attn": True},
    "eager": {"attn_implementation": "eager"},
    "groups": {**_NEW, "num_attention_heads": 8},
    "groups, eager": {**_NEW, "attn_implementation": "eager"},
    "six heads": {"hidden_size": 96, "num_attention_heads": 6, "num_kv_heads": 6},
}
LONG: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "parts": {"prefill_chunk_size": 64},
    "lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("name", "mode"), pairs_of(FALCONS, LONG))
def test_more_tokens_than_bfloat16_counts_one_by_one(name: str, mode: str, passes: list[int]) -> None:
    model, stock = optimized(falcon_alibi(**FALCONS[name])), falcon_alibi(**FALCONS[name])
    seen = torch.ones(1 if mode == "lookup" else 3, 300, dtype=torch.long)
    for row, n_padded in enumerate((0, 5, 290)[: len(seen)]):
        seen[row, :n_padded] = 0
    ids = torch.randint(3, VOCABULARY, seen.shape, generator=torch.Generator().manual_seed(2))
    given = {"input_ids": ids * seen, "attention_mask": seen, "output_logits": mode != "lookup"}
    passes.clear()
    found = generated(model, given, **LONG[mode], max_new_tokens=24, do_sample=False)
    assert mode != "beams" or not passes
    expected = generated(stock, given, **LONG[mode], max_new_tokens=24, do_sample=False)
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_16_bits_of_many_tokens(kind: str, dtype: torch.dtype) -> None:
    model = falcon_alibi(attn_implementation=kind)
    seen = torch.ones(2, 400, dtype=torch.long)
    seen[1, :30] = 0
    ids = torch.randint(3, VOCABULARY, seen.shape, generator=torch.Generator().manual_seed(2))
    assert_as_close_as_stock(model, dtype, {"input_ids": ids, "attention_mask": seen})


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float32, torch.float16], ids=str)
def test_masks_of_other_dtypes(dtype: torch.dtype, passes: list[int]) -> None:
    """Those of floating point are rounded in other places, or in more."""
    model, stock = optimized(falcon_alibi()), falcon_alibi()
    seen = torch.ones(2, 320)
    seen[1, :9] = 0
    ids = torch.randint(3, VOCABULARY, seen.shape, generator=torch.Generator().manual_seed(2))
    given = {"input_ids": ids, "attention_mask": seen.to(dtype), "max_new_tokens": 6}
    passes.clear()
    found = generated(model, given)
    assert bool(passes) == dtype.is_floating_point
    expected = generated(stock, given)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=2e-4)


def test_another_count_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    before, build = generated(falcon_alibi(), max_new_tokens=12), modeling_falcon.build_alibi_tensor
    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", lambda *args, **more: 2 * build(*args, **more))
    model, stock = optimized(falcon_alibi()), falcon_alibi()
    found, expected = generated(model, max_new_tokens=12), generated(stock, max_new_tokens=12)
    assert torch.equal(found.sequences, expected.sequences)
    assert not torch.equal(expected.sequences, before.sequences)


@pytest.mark.parametrize("n_heads", [1, 4])
def test_a_layer_that_is_given_something_else(n_heads: int) -> None:
    """Sdpa reads no bias but that in the mask, which may have one for all heads, or be none."""
    sizes = {"num_attention_heads": n_heads, "num_kv_heads": n_heads}
    model, stock = optimized(falcon_alibi(**sizes)), falcon_alibi(**sizes)
    hidden, seen = torch.randn(2, 5, 64), torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    bias = ranked_bias_of(n_heads, torch.ones(2, 5, dtype=torch.bool), torch.float32)
    zeros = torch.zeros(2, n_heads, 5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (None, seen, zeros, zeros[:, :1], zeros + bias, zeros + 0.5 * bias.flip(-1)):
        with torch.no_grad():
            ours, theirs = (
                each.transformer.h[0].self_attention(hidden, alibi=bias, attention_mask=mask)[0]
                for each in (model, stock)
            )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_another_attention_than_the_proven_one() -> None:
    """Eager attention adds the bias twice, and nobody has tried it."""
    model, stock = optimized(falcon_alibi()), falcon_alibi()
    before = generated(model, max_new_tokens=12)
    for each in (model, stock):
        each.config._attn_implementation = "eager"
    found, expected = generated(model, max_new_tokens=12), generated(stock, max_new_tokens=12)
    assert_same(found.sequences, expected.sequences)
    assert not torch.equal(found.logits[0], before.logits[0])
    with torch.no_grad():
        assert programs_of(model).of(model, 1) is None


def test_an_angle_in_the_place_of_the_bias() -> None:
    """The decoder gives its layers what its attribute says now."""
    model, stock = optimized(falcon_alibi()), falcon_alibi()
    for each in (model, stock):
        each.transformer.use_alibi = False
    found, expected = generated(model, max_new_tokens=12), generated(stock, max_new_tokens=12)
    assert_same(found.sequences, expected.sequences)


def test_more_keys_than_mpt_has_a_bias_for(passes: list[int]) -> None:
    model, stock = optimized(mpt(max_seq_len=30)), mpt(max_seq_len=30)
    options: dict[str, Any] = {"max_new_tokens": 30 - 9 + 1, "do_sample": False}
    passes.clear()
    found = generated(model, options)
    assert not passes
    assert torch.equal(found.sequences, generated(stock, options).sequences)
    options["max_new_tokens"] += 1
    with pytest.raises(RuntimeError) as theirs:
        generated(stock, options)
    with pytest.raises(RuntimeError, match=re.escape(str(theirs.value))):
        generated(model, options)


# ---- windows of GPT-Neo ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 9, 10, 33, 95, 96, 200])
def test_windows_of_any_size(window: int, passes: list[int]) -> None:
    model, stock = optimized(gpt_neo(window_size=window)), gpt_neo(window_size=window)
    passes.clear()
    found = generated(model, max_new_tokens=40, num_beams=2)
    assert not passes
    expected = generated(stock, max_new_tokens=40, num_beams=2)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=2e-4)


def test_a_buffer_that_is_written_to_is_read_again() -> None:
    model, stock = optimized(gpt_neo()), gpt_neo()
    before = generated(model, max_new_tokens=12).sequences
    for each in (model, stock):
        band = each.transformer.h[1].attn.attention.bias
        band.copy_(torch.ones_like(band).tril().triu(-2))
    found = generated(model, max_new_tokens=12).sequences
    assert torch.equal(found, generated(stock, max_new_tokens=12).sequences)
    assert not torch.equal(found, before)
    for each in (model, stock):
        each.transformer.h[1].attn.attention.bias[..., 5] = False
    assert torch.equal(
        generated(model, max_new_tokens=12).sequences, generated(stock, max_new_tokens=12).sequences
    )
    with torch.no_grad():
        assert programs_of(model).of(model, 1) is None


def test_positions_beyond_the_table() -> None:
    model = optimized(gpt_neo())
    with pytest.raises(InvalidInput, match="position 96"):
        generated(model, max_new_tokens=96)


def test_a_hook_on_what_is_around_attention_is_called() -> None:
    model = optimized(gpt_neo())
    expected = generated(model, max_new_tokens=4)
    seen: list[int] = []
    model.transformer.h[1].attn.register_forward_hook(lambda *_: seen.append(1))
    assert_same(generated(model, max_new_tokens=4).sequences, expected.sequences)
    assert len(seen) == 4
