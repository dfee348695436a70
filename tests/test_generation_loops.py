"""The loops as functions that `generate(custom_generate=...)` takes, on optimised models and on any others."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import BaseStreamer

import hfopt
from hfopt.errors import InvalidInput
from hfopt.generation import hf_beam_sample, hf_beam_search, hf_greedy_search, hf_sample

from .generation_cases import CACHE, IS_WHOLE, NOT_WHOLE, VOCABULARY

LOOPS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "greedy": (hf_greedy_search, {"do_sample": False}),
    "sample": (hf_sample, {"do_sample": True, "num_return_sequences": 3}),
    "beams": (hf_beam_search, {"do_sample": False, "num_beams": 4, "num_return_sequences": 2}),
    "beam sample": (hf_beam_sample, {"do_sample": True, "num_beams": 3}),
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES))


def mamba() -> Any:
    """A model whose cache holds states, and no keys."""
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0
    )
    return transformers.MambaForCausalLM(config)


def bamba() -> Any:
    """States in one layer, keys in the other."""
    options: dict[str, Any] = {
        "mamba_n_heads": 4,
        "mamba_d_head": "auto",
        "mamba_d_state": 8,
        "mamba_expand": 2,
    }
    config = transformers.BambaConfig(num_hidden_layers=2, attn_layer_indices=[1], **options, **SIZES)
    return transformers.BambaForCausalLM(config)


def windowed() -> Any:
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=2,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        **SIZES,
    )
    return transformers.Gemma3ForCausalLM(config)


MODELS = {each.__name__: each for each in (llama, mamba, bamba, windowed)}


def made(name: str) -> Any:
    torch.manual_seed(3)
    return MODELS[name]().eval()


def prompts(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, loop: Callable[..., Any] | None, **options: Any) -> Any:
    torch.manual_seed(11)
    given = {} if loop is None else {"custom_generate": loop}
    return model.generate(**prompts(), max_new_tokens=12, eos_token_id=5, **options, **given)


@pytest.mark.parametrize("mode", LOOPS)
@pytest.mark.parametrize("name", MODELS)
def test_results_are_those_of_transformers(name: str, mode: str) -> None:
    loop, options = LOOPS[mode]
    model = made(name)
    assert torch.equal(generated(model, loop, **options), generated(model, None, **options))


@pytest.mark.parametrize("mode", LOOPS)
def test_on_an_optimised_model(mode: str) -> None:
    loop, options = LOOPS[mode]
    model = made("llama")
    expected = generated(model, None, **options)
    assert torch.equal(generated(hfopt.optimize(model), loop, **options), expected)


def test_all_outputs() -> None:
    _, options = LOOPS["beams"]
    options = {
        **options,
        "output_scores": True,
        "output_hidden_states": True,
        "return_dict_in_generate": True,
    }
    model = made("bamba")
    ours, theirs = (generated(model, loop, **options) for loop in (hf_beam_search, None))
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores)
    for one, other in zip(ours.hidden_states[0], theirs.hidden_states[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not IS_WHOLE, reason=NOT_WHOLE)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ("sample", "beams"))
def test_a_prompt_is_read_once(name: str, mode: str) -> None:
    loop, options = LOOPS[mode]
    model, rows = made(name), list[int]()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    generated(model, loop, **options)
    copies = max(options.get("num_beams", 1), options["num_return_sequences"])
    assert rows[0] == 2 and set(rows[1:]) == {2 * copies}


def test_prompts_in_a_cache_of_the_user() -> None:
    """A cache that holds a text already is read on as it is."""
    model = made("llama")
    results = []
    for loop in (hf_beam_search, None):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompts()["input_ids"].repeat_interleave(4, 0), **{CACHE: cache})
        text = torch.cat([prompts()["input_ids"], prompts(1)["input_ids"]], dim=1)
        given = {} if loop is None else {"custom_generate": loop}
        options = {"num_beams": 4, "do_sample": False, "max_new_tokens": 6}
        results.append(model.generate(text, **{CACHE: cache}, **options, **given))
    assert torch.equal(*results)


class Streamer(BaseStreamer):
    def __init__(self) -> None:
        self.given: list[int] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.given += value.flatten().tolist()

    def end(self) -> None:
        self.has_ended = True


@pytest.mark.parametrize("is_optimised", (False, True))
def test_a_streamer(is_optimised: bool) -> None:
    model, streamer = made("llama"), Streamer()
    if is_optimised:
        hfopt.optimize(model)
    loop = functools.partial(hf_sample, streamer=streamer)
    ids = prompts()["input_ids"][:1]
    result = model.generate(ids, custom_generate=loop, do_sample=False, max_new_tokens=5)
    assert streamer.given == result[0].tolist() and streamer.has_ended


@pytest.mark.parametrize(
    "loop, options",
    (
        (hf_greedy_search, {"do_sample": True}),
        (hf_greedy_search, {"num_beams": 2}),
        (hf_sample, {"num_beams": 2}),
        (hf_beam_search, {"num_beams": 1}),
        (hf_beam_sample, {"num_beams": 2, "do_sample": False}),
    ),
)
def test_settings_that_a_loop_does_not_follow(loop: Callable[..., Any], options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=loop.__name__):
        generated(made("llama"), loop, **options)


def test_an_encoder_is_left_to_transformers() -> None:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    config = transformers.T5Config(vocab_size=VOCABULARY, **sizes, **start)
    torch.manual_seed(3)
    model = transformers.T5ForConditionalGeneration(config).eval()
    options = {"num_beams": 3, "do_sample": False}
    assert torch.equal(generated(model, hf_beam_search, **options), generated(model, None, **options))
