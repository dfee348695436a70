"""Beginnings of prompts that are not read again: known ones, and those that rows of a request have in common."""

import contextlib
import copy
import math
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

import hfopt
from hfopt.cache import prefix_tree
from hfopt.cache.prefix_state import state_of
from hfopt.cache.prefix_tree import Parts, PrefixTree
from hfopt.errors import CorruptCheckpoint, InvalidInput, UnsupportedModel
from hfopt.generation import prefixes
from hfopt.generation.prefill import Prefill
from hfopt.program.programs import Programs
from tests import fresh
from tests.generation_cases import (
    CACHE,
    VOCABULARY,
    Model,
    assert_same,
    bloom,
    falcon_alibi,
    gpt_neo,
    gptj,
    llama,
    mistral,
    needs_programs,
    one_thread,
    opt,
    phi4_mini,
)

pytestmark = [pytest.mark.usefixtures(one_thread.__name__), needs_programs]

DOCUMENT = 70  # tokens
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "several of a prompt": {"do_sample": True, "num_return_sequences": 2},
}
MAKERS: dict[str, Any] = {
    "llama": llama,
    "opt": lambda: opt(max_position_embeddings=256),
    "gptj": lambda: gptj(n_positions=256),
    "window": lambda: mistral(sliding_window=24),
    "windows of buffers": lambda: gpt_neo(max_position_embeddings=256),
    "distances": bloom,
    "counted distances": falcon_alibi,
}
SHARING = [
    name for name in MAKERS if name != "distances"
]  # padded rows of a model that is given no positions are not


class Counted:
    """Tokens that went through the model, in each call of it, by whatever way."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    @property
    def n_tokens(self) -> int:
        return sum(rows * tokens for rows, tokens in self.calls)


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """Rows and tokens of what a request calls the model, or its program, with for its prompts."""
    found = Counted()
    outputs = Prefill._outputs

    def counting(self: Any, inputs: dict[str, Any]) -> Any:
        found.calls.append(tuple(inputs["input_ids"].shape))
        return outputs(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Prefill, "_outputs", counting)
        yield found


def tokens(n: int, seed: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))


def prompt(*parts: Tensor) -> dict[str, Tensor]:
    ids = torch.cat(parts)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the left."""
    length = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(length - len(row), dtype=torch.long), row]) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def questions(*lengths: int) -> list[Tensor]:
    return [torch.cat([tokens(DOCUMENT, 1), tokens(n, 10 + n)]) for n in lengths]


def generated(model: Model, inputs: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(**inputs, max_new_tokens=10, **options)


def pair(name: str, **options: Any) -> tuple[Model, Model]:
    """A model as transformers has it, and a copy that is optimised."""
    stock = MAKERS[name]()
    return stock, hfopt.optimize(copy.deepcopy(stock), **options)


# ---- known beginnings ---------------------------------------------------------------------------------------------------


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_the_stock_model(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair(name)
    prefix_cache = hfopt.PrefixCache(model)
    for index, n_new in enumerate((5, 9, 1)):
        inputs = prompt(tokens(DOCUMENT, 1), tokens(n_new, index + 2))
        expected = generated(stock, inputs, **MODES[mode])
        with counted(monkeypatch) as found:
            assert torch.equal(generated(model, inputs, prefix_cache=prefix_cache, **MODES[mode]), expected)
        least = 2 if len(expected) > 1 or "num_beams" in MODES[mode] else 1
        if index:
            assert [n for _, n in found.calls] == [max(n_new, least)]
    assert prefix_cache.n_tokens == DOCUMENT + 5 + 9 + 1


def test_a_whole_prompt_is_known_but_for_its_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair("llama")
    inputs, prefix_cache = prompt(tokens(DOCUMENT, 1)), hfopt.PrefixCache(model)
    for n_read in (DOCUMENT, 1, 1):
        with counted(monkeypatch) as found:
            given = generated(model, inputs, prefix_cache=prefix_cache)
        assert found.calls == [(1, n_read)]
        assert torch.equal(given, generated(stock, inputs))
    assert prefix_cache.use == (3, 2 * DOCUMENT - 2, DOCUMENT + 2)


def test_a_chat_goes_on_from_its_last_turn() -> None:
    stock, model = pair("llama")
    prefix_cache, text = hfopt.PrefixCache(model), tokens(40, 1)
    for turn in range(4):
        inputs = prompt(text, tokens(8, 5 + turn))
        answer = generated(model, inputs, prefix_cache=prefix_cache)
        assert torch.equal(answer, generated(stock, inputs))
        text = answer[0]
    # of each turn but the first, its last answer and the question are read
    assert prefix_cache.use == (4, 48 + 66 + 84, 48 + 3 * 18)


def test_scores_are_those_of_the_stock_model() -> None:
    stock, model = pair("llama")
    prefix_cache = hfopt.PrefixCache(model)
    options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    for seed in (2, 3):
        inputs = prompt(tokens(DOCUMENT, 1), tokens(6, seed))
        assert_same(
            generated(model, inputs, prefix_cache=prefix_cache, **options),
            generated(stock, inputs, **options),
        )


def test_logits_have_the_bits_of_a_cache_that_goes_on() -> None:
    """Which are those of a prompt that is read in two calls."""
    model = hfopt.optimize(llama(), kernels="hfopt")
    prefix_cache, document = hfopt.PrefixCache(model), tokens(128, 1)
    options = {"return_dict_in_generate": True, "output_logits": True}
    model.generate(**prompt(document), max_new_tokens=1, prefix_cache=prefix_cache)
    for n_new in (1, 7, 64):
        cache, inputs = hfopt.IndirectCache(model.config), prompt(document, tokens(n_new, n_new))
        model.generate(**prompt(document), max_new_tokens=1, **{CACHE: cache})
        expected = generated(model, inputs, **{CACHE: cache}, **options).logits
        given = generated(model, inputs, prefix_cache=prefix_cache, **options).logits
        assert len(given) == 10 and all(map(torch.equal, given, expected))
    assert prefix_cache.use.known_tokens == 3 * 128


@contextlib.contextmanager
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[hfopt.IndirectCache]]:
    """The caches of requests, as they are when what is known has been put into them."""
    found: list[hfopt.IndirectCache] = []
    begin = prefixes.Prompts.begin

    def noting(self: Any, read: Any) -> Any:
        rest = begin(self, read)
        found.append(copy.copy(self._cache))
        found[-1].layers = [copy.copy(layer) for layer in self._cache.layers]
        return rest

    with monkeypatch.context() as patch:
        patch.setattr(prefixes.Prompts, "begin", noting)
        yield found


@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_a_known_beginning_is_read_where_it_is_held(
    kv_cache: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is copied, nor moved for another question, nor written to, whatever requests do with their caches."""
    _, model = pair("llama", kv_cache=kv_cache)
    prefix_cache = hfopt.PrefixCache(model)
    for seed in (2, 3):
        generated(model, prompt(tokens(DOCUMENT, 1), tokens(6, seed)), prefix_cache=prefix_cache)
    (root,) = prefix_cache._tree.roots.values()
    (block,) = root.children.values()
    assert len(block.tokens) == DOCUMENT
    places = [each.data_ptr() for part in block.parts for each in part if each is not None]
    before = [each.clone() for part in block.parts for each in part if each is not None]
    lookup: dict[str, Any] = {"prompt_lookup_num_tokens": 4, "do_sample": False}
    for seed, options in enumerate([*MODES.values(), lookup], 4):
        inputs = prompt(tokens(DOCUMENT, 1), tokens(6, seed))
        with begun(monkeypatch) as caches:
            given = generated(model, inputs, prefix_cache=prefix_cache, **options)
        expected = generated(model, inputs, **options)
        assert torch.equal(given, expected)
        held = [each for layer in caches[0].layers for each in (layer.prefix, layer.prefix_scales)]
        assert [each.data_ptr() for each in held if each is not None] == places
        assert block.parts and root.children[int(block.tokens[0])] is block
    after = [each for part in block.parts for each in part if each is not None]
    assert all(map(torch.equal, after, before))


def test_a_cache_that_others_see_has_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """They might write to it."""
    _, model = pair("llama")
    prefix_cache = hfopt.PrefixCache(model)
    generated(model, prompt(tokens(DOCUMENT, 1)), prefix_cache=prefix_cache)
    (root,) = prefix_cache._tree.roots.values()
    (block,) = root.children.values()
    inputs, place = prompt(tokens(DOCUMENT, 1), tokens(6, 2)), block.parts[0][0].data_ptr()
    for options in ({}, {"return_dict_in_generate": True}, {CACHE: hfopt.IndirectCache(model.config)}):
        with begun(monkeypatch) as caches:
            generated(model, inputs, prefix_cache=prefix_cache, **options)
        assert (caches[0].layers[0].prefix.data_ptr() == place) is (not options)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_codes_are_kept_as_codes(name: str) -> None:
    _, model = pair(name, kv_cache="int8")
    _, floats = pair(name)
    prefix_cache = hfopt.PrefixCache(model)
    for seed in (2, 3):
        inputs = prompt(tokens(DOCUMENT, 1), tokens(6, seed))
        expected = generated(model, inputs)
        assert torch.equal(generated(model, inputs, prefix_cache=prefix_cache), expected)
    assert prefix_cache.use.known_tokens == DOCUMENT
    of_floats = hfopt.PrefixCache(floats)
    generated(floats, inputs, prefix_cache=of_floats)
    assert prefix_cache.n_bytes / prefix_cache.n_tokens < 0.5 * of_floats.n_bytes / of_floats.n_tokens


def test_kinds_of_caches_are_kept_apart() -> None:
    stock, model = pair("llama")
    prefix_cache, inputs = hfopt.PrefixCache(model), prompt(tokens(DOCUMENT, 1))
    for kv_cache in (None, "int8"):
        cache = hfopt.IndirectCache(model.config, kv_cache=kv_cache)
        generated(model, inputs, prefix_cache=prefix_cache, **{CACHE: cache})
        assert cache.get_seq_length() == DOCUMENT + 9
    assert prefix_cache.use == (2, 0, 2 * DOCUMENT)
    assert torch.equal(generated(model, inputs, prefix_cache=prefix_cache), generated(stock, inputs))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", SHARING)
def test_rows_begin_behind_their_own_padding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows known, some of them, and to different lengths."""
    stock, model = pair(name)
    prefix_cache = hfopt.PrefixCache(model)
    other = tokens(90, 7)
    generated(model, prompt(other), prefix_cache=prefix_cache)
    generated(model, prompt(tokens(DOCUMENT, 1)), prefix_cache=prefix_cache)
    before = prefix_cache.use
    rows = [*questions(3, 12), torch.cat([other[:80], tokens(5, 30)]), tokens(60, 31), tokens(20, 32)]
    inputs = padded(rows)
    for options in MODES.values():
        assert torch.equal(
            generated(model, inputs, prefix_cache=prefix_cache, **options),
            generated(stock, inputs, **options),
        )
    with counted(monkeypatch) as found:
        generated(model, inputs, prefix_cache=prefix_cache)
    assert found.calls == [(5, 1)]
    n_known = prefix_cache.use.known_tokens - before.known_tokens
    assert n_known > 4 * (sum(map(len, rows)) - 2 * len(rows))


def test_padding_in_the_middle_is_not_taken_for_a_beginning() -> None:
    stock, model = pair("llama")
    prefix_cache = hfopt.PrefixCache(model)
    inputs = prompt(tokens(DOCUMENT, 1))
    generated(model, inputs, prefix_cache=prefix_cache)
    inputs["attention_mask"][0, 20:25] = 0
    assert torch.equal(generated(model, inputs, prefix_cache=prefix_cache), generated(stock, inputs))
    assert prefix_cache.use.known_tokens == 0


def test_positions_of_the_callers_own_are_not_taken_for_those_of_a_beginning() -> None:
    stock, model = pair("llama")
    prefix_cache = hfopt.PrefixCache(model)
    inputs = prompt(tokens(DOCUMENT, 1))
    generated(model, inputs, prefix_cache=prefix_cache)
    inputs["position_ids"] = torch.arange(DOCUMENT)[None] * 2
    assert torch.equal(generated(model, inputs, prefix_cache=prefix_cache), generated(stock, inputs))
    assert prefix_cache.use.known_tokens == 0


def test_requests_that_look_inside_are_read_as_a_whole() -> None:
    stock, model = pair("llama")
    prefix_cache, inputs = hfopt.PrefixCache(model), prompt(tokens(DOCUMENT, 1))
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    for _ in range(2):
        given = generated(model, inputs, prefix_cache=prefix_cache, **options)
    assert_same(given.hidden_states, generated(stock, inputs, **options).hidden_states)
    seen = []
    model.model.layers[0].register_forward_hook(lambda _, args, output: seen.append(args[0].shape[1]))
    generated(model, inputs, prefix_cache=prefix_cache)
    assert seen[0] == DOCUMENT and prefix_cache.use.known_tokens == 0


def test_the_bound_one_is_taken_unless_another_is_given() -> None:
    stock = llama()
    model = copy.deepcopy(stock)
    bound = hfopt.PrefixCache(model)
    hfopt.optimize(model, prefix_cache=bound)
    inputs, other = prompt(tokens(DOCUMENT, 1)), hfopt.PrefixCache(model)
    generated(model, inputs)
    generated(model, inputs, prefix_cache=other)
    assert torch.equal(generated(model, inputs), generated(stock, inputs))
    assert bound.use == (2, DOCUMENT - 1, DOCUMENT + 1) and other.use == (1, 0, DOCUMENT)
    assert model.hfopt.keeps_prompts and "beginnings of prompts are not read again" in str(
        hfopt.explain(model)
    )
    hfopt.restore(model)
    generated(model, inputs)
    assert bound.use.prompts == 2


def test_copies_and_pickles_of_a_model_have_an_empty_one_of_their_own() -> None:
    model = llama()
    bound = hfopt.PrefixCache(model, max_bytes=12345678)
    hfopt.optimize(model, prefix_cache=bound)
    inputs = prompt(tokens(DOCUMENT, 1))
    expected = generated(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kept = hfopt.generation.installed(other).prefix_cache
        assert kept is not None and kept is not bound and kept.model is other
        assert kept.n_tokens == 0 and kept.max_bytes == 12345678
        assert torch.equal(generated(other, inputs), expected)
        assert kept.use == (1, 0, DOCUMENT)


# ---- what beginnings depend on ------------------------------------------------------------------------------------------


def test_a_changed_weight_is_no_hit() -> None:
    stock, model = pair("llama")
    prefix_cache, inputs = hfopt.PrefixCache(model), prompt(tokens(DOCUMENT, 1))
    weight: Any = model.model.layers[0].self_attn.k_proj.weight
    theirs: Any = stock.model.layers[0].self_attn.k_proj.weight

    def change(in_place: bool) -> None:
        for each in (weight, theirs):
            if in_place:
                with torch.no_grad():
                    each[0, 0] += 1.0
            else:
                each.data.mul_(1.5)  # which torch does not count

    generated(model, inputs, prefix_cache=prefix_cache)
    for in_place in (True, False):
        change(in_place)
        before = prefix_cache.use.known_tokens
        assert torch.equal(generated(model, inputs, prefix_cache=prefix_cache), generated(stock, inputs))
        assert prefix_cache.use.known_tokens == before
        generated(model, inputs, prefix_cache=prefix_cache)
        assert prefix_cache.use.known_tokens == before + DOCUMENT - 1


@pytest.mark.parametrize(
    "shape", [(96,), (64, 96), (96, 64), (5, 3), (1, 40), (40, 1), (9, 10, 40), (200, 150)]
)
def test_a_sample_of_a_weight_is_from_all_of_it(shape: tuple[int, ...]) -> None:
    """An eighth of its rows or columns cannot change past torch's count without being seen, nor every other column."""
    module = torch.nn.Module()
    whole = torch.arange(1, 1 + math.prod(shape)).float().reshape(shape)
    for weight in (whole, whole.movedim(0, -1)):
        module.register_buffer("weight", weight)
        before = state_of(module)
        for dimension, size in enumerate(weight.shape):
            eighth = -(-size // 8)
            parts = [slice(first, first + eighth + 1) for first in range(0, size, eighth)]
            if weight.dim() == 2 and dimension and size >= 64 and len(weight) > 1:
                parts += [slice(None, None, 2), slice(1, None, 2)]
            for part in parts:
                changed = weight.data.movedim(dimension, 0)[part]
                if len(changed) > eighth or part.step:
                    changed.neg_()
                    assert state_of(module) != before
                    changed.neg_()
        assert state_of(module) == before


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_has_beginnings_of_its_own() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    stock: Any = peft.get_peft_model(llama(), config, "one")
    stock.add_adapter("two", config)
    stock.eval()
    model: Any = copy.deepcopy(stock)
    hfopt.optimize(model)
    prefix_cache, inputs = hfopt.PrefixCache(model), prompt(tokens(DOCUMENT, 1))

    def known() -> int:
        """Tokens that the next request, which is right, does not read."""
        before = prefix_cache.use.known_tokens
        assert torch.equal(generated(model, inputs, prefix_cache=prefix_cache), generated(stock, inputs))
        return prefix_cache.use.known_tokens - before

    def switch(name: str) -> None:
        model.set_adapter(name)
        stock.set_adapter(name)

    assert [known(), known()] == [0, DOCUMENT - 1]
    switch("two")
    assert [known(), known()] == [0, DOCUMENT - 1]
    with model.disable_adapter(), stock.disable_adapter():
        assert [known(), known()] == [0, DOCUMENT - 1]
    switch("one")
    assert known() == DOCUMENT - 1
    for each in (model, stock):
        each.base_model.model.model.layers[0].self_attn.k_proj.scaling["one"] = 3.0
    assert known() == 0
    names = {"adapter_names": ["one", "two"]}
    both = padded([inputs["input_ids"][0]] * 2)
    before = prefix_cache.use
    given = generated(model, both, prefix_cache=prefix_cache, **names)
    assert torch.equal(given, generated(stock, both, **names)) and prefix_cache.use == before


def test_models_whose_keys_follow_from_more_than_tokens_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="angles depend on how long a text is"):
        hfopt.PrefixCache(phi4_mini())
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(UnsupportedModel, match="not all of its layers have full attention"):
        hfopt.PrefixCache(mamba)


def test_a_model_that_has_lost_our_cache_says_so() -> None:
    model = llama()
    hfopt.optimize(model, prefix_cache=hfopt.PrefixCache(model))
    del model.__dict__[hfopt.host.PREPARE_CACHE]
    assert hfopt.explain(model).rereads == "its class prepares caches of its own"
    assert "prompts are read from their beginning: its class prepares" in str(hfopt.explain(model))


def test_arguments_are_checked() -> None:
    model, other = hfopt.optimize(llama()), hfopt.optimize(llama())
    inputs = prompt(tokens(9, 1))
    with pytest.raises(InvalidInput, match="prefix_cache is a dict"):
        generated(model, inputs, prefix_cache={})
    with pytest.raises(InvalidInput, match="for another model"):
        generated(model, inputs, prefix_cache=hfopt.PrefixCache(other))
    with pytest.raises(InvalidInput, match="for another model"):
        hfopt.optimize(model, prefix_cache=hfopt.PrefixCache(other))
    with pytest.raises(InvalidInput, match="max_bytes = 0"):
        hfopt.PrefixCache(model, max_bytes=0)
    with pytest.raises(InvalidInput, match="model is a Linear"):
        hfopt.PrefixCache(torch.nn.Linear(2, 2))


# ---- what rows of a request have in common ------------------------------------------------------------------------------


@pytest.mark.thinned(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SHARING)
def test_a_common_beginning_is_read_once(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair(name)
    inputs = padded(questions(3, 11, 7, 20))
    expected = generated(stock, inputs, **MODES[mode])
    with counted(monkeypatch) as found:
        assert torch.equal(generated(model, inputs, **MODES[mode]), expected)
    copies = max(MODES[mode].get("num_beams", 1), MODES[mode].get("num_return_sequences", 1))
    assert found.calls == [(1, DOCUMENT), (4 * copies, 20)]


@pytest.mark.parametrize("name", ["llama", "window", "distances"])
def test_rows_of_one_length_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair(name)
    ids = torch.stack([torch.cat([tokens(DOCUMENT, 1), tokens(6, 10 + row)]) for row in range(5)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"return_dict_in_generate": True, "output_logits": True}
    for more in MODES.values():
        with counted(monkeypatch) as found:
            assert_same(
                generated(model, inputs, **options, **more), generated(stock, inputs, **options, **more)
            )
        assert found.calls[0] == (1, DOCUMENT) and found.calls[1][1] == 6


def test_beginnings_within_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system prompt for all, documents for some, equal rows, and one row that has nothing in common with others."""
    stock, model = pair("llama")
    system, documents = tokens(80, 1), [tokens(90, 2), tokens(100, 3)]
    rows = [torch.cat([system, documents[n % 2], tokens(5 + n, 10 + n)]) for n in range(6)]
    inputs = padded([*rows, rows[0], torch.cat([system, tokens(9, 40)])])
    with counted(monkeypatch) as found:
        assert torch.equal(generated(model, inputs), generated(stock, inputs))
    assert found.calls[:3] == [(1, 80), (1, 90), (1, 100)]
    assert found.n_tokens < 80 + 90 + 100 + 8 * 20
    alone = padded([*rows[:4], tokens(150, 50)])
    with counted(monkeypatch) as found:
        assert torch.equal(generated(model, alone), generated(stock, alone))
    assert found.n_tokens < 80 + 90 + 100 + 150 + 5 * 20


def test_the_common_beginning_is_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the order of columns is nobody's business; and where it is, each row has its own."""
    _, model = pair("llama")
    inputs = padded(questions(3, 11, 7, 20))
    with begun(monkeypatch) as caches:
        generated(model, inputs)
        generated(model, inputs, return_dict_in_generate=True)
        generated(model, inputs, **{CACHE: hfopt.IndirectCache(model.config)})
    assert [each.layers[0].prefix.shape[1] for each in caches] == [1, 4, 4]


def test_it_is_stored_once_too_where_steps_go_module_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for many rows, where torch's kernels are quicker."""
    stock, model = pair("llama")
    monkeypatch.setattr(Programs, "of", lambda *arguments: None)
    inputs = padded(questions(3, 11, 7, 20))
    for options in MODES.values():
        with begun(monkeypatch) as caches:
            assert torch.equal(generated(model, inputs, **options), generated(stock, inputs, **options))
        assert caches[0].layers[0].prefix.shape[1] == 1


def test_a_cache_that_is_handed_back_goes_on() -> None:
    stock, model = pair("llama")
    inputs = padded(questions(3, 11, 7))
    caches = [DynamicCache(config=stock.config), hfopt.IndirectCache(model.config)]
    results = []
    for each, cache in zip((stock, model), caches, strict=True):
        first = generated(each, inputs, **{CACHE: cache})
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 10 + 4, dtype=torch.long)], 1)
        more = torch.cat([first, tokens(12, 5).reshape(3, 4)], 1)
        results += [generated(each, {"input_ids": more, "attention_mask": mask}, **{CACHE: cache})]
    assert torch.equal(*results)


def test_short_beginnings_are_read_with_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair("llama")
    inputs = padded([torch.cat([tokens(63, 1), tokens(n, 9 + n)]) for n in (3, 8, 5)])
    with counted(monkeypatch) as found:
        assert torch.equal(generated(model, inputs), generated(stock, inputs))
    assert found.calls == [(3, 71)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_codes_share_too(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = padded(questions(3, 11, 7, 20))
    for kv_cache in (None, "int8"):
        model = hfopt.optimize(llama(), dtype=dtype, kv_cache=kv_cache)
        options = {"return_dict_in_generate": True, "output_logits": True}
        with counted(monkeypatch) as found:
            shared = generated(model, inputs, **options).logits[0]
        assert found.calls == [(1, DOCUMENT), (4, 20)]
        alone = [generated(model, prompt(row), **options).logits[0] for row in questions(3, 11, 7, 20)]
        difference = (shared - torch.cat(alone)).float().abs().max()
        assert difference <= 0.05 * shared.float().abs().max()


def test_a_request_that_fails_leaves_a_given_cache_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair("llama")
    prefix_cache, inputs = hfopt.PrefixCache(model), prompt(tokens(DOCUMENT, 1))
    expected = generated(model, inputs, prefix_cache=prefix_cache)
    cache = hfopt.IndirectCache(model.config)

    def failing(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Prefill, "_outputs", failing)
        with pytest.raises(KeyboardInterrupt):
            generated(model, inputs, prefix_cache=prefix_cache, **{CACHE: cache})
    assert cache.get_seq_length() == 0
    assert torch.equal(generated(model, inputs, prefix_cache=prefix_cache, **{CACHE: cache}), expected)


# ---- memory, threads, files ---------------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes_first() -> None:
    _, model = pair("llama")
    probe = hfopt.PrefixCache(model)
    generated(model, prompt(tokens(DOCUMENT, 1)), prefix_cache=probe)
    room = int(2.5 * probe.n_bytes)
    prefix_cache = hfopt.PrefixCache(model, max_bytes=room)

    def known(seed: int) -> int:
        before = prefix_cache.use.known_tokens
        generated(model, prompt(tokens(DOCUMENT, seed)), prefix_cache=prefix_cache)
        assert prefix_cache.n_bytes <= room
        return prefix_cache.use.known_tokens - before

    assert [known(1), known(2), known(1)] == [0, 0, DOCUMENT - 1]
    assert known(3) == 0  # in the place of 2
    assert [known(1), known(2)] == [DOCUMENT - 1, 0]
    prefix_cache.clear()
    assert prefix_cache.n_bytes == prefix_cache.n_tokens == known(1) == 0


def test_a_prompt_that_is_too_long_is_kept_as_far_as_there_is_room() -> None:
    _, model = pair("llama")
    probe = hfopt.PrefixCache(model)
    generated(model, prompt(tokens(256, 1)), prefix_cache=probe)
    prefix_cache = hfopt.PrefixCache(model, max_bytes=2 * probe.n_bytes)
    for _ in range(2):
        generated(model, prompt(tokens(900, 1)), prefix_cache=prefix_cache)
    assert prefix_cache.use.known_tokens == 512


def parts_of(texts: np.ndarray) -> Parts:
    """Keys that are the tokens themselves."""
    keys = torch.from_numpy(texts.copy()).float()[None, None, :, None].repeat(2, 1, 1, 2)
    return [(keys, None), (keys + 0.5, None)]


def test_a_split_moves_the_short_half_alone() -> None:
    text, tree = np.arange(100), PrefixTree(1 << 20)
    tree.add(0, text, pieces_of(text))
    for length, is_there in ((90, True), (85, True), (20, False)):
        place = tree.find(0, text).blocks[0][0][0].data_ptr()
        other = np.concatenate([text[:length], [1000 + length]])
        tree.add(0, other, pieces_of(other))
        first = tree.find(0, other)
        assert len(first.blocks) == 2 and torch.equal(first.blocks[0][0][0], parts_of(text[:length])[0][0])
        assert (first.blocks[0][0][0].data_ptr() == place) is is_there
        assert tree.find(0, text).length == 100
    held = [part[0].untyped_storage().nbytes() for block in tree.blocks(0) for part in block.parts]
    assert tree.n_bytes == sum(held) + 8 * tree.n_tokens


def pieces_of(text: np.ndarray) -> Any:
    """What `PrefixTree.add` reads a text by, in two pieces."""

    def read(first: int, end: int) -> list[Parts]:
        middle = (first + end) // 2
        return [parts_of(text[low:high]) for low, high in ((first, middle), (middle, end)) if low < high]

    return read


def test_a_tree_finds_what_was_added_whatever_has_gone() -> None:
    """Random texts of few different tokens, in little memory."""
    generator = np.random.default_rng(5)
    tree = PrefixTree(60_000)
    n_found = 0
    for _ in range(600):
        text = generator.integers(0, 2, generator.integers(1, 40)).repeat(generator.integers(1, 30))
        key = int(generator.integers(2))
        found = tree.find(key, text)
        assert found.length <= len(text)
        n_found += found.length
        for first, parts in found.parts(0, found.length):
            n_tokens = parts[0][0].shape[2]
            expected = parts_of(text[first : first + n_tokens])
            assert all(torch.equal(one[0], other[0]) for one, other in zip(parts, expected, strict=True))
        tree.add(key, text, pieces_of(text))
        blocks = [block for each in (0, 1) for block in tree.blocks(each)]
        assert tree.n_tokens == sum(len(block.tokens) for block in blocks)
        held = [part[0].untyped_storage() for block in blocks for part in block.parts]
        assert len({each.data_ptr() for each in held}) == len(held)
        n_bytes = sum(each.nbytes() for each in held) + sum(block.tokens.nbytes for block in blocks)
        assert tree.n_bytes == n_bytes <= 60_000
    assert n_found > 5000


def test_nothing_is_kept_that_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair("llama")
    prefix_cache, inputs = hfopt.PrefixCache(model), prompt(tokens(DOCUMENT, 1))
    monkeypatch.setattr(prefix_tree, "available_memory", lambda: 1000)
    monkeypatch.setattr(prefix_tree, "_UNCHECKED_BYTES", 0)
    assert torch.equal(generated(model, inputs, prefix_cache=prefix_cache), generated(stock, inputs))
    assert prefix_cache.n_tokens == 0


def test_threads_share_one() -> None:
    stock, model = pair("llama")
    probe = hfopt.PrefixCache(model)
    generated(model, prompt(tokens(DOCUMENT, 1)), prefix_cache=probe)
    prefix_cache = hfopt.PrefixCache(model, max_bytes=3 * probe.n_bytes)  # so that texts go, too
    wanted = [prompt(tokens(DOCUMENT, seed % 3), tokens(5, seed)) for seed in range(9)]
    expected = [generated(stock, inputs, do_sample=False) for inputs in wanted]
    wrong: list[Any] = []

    def ask(offset: int) -> None:
        try:
            for turn in range(27):
                index = (turn * (offset + 1) + offset) % 9
                options = {"max_new_tokens": 10, "do_sample": False, "prefix_cache": prefix_cache}
                if not torch.equal(model.generate(**wanted[index], **options), expected[index]):
                    wrong.append(index)
        except BaseException as error:  # noqa: BLE001  (it would end the thread unseen)
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(offset,)) for offset in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert prefix_cache.use.prompts == 54 and prefix_cache.use.known_tokens > 0
    assert prefix_cache.n_bytes <= 3 * probe.n_bytes


@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_a_file_is_read_by_another_cache_of_the_model(kv_cache: str | None, tmp_path: Path) -> None:
    _, model = pair("llama", kv_cache=kv_cache)
    prefix_cache = hfopt.PrefixCache(model)
    wanted = [prompt(tokens(300, seed % 2), tokens(5, seed)) for seed in range(4)]
    expected = [generated(model, inputs, prefix_cache=prefix_cache) for inputs in wanted]
    prefix_cache.save(tmp_path / "prefixes")
    assert [each.name for each in tmp_path.iterdir()] == ["prefixes"]
    other = hfopt.PrefixCache(model)
    assert other.load(tmp_path / "prefixes") == prefix_cache.n_tokens == other.n_tokens == 620
    assert other.n_bytes <= prefix_cache.n_bytes  # without the room of what was split off
    for inputs, each in zip(wanted, expected, strict=True):
        assert torch.equal(generated(model, inputs, prefix_cache=other), each)
    assert other.use == (4, 4 * 304, 4)
    assert other.load(tmp_path / "prefixes") == 0


def test_a_file_is_read_by_another_process(tmp_path: Path) -> None:
    code = (
        "import hfopt, torch\n"
        "model = hfopt.load(hfopt.embedded_model())\n"
        "prefixes = hfopt.PrefixCache(model)\n"
        "ids = torch.arange(2, 82)[None]\n"
        f"path = {str(tmp_path / 'prefixes')!r}\n"
    )
    fresh.run(code + "model.generate(ids, prefix_cache=prefixes, max_new_tokens=2)\nprefixes.save(path)\n")
    assert fresh.run(code + "print(prefixes.load(path))\n") == "80\n"


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    _, model = pair("llama")
    prefix_cache, path = hfopt.PrefixCache(model), tmp_path / "prefixes"
    generated(model, prompt(tokens(DOCUMENT, 1)), prefix_cache=prefix_cache)
    prefix_cache.save(path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 7] += 0.01
    with pytest.raises(InvalidInput, match="of another model"):
        prefix_cache.load(path)
    _, other = pair("gptj")
    with pytest.raises(InvalidInput, match="of another model"):
        hfopt.PrefixCache(other).load(path)
    with pytest.raises(InvalidInput, match="no such file"):
        prefix_cache.load(tmp_path / "nothing")
    with pytest.raises(InvalidInput, match="no file can be written"):
        prefix_cache.save(tmp_path / "no" / "folder")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    _, model = pair("llama")
    prefix_cache, path, broken = hfopt.PrefixCache(model), tmp_path / "prefixes", tmp_path / "broken"
    generated(model, prompt(tokens(DOCUMENT, 1)), prefix_cache=prefix_cache)
    prefix_cache.save(path)
    content, other = path.read_bytes(), hfopt.PrefixCache(model)
    flipped = bytearray(content)
    flipped[-100] ^= 1
    for damaged in (b"", content[:7], content[:500], content[:-1], bytes(flipped), b"\xff" * 4096):
        broken.write_bytes(damaged)
        with pytest.raises(CorruptCheckpoint, match="is damaged"):
            other.load(broken)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, broken, {**metadata, "format": "hfopt prefixes 0"})
    with pytest.raises(InvalidInput, match="'hfopt prefixes 1' is needed"):
        other.load(broken)
    for blocks in (
        "[",
        "[{}]",
        metadata["blocks"].replace("float32", "float8"),
        metadata["blocks"].replace("null", "3"),
    ):
        save_file(tensors, broken, {**metadata, "blocks": blocks})
        with pytest.raises(CorruptCheckpoint, match="is damaged"):
            other.load(broken)
    assert other.n_tokens == 0
