"""Apertus: an activation whose numbers are trained, and read in place."""

from typing import Any

import pytest
import torch
import transformers

import hfopt
from tests.generation_cases import Model, llama_like, needs_programs, one_thread, prompts
from tests.reference import DTYPES
from tests.step_cases import (
    MODES,
    assert_as_close_as_stock,
    assert_program_is_the_modules,
    generated,
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
        not hasattr(transformers, "ApertusForCausalLM"), reason="this transformers has no Apertus"
    ),
]


def apertus() -> Model:
    model = llama_like(transformers.ApertusForCausalLM, transformers.ApertusConfig)
    for name, each in model.named_parameters():
        if name.endswith(("norm.weight", "alpha_p", "alpha_n")):  # all layers begin with the same
            torch.nn.init.normal_(each, float(each.detach().mean()), 0.3)
    return model.float()


@pytest.mark.parametrize("mode", MODES)
def test_fifty_tokens_are_those_of_transformers(mode: str, passes: list[int]) -> None:
    model = apertus()
    expected = generated(model, MODES[mode], max_new_tokens=50)
    optimized(model)
    passes.clear()
    found = generated(model, MODES[mode], max_new_tokens=50)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=2e-4)
    assert not passes, "modules make none of the steps"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bits_are_as_close_to_float32_as_those_of_transformers(dtype: torch.dtype) -> None:
    assert_as_close_as_stock(apertus(), dtype, prompts(3, 20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_program_has_the_bits_of_the_modules(dtype: torch.dtype, passes: list[int]) -> None:
    model = optimized(apertus().to(dtype))
    prove(model)
    assert_program_is_the_modules(model, passes, max_new_tokens=20, **MODES["beams"])


def test_numbers_that_are_written_in_place(passes: list[int]) -> None:
    model, stock = apertus(), apertus()
    prove(optimized(model))
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    before = generated(model, options).logits
    for each in (model, stock):
        each.model.layers[1].mlp.act_fn.alpha_p.data.fill_(1.7)
    passes.clear()
    found = generated(model, options)
    assert not passes
    assert not torch.equal(found.logits[0], before[0])
    expected = generated(stock, options)
    assert torch.equal(found.sequences, expected.sequences)


def test_quantised_weights() -> None:
    model = apertus()
    hfopt.optimize(model, quantization="int8", strict=True)
    assert hfopt.explain(model).by_module is None
