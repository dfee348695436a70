"""LoRA adapters of peft keep the program: the tokens are those of peft's own layers, in every mode, however adapters are
switched, and prompts and steps go through no module.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hfopt
from hfopt import host
from tests.generation_cases import (
    Model,
    gptj,
    llama,
    needs_programs,
    one_thread,
    opt,
    phi3,
    prompts,
)
from tests.model_types import tiny

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.usefixtures(one_thread.__name__),
    needs_programs,
    # peft asks transformers for it
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*merged:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multiple adapters:UserWarning"),
]

MODELS: dict[str, Callable[[], Model]] = {
    "llama": llama,
    "gptj": gptj,
    "opt": opt,
    "phi3": phi3,
    "gpt_neox": lambda: tiny("gpt_neox"),
    "gpt2": lambda: tiny("gpt2"),
}
BASE = host.NO_ADAPTER
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 4},
    "named rows": {"adapter_names": ["red", BASE, "blue"]},
    "named beams": {"num_beams": 4, "adapter_names": ["blue", "red", BASE]},
}


def config(rank: int = 4, **options: Any) -> Any:
    # OPT has Linears around its layers, too
    around = ["project_in", "project_out"]
    given = {
        "target_modules": "all-linear",
        "exclude_modules": around,
        "init_lora_weights": False,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
    }
    return peft.LoraConfig(r=rank, **{**given, **options})


def with_adapters(model: Model, **options: Any) -> Any:
    """The model with adapters "red" around all Linears of its layers, and "blue" of a rank that is no power of two."""
    torch.manual_seed(9)
    adapted = peft.get_peft_model(model, config(**options), "red")
    adapted.add_adapter("blue", config(rank=21, **options))
    return adapted.eval()


def pair(family: str = "llama", **options: Any) -> tuple[Any, Any]:
    """(optimized, stock) with the same adapters."""
    return hfopt.optimize(with_adapters(MODELS[family](), **options), kernels="hfopt"), with_adapters(
        MODELS[family](), **options
    )


def base_of(model: Any) -> Model:
    return next(each for each in model.modules() if isinstance(each, PreTrainedModel))


def tokens(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(5)
    given = prompts()
    given["input_ids"] = given["input_ids"] % base_of(model).config.vocab_size
    found: Tensor = model.generate(**given, **{"max_new_tokens": 8, "do_sample": False, **options})
    return found


def assert_program_gives_the_same(ours: Any, stock: Any, **options: Any) -> None:
    """The tokens of stock's own modules, without a call of ours."""
    expected = tokens(stock, **options)
    assert torch.equal(tokens(ours, **options), expected)  # the first time may rehearse
    with no_calls(ours):
        assert torch.equal(tokens(ours, **options), expected)


@contextlib.contextmanager
def no_calls(model: Any) -> Iterator[None]:
    """Within, no module of the model's layers may be called."""

    def called(*args: Any) -> None:
        raise AssertionError("a module was called")

    # found by the watch, were it a hook of the model: the embedding's class is asked instead
    embedding = base_of(model).get_input_embeddings()
    kind: Any = type(embedding)
    forward = kind.forward
    kind.forward = lambda self, *args: called() if self is embedding else forward(self, *args)
    try:
        yield
    finally:
        kind.forward = forward


@pytest.mark.parametrize("family", MODELS)
def test_all_modes(family: str) -> None:
    ours, stock = pair(family)
    assert hfopt.explain(ours).by_module is None and not hfopt.explain(ours).idle
    # OPT lays rows and tokens together, which peft cannot tell the adapters of any more
    modes = {name: each for name, each in MODES.items() if family != "opt" or "adapter_names" not in each}
    for options in modes.values():
        assert_program_gives_the_same(ours, stock, **options)
    for model in (ours, stock):
        model.set_adapter("blue")
    assert_program_gives_the_same(ours, stock)
    for model in (ours, stock):
        model.base_model.set_adapter(["red", "blue"])
    assert_program_gives_the_same(ours, stock)
    with ours.disable_adapter(), stock.disable_adapter():
        assert_program_gives_the_same(ours, stock)
        assert_program_gives_the_same(ours, stock, **MODES["beams"])
    assert_program_gives_the_same(ours.unload(), stock.unload())
