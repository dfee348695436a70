"""What somebody changes in decoders after `optimize` counts, or sends them to transformers' own code."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hfopt
from tests.decoders import made
from tests.generation_cases import Model, needs_programs, one_thread
from tests.model_types import prompts

pytestmark = [pytest.mark.usefixtures(one_thread.__name__), needs_programs]


def scaled_angles(model: Model) -> None:
    """By a norm behind the rotation this changes nothing, by one before it all."""
    model.model.rotary_emb.attention_scaling = 1.7


def other_factor(model: Model) -> None:
    """Which Falcon reads with masks that are added alone."""
    for layer in model.transformer.h:
        layer.self_attention.inv_norm_factor *= 2


def sinks_of(numbers: Callable[[], torch.Tensor]) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        for layer in model.model.layers:
            layer.self_attn.sinks.data = numbers()

    return change


CHANGES: dict[str, tuple[str, Callable[[Model], None]]] = {
    "angles, norm behind": ("nanochat", scaled_angles),
    "angles, norm before": ("qwen3", scaled_angles),
    "factor": ("falcon-7b", other_factor),
    "sinks": ("granite-swa", sinks_of(lambda: torch.linspace(-3, 3, 4))),
    "sinks, strided": ("granite-swa", sinks_of(lambda: torch.linspace(-3, 3, 8)[::2])),
    "sinks, one for all": ("granite-swa", sinks_of(lambda: torch.tensor([2.0]))),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_optimize(change: str) -> None:
    name, apply = CHANGES[change]
    stock = made(name)
    model = hfopt.optimize(copy.deepcopy(stock), kernels="hfopt", strict=True)
    request: dict[str, Any] = {**prompts(), "max_new_tokens": 20, "do_sample": False}
    outputs = {"return_dict_in_generate": True, "output_logits": True}
    for each in (stock, model):
        each.generate(**request)
        apply(each)
    expected, found = (each.generate(**request, **outputs) for each in (stock, model))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=2e-4)
