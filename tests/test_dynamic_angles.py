"""Rotary angles that follow from the length of a text (`rope_type: dynamic`), below and beyond that of training."""

from typing import Any

import pytest
import torch

from tests.generation_cases import Model, llama, needs_programs, one_thread, prompts
from tests.reference import DTYPES
from tests.step_cases import (
    MODES,
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

TRAINED = 24  # tokens; prompts of 9 outgrow them within a request
GREEDY = {"do_sample": False}


def dynamic(**changes: Any) -> Model:
    ropes = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 100.0}
    return llama(**{"max_position_embeddings": TRAINED, "rope_parameters": ropes, **changes})


def logits_of(model: Model, length: int) -> torch.Tensor:
    return torch.stack(generated(model, {**prompts(2, length), **GREEDY}, max_new_tokens=8).logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", (9, TRAINED - 1, TRAINED, TRAINED + 1, TRAINED + 16))
def test_tokens_are_those_of_transformers(length: int, mode: str, passes: list[int]) -> None:
    stock, model = dynamic(), optimized(dynamic())
    passes.clear()
    arguments = {**prompts(3, length), **MODES[mode]}
    found = generated(model, arguments, max_new_tokens=40)
    assert not passes
    expected = generated(stock, arguments, max_new_tokens=40)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ("greedy", "beams"))
def test_the_program_has_the_bits_of_the_modules(dtype: torch.dtype, mode: str, passes: list[int]) -> None:
    model = optimized(dynamic().to(dtype))
    prove(model)
    assert_program_is_the_modules(model, passes, max_new_tokens=40, **MODES[mode])


def test_the_angles_of_a_long_text_matter() -> None:
    """Otherwise nothing here could fail."""
    others = [dynamic(max_position_embeddings=n) for n in (TRAINED, 4 * TRAINED)]
    one, other = (logits_of(each, TRAINED - 4) for each in others)
    assert torch.equal(one[:4], other[:4]) and (one[5:] - other[5:]).abs().max() > 0.1


def test_a_text_that_begins_beyond_is_read_as_by_a_model_that_has_read_nothing(passes: list[int]) -> None:
    """What transformers makes of it depends on the request before: it keeps the angles of the longest text."""
    stock, model = dynamic(), optimized(dynamic())
    fresh = logits_of(stock, TRAINED + 4)
    logits_of(stock, 3 * TRAINED)
    stale = logits_of(stock, TRAINED + 4)
    assert (stale - fresh).abs().max() > 0.1
    passes.clear()
    for length in (TRAINED + 4, 3 * TRAINED, TRAINED + 4):
        found = logits_of(model, length)
    assert not passes
    torch.testing.assert_close(found, fresh, rtol=1e-4, atol=2e-4)
    # a shorter one makes it forget
    logits_of(stock, 9)
    assert torch.equal(logits_of(stock, TRAINED + 4), fresh)


def test_a_program_outlives_what_modules_write_into_their_rotary_module(passes: list[int]) -> None:
    model = optimized(dynamic())
    prove(model)
    with torch.no_grad():
        before = programs_of(model).of(model, 1)
        passes.clear()
        with modules_alone(model):
            logits_of(model, 3 * TRAINED)
        assert passes
        assert programs_of(model).of(model, 1) is before
    stock = dynamic()
    assert torch.equal(
        generated(model, GREEDY, max_new_tokens=30).sequences,
        generated(stock, GREEDY, max_new_tokens=30).sequences,
    )


def test_a_program_that_is_made_behind_a_long_text() -> None:
    """The rehearsal's model has read nothing, whatever the model itself has read."""
    model = dynamic()
    logits_of(model, 3 * TRAINED)
    prove(optimized(model))
    torch.testing.assert_close(
        logits_of(model, TRAINED + 4), logits_of(dynamic(), TRAINED + 4), rtol=1e-4, atol=2e-4
    )
