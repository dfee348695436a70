"""Decoders beyond those of `test_families.py`, each whole by program: modes of `generate`, errors of 16 bits, packed
weights, 8-bit caches, windows of 8 tokens that texts leave behind.
"""

import functools
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import hfopt
from tests.decoders import DECODERS as ALL
from tests.decoders import made
from tests.generation_cases import Model, assert_same, needs_programs, one_thread
from tests.model_types import prompts
from tests.step_cases import assert_as_close_as_stock, modules_alone, optimized

pytestmark = [pytest.mark.usefixtures(one_thread.__name__), needs_programs]

# others have tests of their own
DECODERS = [name for name in ALL if name not in ("llama", "qwen2", "qwen3", "granite", "gpt-j", "opt")]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "several of a prompt": {"do_sample": True, "num_return_sequences": 3},
    "chunked prompts": {"do_sample": False, "prefill_chunk_size": 5},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}
BY_MODULES = ("chunked prompts", "prompt lookup")  # which transformers does in loops of its own
HALVES = (torch.bfloat16, torch.float16)
FORMATS = ("int8", "int4", "nf4")


def some_of(names: Iterable[str], *axes: Iterable[Any], every: int = 1, first: int = 0) -> list[Any]:
    """Products as `parametrize` takes them: of each `every`th name one always, another for the next, and the rest slow."""
    products = list(product(*axes))

    def is_quick(index: int, place: int) -> bool:
        return index % every == first and (index + place) % len(products) == 0

    return [
        pytest.param(name, *values, marks=() if is_quick(index, place) else pytest.mark.slow)
        for index, name in enumerate(names)
        for place, values in enumerate(products)
    ]


def generated(model: Model, mode: str, n_tokens: int = 50) -> Any:
    torch.manual_seed(5)
    given = prompts()
    if mode == "prompt lookup":  # of one row
        given = {key: each[:1] for key, each in given.items()}
    outputs = {"return_dict_in_generate": True, "output_logits": mode != "prompt lookup"}
    return model.generate(**given, **MODES[mode], **outputs, max_new_tokens=n_tokens)


def noted(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each pass through the modules of such a model."""
    calls: list[None] = []
    forward = type(model).forward

    @functools.wraps(forward)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", noting)
    return calls


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_come_from_the_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name)
    calls = noted(model, monkeypatch)
    expected = generated(model, "greedy")
    optimized(model)
    report = hfopt.explain(model)
    assert report.by_module is None and report.program is not None and not report.idle
    calls.clear()
    found = generated(model, "greedy")
    assert not calls
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=2e-4)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("name", "mode"), some_of(DECODERS, [mode for mode in MODES if mode != "greedy"]))
def test_tokens_are_those_of_transformers(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name)
    calls = noted(model, monkeypatch)
    expected = generated(model, mode)
    optimized(model)
    assert hfopt.explain(model).by_module is None
    calls.clear()
    assert torch.equal(generated(model, mode).sequences, expected.sequences)
    assert not calls or mode in BY_MODULES


@pytest.mark.parametrize(("name", "dtype"), some_of(DECODERS, HALVES, every=3))
def test_halves_are_as_close_to_float32_as_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    assert_as_close_as_stock(made(name), dtype, prompts())


@pytest.mark.parametrize(
    ("name", "quantization", "kv_cache", "dtype"),
    some_of(DECODERS, (None, *FORMATS), [None, "int8"], [torch.float32, *HALVES], every=3, first=1),
)
@pytest.mark.thinned(3)
def test_the_program_has_the_bits_of_the_modules(
    name: str, quantization: str | None, kv_cache: str | None, dtype: torch.dtype
) -> None:
    model = made(name).to(dtype)
    hfopt.optimize(model, kernels="hfopt", quantization=quantization, kv_cache=kv_cache, strict=True)
    found = generated(model, "beams", 12)
    with modules_alone(model):
        expected = generated(model, "beams", 12)
    assert_same(found.sequences, expected.sequences)
    if any(
        name.startswith(prefix) for prefix in ("gemma2", "gemma3", "nanochat")
    ):  # which limit logits, by torch's tanh
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            torch.stack(found.logits), torch.stack(expected.logits), rtol=4 * eps, atol=0
        )
    else:
        assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("name", some_of(DECODERS, every=6))
def test_there_and_back(name: str, tmp_path: Path) -> None:
    model, stock = made(name), made(name)
    before = {path: type(module) for path, module in model.named_modules()}
    state = {key: each.clone() for key, each in model.state_dict().items()}
    hfopt.optimize(model, strict=True)
    hfopt.restore(model)
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert all(
        each.is_contiguous() and torch.equal(each, state[key]) for key, each in model.state_dict().items()
    )
    found, expected = generated(model, "greedy", 6), generated(stock, "greedy", 6)
    assert torch.equal(found.sequences, expected.sequences)
    hfopt.optimize(model, quantization="int8")
    expected = generated(model, "greedy", 6)
    hfopt.save(model, tmp_path)
    assert torch.equal(generated(hfopt.load(tmp_path), "greedy", 6).sequences, expected.sequences)
