"""Models with windows in some or all layers: requests of any length go by program, with the tokens of transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

import hfopt
from hfopt.cache import IndirectCache
from hfopt.kernels.attention.attend import ATTEND
from hfopt.kernels.instruction import OP, OWN
from hfopt.kernels.step import INSTRUCTIONS
from hfopt.program import rehearsal
from tests.generation_cases import (
    CACHE,
    Model,
    assert_same,
    cache_of,
    llama_like,
    mistral,
    needs_programs,
    one_thread,
    phi3,
    prompts,
    qwen2,
    qwen3,
)
from tests.pairs import pairs_of
from tests.step_cases import (
    MODES,
    assert_program_is_the_modules,
    generated,
    optimized,
    passes,
    programs_of,
    prove,
    rehearsals,
)

__all__ = ["passes", "rehearsals"]  # fixtures

pytestmark = [pytest.mark.usefixtures(one_thread.__name__), needs_programs]

WINDOW = 8
_MIXED = {"use_sliding_window": True, "num_hidden_layers": 4, "max_window_layers": 2}


def gemma2(**changes: Any) -> Model:
    sizes = {"head_dim": 24, "num_hidden_layers": 4, "query_pre_attn_scalar": 24}
    return llama_like(Gemma2ForCausalLM, Gemma2Config, **{**sizes, **changes})


def gemma3(**changes: Any) -> Model:
    """Five layers of a window before one without, and angles of their own."""
    sizes = {"head_dim": 24, "num_hidden_layers": 7, "query_pre_attn_scalar": 24}
    return llama_like(Gemma3ForCausalLM, Gemma3TextConfig, **{**sizes, **changes})


MODELS: dict[str, Callable[..., Model]] = {
    "mistral": mistral,
    "phi3": phi3,
    "qwen2, mixed": lambda **changes: qwen2(**_MIXED, **changes),
    "qwen3, mixed": lambda **changes: qwen3(**_MIXED, **changes),
    "gemma2": gemma2,
    "gemma3": gemma3,
}
LENGTHS = {"longer than the window": 30, "shorter": 4}


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("name", "mode", "length"), pairs_of(MODELS, MODES, LENGTHS))
def test_sixty_tokens_are_those_of_transformers(name: str, mode: str, length: str, passes: list[int]) -> None:
    """Rows are padded on the left by more than a window."""
    model = MODELS[name](sliding_window=WINDOW)
    arguments = {**prompts(4, LENGTHS[length]), **MODES[mode], "max_new_tokens": 60}
    expected = generated(model, arguments)
    optimized(model)
    passes.clear()
    found = generated(model, arguments)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=3e-4)
    assert not passes and type(cache_of(found)) is IndirectCache


@pytest.mark.parametrize(
    ("name", "dtype", "mode", "kv_cache"),
    pairs_of(MODELS, (torch.float32, torch.bfloat16), MODES, (None, "int8")),
)
@pytest.mark.thinned(3)
def test_the_program_has_the_bits_of_the_modules(
    name: str, dtype: torch.dtype, mode: str, kv_cache: str | None, passes: list[int]
) -> None:
    # the last softcap is torch's in modules
    changes: dict[str, Any] = {"final_logit_softcapping": None} if name == "gemma2" else {}
    model = MODELS[name](sliding_window=WINDOW, **changes).to(dtype)
    hfopt.optimize(model, kernels="hfopt", kv_cache=kv_cache)
    prove(model)
    arguments = {**prompts(4, 30), **MODES[mode], "max_new_tokens": 50}
    assert_program_is_the_modules(model, passes, **arguments)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_chunks(name: str) -> None:
    """Each of which sees a window of those before it."""
    model = MODELS[name](sliding_window=WINDOW)
    for chunk in (1, 5, 20):
        arguments = {**prompts(3, 43), "prefill_chunk_size": chunk, "max_new_tokens": 12}
        expected = generated(MODELS[name](sliding_window=WINDOW), arguments)
        assert_same(generated(optimized(model), arguments).sequences, expected.sequences)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_lookup_takes_tokens_back(name: str) -> None:
    model, stock = (MODELS[name](sliding_window=WINDOW) for _ in range(2))
    optimized(model)
    ids = prompts(1, 12)["input_ids"].repeat(1, 4)
    options = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 50, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))


@pytest.mark.parametrize("name", MODELS)
def test_a_text_that_goes_on(name: str) -> None:
    """With the cache of the request before."""
    model, stock = (MODELS[name](sliding_window=WINDOW) for _ in range(2))
    optimized(model)
    ids, found = prompts(1, 40)["input_ids"], []
    for each in (model, stock):
        options = {"max_new_tokens": 15, "do_sample": False, "return_dict_in_generate": True}
        first = each.generate(ids[:, :9], **options)
        more = torch.cat([first.sequences, ids[:, 9:]], dim=1)
        found.append(each.generate(more, **{CACHE: cache_of(first)}, **options).sequences)
    assert torch.equal(*found)


def test_a_cache_that_a_user_gives_for_less() -> None:
    """A layer that has been made for texts within the window holds all that come."""
    model, stock = (mistral(sliding_window=WINDOW) for _ in range(2))
    optimized(model)
    given = IndirectCache(model.config, max_length=WINDOW)
    options = {**prompts(1, 20), "max_new_tokens": 30, "do_sample": False}
    assert torch.equal(model.generate(**options, **{CACHE: given}), stock.generate(**options))
    assert not any(given.is_sliding) and given.layers[0].keys.shape[2] == 49


@pytest.mark.thinned(2)
@pytest.mark.parametrize("window", [2, 3, 63, 64, 200])
def test_other_windows(window: int, passes: list[int]) -> None:
    model = qwen2(**_MIXED, sliding_window=window)
    arguments = {**prompts(2, 150), "max_new_tokens": 60, "num_beams": 2}
    expected = generated(model, arguments)
    optimized(model)
    passes.clear()
    assert torch.equal(generated(model, arguments).sequences, expected.sequences)
    assert not passes


# ---- what is rehearsed -----------------------------------------------------------------------------------------------


@pytest.mark.thinned(3)
@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("window", [WINDOW, 100, 5000])
@pytest.mark.parametrize("name", MODELS)
def test_a_program_of_another_window_is_refused(
    name: str, window: int, change: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it is, and in whichever layers."""
    model = optimized(MODELS[name](sliding_window=window, max_position_embeddings=8192))
    prove(model)
    build = rehearsal.build

    def changed(program: Any) -> Any:
        return program._replace(code=_with_another_window(program.code, window, window + change))

    with torch.no_grad():
        program: Any = programs_of(model).of(model, 1)
        monkeypatch.setattr(rehearsal, "build", lambda model: changed(build(model)))
        assert rehearsal.difference(model, changed(program)) is not None


def _with_another_window(code: Any, window: int, other: int) -> Any:
    """In the last layer of this one."""
    code, column = code.copy(), OWN + ATTEND.columns.index("window")
    rows = (code[:, OP] == INSTRUCTIONS.index(ATTEND)) & (code[:, column] == window)
    code[rows.nonzero()[0][-1], column] = other
    return code


def test_what_the_listing_says() -> None:
    model = optimized(gemma2(sliding_window=WINDOW))
    prove(model)
    text = str(hfopt.explain(model))
    assert f"layers of a window of {WINDOW} tokens cache little more than those" in text
    with torch.no_grad():
        program: Any = programs_of(model).of(model, 1)
    assert f"window {WINDOW}" in str(program.listing)
    lines = [each for each in program.listing.instructions if each.token_bytes]
    assert [each.cached_bytes(100) // each.token_bytes for each in lines] == [WINDOW, 100] * 2


def test_memory_of_a_long_text_is_that_of_the_window() -> None:
    model = optimized(mistral(sliding_window=WINDOW))
    for n_new in (2, 500):
        found = generated(model, {**prompts(1, 200), "max_new_tokens": n_new, "do_sample": False})
        layers = cache_of(found).layers
        assert all(layer.prefix.shape[3] <= 192 and layer.suffix.shape[3] == 0 for layer in layers)
