"""BART and its relatives: decoders whose positions are those of columns, and that attend to another text if there is one."""

import copy
from typing import Any

import pytest
import torch

import hfopt
from hfopt.errors import InvalidInput
from tests.generation_cases import Model, assert_same, needs_programs, one_thread
from tests.model_types import POSITIONS, prompts, tiny
from tests.step_cases import optimized

pytestmark = [pytest.mark.usefixtures(one_thread.__name__), needs_programs]

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


def pair(name: str, **fields: Any) -> tuple[Model, Model]:
    """(a model as it is, the same optimized)."""
    stock = tiny(name, **fields)
    model = optimized(copy.deepcopy(stock))
    assert hfopt.explain(model).by_module is None
    return stock, model


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("bart", "encoder_hidden_states"),
        ("pegasus", "encoder_hidden_states"),
        ("trocr", "encoder_hidden_states"),
        ("whisper", "encoder_outputs"),
    ],
)
def test_another_text_is_attended_to(name: str, argument: str) -> None:
    stock, model = pair(name)
    torch.manual_seed(3)
    alone = prompts()
    given = {**alone, argument: torch.randn(len(alone["input_ids"]), 7, 64)}
    with torch.no_grad():
        expected = stock(**given).logits
        assert not torch.allclose(expected, stock(**alone).logits, atol=0.1)
        torch.testing.assert_close(model(**given).logits, expected, rtol=1e-4, atol=2e-4)
    given = {key: each[:1] for key, each in given.items()}  # the row without padding
    theirs, ours = (each.generate(**given, **GREEDY) for each in (stock, model))
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["bart", "mbart", "trocr"])
def test_scaled_embeddings(name: str) -> None:
    stock, model = pair(name, scale_embedding=True)
    assert_same(model.generate(**prompts(), **GREEDY), stock.generate(**prompts(), **GREEDY))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_text_begins_behind_a_cache(num_beams: int) -> None:
    stock, model = pair("bart")
    ids = prompts()["input_ids"][:1]
    expected = stock.generate(ids, **GREEDY, num_beams=num_beams)
    cache = hfopt.IndirectCache(model.config)
    with torch.no_grad():
        model(ids[:, :5], cache=cache, use_cache=True)
    found = (
        model.generate(ids, cache=cache, **GREEDY)
        if num_beams == 1
        else model.generate(ids, **GREEDY, num_beams=3)
    )
    assert_same(found, expected)


def test_the_last_position() -> None:
    """A text ends with the table, and not before."""
    stock, model = pair("bart")
    ids = torch.arange(2, 12)[None]
    options = {"do_sample": False, "eos_token_id": None}
    expected = stock.generate(ids, max_length=POSITIONS + 1, **options)
    assert_same(model.generate(ids, max_length=POSITIONS + 1, **options), expected)
    with pytest.raises(InvalidInput, match=f"position {POSITIONS}"):
        model.generate(ids, max_length=POSITIONS + 2, **options)


def test_sinusoidal_positions_that_depend_on_tokens_stay_with_modules() -> None:
    stock = tiny("trocr", use_learned_position_embeddings=False)
    model = optimized(copy.deepcopy(stock))
    by_module = hfopt.explain(model).by_module
    assert by_module is not None and "TrOCRSinusoidalPositionalEmbedding" in by_module
    assert_same(model.generate(**prompts(), **GREEDY), stock.generate(**prompts(), **GREEDY))


def test_attention_that_is_causal_by_its_mask_alone() -> None:
    """BigBird-Pegasus says `is_causal=False`, and hands a mask down even where nothing is hidden."""
    stock, model = pair("bigbird_pegasus")
    ids = prompts()["input_ids"][:1]
    assert stock.model.decoder.layers[0].self_attn.is_causal is False
    assert_same(model.generate(ids, **GREEDY), stock.generate(ids, **GREEDY))
    attention = model.model.decoder.layers[0].self_attn
    x = torch.randn(1, 5, 64)
    with torch.no_grad():
        expected = stock.model.decoder.layers[0].self_attn(x)[0]
        torch.testing.assert_close(attention(x)[0], expected, rtol=1e-4, atol=1e-5)
