"""Keys and values as 8-bit codes: the cache, and generation with it."""

import copy
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig, MistralForCausalLM

import hfopt
from hfopt.cache import IndirectCache, storage
from hfopt.cache.codes import dequantised, quantised
from hfopt.errors import CacheFull, InvalidInput
from hfopt.generation import installed
from tests.cache_cases import HEAD_DIM, N_HEADS, N_LAYERS, Pair, operate, random_states
from tests.generation_cases import (
    CACHE,
    FAMILIES,
    Model,
    assert_same,
    cache_of,
    gptj,
    llama,
    needs_programs,
    one_thread,
    prompts,
)
from tests.reference import DTYPES
from tests.step_cases import (
    MODES,
    assert_program_is_the_modules,
    assert_same_bits,
    generated,
    passes,
    rehearsals,
)

__all__ = ["passes", "rehearsals"]  # fixtures

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def rounded(x: Tensor) -> Tensor:
    return dequantised(*quantised(x), x.dtype)


class RoundedCache(DynamicCache):
    """transformers' cache, of keys and values that were codes once."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(rounded(key_states), rounded(value_states), *args, **kwargs)


class FollowingCache(DynamicCache):
    """A `RoundedCache` that decides as another cache did where a value lies half way between two codes.

    There a rounding error of a key makes logits differ by a hundred thousand times as much.
    """

    def __init__(self, config: Any, followed: IndirectCache) -> None:
        super().__init__(config=config)
        self.followed = followed

    def _rounded(self, states: Tensor, layer_idx: int, which: int) -> Tensor:
        n_rows, n_new, first = states.shape[0], states.shape[2], self.get_seq_length(layer_idx)
        layer: Any = self.followed.layers[layer_idx]
        # physical rows: those of the prefix are prompts, and those of the suffix never move
        prefix = dequantised(layer.prefix[which], layer.prefix_scales[which], states.dtype)[
            :, :, : layer.prefix_len
        ]
        known = prefix.repeat_interleave(n_rows // prefix.shape[0], 0)
        if layer.suffix_len:
            suffix = dequantised(layer.suffix[which], layer.suffix_scales[which], states.dtype)
            known = torch.cat([known, suffix[:n_rows]], 2)
        known = known[:, :, first : first + n_new]
        limit = 0.501 * quantised(states)[1][..., None]
        return torch.where((known - states).abs() <= limit, known, rounded(states))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        keys, values = self._rounded(key_states, layer_idx, 0), self._rounded(value_states, layer_idx, 1)
        return super().update(keys, values, layer_idx, *args, **kwargs)


def coded(model: Model) -> Model:
    return hfopt.optimize(model, kernels="hfopt", kv_cache="int8")


def prove(model: Model) -> None:
    """Make the step that goes both ways."""
    model.generate(**prompts(1, 4), max_new_tokens=2, do_sample=False)


# ---- generation ------------------------------------------------------------------------------------------------------


def assert_same_results(model: Model, arguments: dict[str, Any], **options: Any) -> None:
    """Tokens and logits of every step, from codes and from a cache of their values in the unpatched model."""
    stock = copy.deepcopy(model)
    ours = generated(coded(model), arguments, **options)
    assert cache_of(ours).kv_cache == "int8"
    cache = FollowingCache(stock.config, cache_of(ours))
    theirs = generated(stock, arguments, **{CACHE: cache}, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_same(ours.logits, theirs.logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_results_are_those_of_a_rounded_cache(name: str, mode: str) -> None:
    """Fifty steps behind prompts that are padded on the left."""
    assert_same_results(FAMILIES[name](), MODES[mode], max_new_tokens=50)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_16_bits_are_as_near_as_the_stock_model(name: str, dtype: torch.dtype) -> None:
    """Logits of a prompt and of a step, each against those of float32 with the same rounding of the cache."""
    exact, stock = FAMILIES[name](), FAMILIES[name]().to(dtype)
    ours = coded(copy.deepcopy(stock))
    exact.load_state_dict({key: value.float() for key, value in stock.state_dict().items()})
    given = prompts(4, 60)
    mask = given["attention_mask"]
    results = []
    for model, cache in (
        (ours, IndirectCache(ours.config, kv_cache="int8")),
        (stock, RoundedCache(config=stock.config)),
        (exact, RoundedCache(config=exact.config)),
    ):
        logits = []
        with torch.no_grad():
            for first, end in ((0, 40), (40, 59), (59, 60)):
                arguments = {"input_ids": given["input_ids"][:, first:end], "attention_mask": mask[:, :end]}
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, first:end]
                output = model(**arguments, position_ids=positions, **{CACHE: cache})
                logits.append(output.logits[:, -1].double())
        results.append(torch.stack(logits))
    mine, his, best = results
    assert (mine - best).abs().mean() <= 1.5 * (his - best).abs().mean()


@pytest.mark.thinned(3)
@needs_programs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*FAMILIES, "llama, heads of 24", "llama, a key head each"])
def test_a_program_gives_the_bits_of_the_modules(name: str, dtype: torch.dtype, passes: list[int]) -> None:
    changes = {"llama, heads of 24": {"head_dim": 24}, "llama, a key head each": {"num_key_value_heads": 4}}
    model = coded((llama(**changes[name]) if name in changes else FAMILIES[name]()).to(dtype))
    prove(model)
    for mode in MODES.values() if name in FAMILIES else (MODES["greedy"], MODES["beams"]):
        assert_program_is_the_modules(model, passes, max_new_tokens=51, **mode)
    assert hfopt.explain(model).by_module is None


@needs_programs
def test_a_program_is_rehearsed_with_each_kind_of_cache(
    passes: list[int], rehearsals: list[str | None]
) -> None:
    model = coded(llama())
    assert rehearsals == ["int8"]
    given = {"max_new_tokens": 3, "do_sample": False}
    for kv_cache in ("int8", None, None, "int8"):
        model.generate(**prompts(), **given, **{CACHE: IndirectCache(model.config, kv_cache=kv_cache)})
    assert rehearsals == ["int8", None] and not passes


@needs_programs
def test_a_program_that_writes_other_scales_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = coded(llama())
    prove(model)
    assert hfopt.explain(model).by_module is None
    newest = IndirectCache.newest
    calls: list[int] = []

    def differing(self: IndirectCache) -> list[Tensor]:
        found = newest(self)
        calls.append(1)
        if len(calls) == 2:  # after the modules, the program
            found[-1].mul_(1.5)
        return found

    monkeypatch.setattr(IndirectCache, "newest", differing)
    other = coded(llama())
    assert len(calls) >= 2
    assert "other keys and values of a step" in str(hfopt.explain(other).by_module)


@needs_programs
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(name: str, dtype: torch.dtype) -> None:
    model = coded(FAMILIES[name]().to(dtype))
    prove(model)
    for mode in MODES.values():
        results = []
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            results.append(generated(model, mode, max_new_tokens=12, **prompts(5)))
        assert_same_bits(*results)


@pytest.mark.parametrize("cut", [1, 5, 8])
def test_tokens_do_not_depend_on_how_the_prompt_was_cut(cut: int) -> None:
    model = coded(llama())
    ids = prompts(2)["input_ids"].clamp(min=2)
    whole = model.generate(ids, max_new_tokens=20, do_sample=False)
    cache = IndirectCache(model.config, kv_cache="int8")
    with torch.no_grad():
        model(ids[:, :cut], **{CACHE: cache})
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, **{CACHE: cache}), whole)


# ---- what is remembered ----------------------------------------------------------------------------------------------


def made_cache(model: Model, **options: Any) -> Any:
    return cache_of(generated(model, **{"max_new_tokens": 3, "do_sample": False, **options}))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_remembers_it_and_so_do_copies(duplicate: Any) -> None:
    model = coded(llama())
    for each in (model, duplicate(model)):
        assert made_cache(each).kv_cache == "int8"
        report = hfopt.explain(each)
        assert report.kv_cache == "int8" and report.to_dict()["kv_cache"] == "int8"
        assert "keys and values are cached as int8" in str(report)
    assert "keys and values are cached as int8" in str(model.hfopt)


def test_it_is_forgotten() -> None:
    model = coded(llama())
    assert installed(model).kv_cache == "int8"
    hfopt.optimize(model)
    assert made_cache(model).kv_cache is None and installed(model).kv_cache is None
    assert "cached" not in str(hfopt.explain(model))
    hfopt.restore(coded(model))
    assert set(model.__dict__) == set(llama().__dict__)
    assert type(made_cache(model)) is DynamicCache


def test_a_cache_that_is_given_stays_what_it_is() -> None:
    model = coded(llama())
    for given in (IndirectCache(model.config), DynamicCache(config=model.config)):
        assert made_cache(model, **{CACHE: given}) is given
    assert isinstance(
        made_cache(hfopt.optimize(llama()), **{CACHE: IndirectCache(kv_cache="int8")}), IndirectCache
    )


def test_layers_of_a_window_are_coded_too() -> None:
    config = MistralConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=211,
        sliding_window=16,
    )
    model = hfopt.optimize(MistralForCausalLM(config).eval(), kv_cache="int8")
    for max_new_tokens, is_windowed in ((16, True), (2, False)):
        cache = made_cache(model, max_new_tokens=max_new_tokens)
        assert type(cache) is IndirectCache
        for layer in cache.layers:
            assert layer.is_sliding is is_windowed and layer.prefix.dtype is torch.int8
    report = hfopt.explain(model)
    assert report.window == 16 and "layers of a window of 16 tokens cache little more" in str(report)


@pytest.mark.parametrize("kv_cache", ["int4", "INT8", 8, True, torch.int8])
def test_other_kinds_are_refused(kv_cache: Any, tmp_path: Any) -> None:
    model = llama()
    for work in (
        lambda: IndirectCache(kv_cache=kv_cache),
        lambda: hfopt.optimize(model, kv_cache=kv_cache),
        lambda: hfopt.load(tmp_path, kv_cache=kv_cache),
    ):
        with pytest.raises(InvalidInput, match=r"kv_cache = .*: None, 'int8' are allowed"):
            work()
    assert not hasattr(model, "hfopt")


def test_a_model_that_does_not_generate() -> None:
    with pytest.raises(InvalidInput, match="LlamaModel does not generate"):
        hfopt.optimize(llama().model, kv_cache="int8")


def test_load(tmp_path: Any) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    loaded = hfopt.load(tmp_path, kv_cache="int8")
    assert made_cache(loaded).kv_cache == "int8"
    assert "cached as int8" in str(loaded.hfopt)


# ---- the cache -------------------------------------------------------------------------------------------------------


def states(n_rows: int, n_new: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return random_states(n_rows, n_new, dtype), random_states(n_rows, n_new, dtype)


_RANDOM = [*DTYPES, torch.float64]


@pytest.mark.parametrize(
    ("seed", "dtype"),
    # every seed with one dtype, with the others by `make slow`
    [
        pytest.param(seed, dtype, marks=() if seed % len(_RANDOM) == index else pytest.mark.slow)
        for seed in range(40)
        for index, dtype in enumerate(_RANDOM)
    ],
)
@torch.no_grad()
def test_random_operations(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    chance = random.Random(seed)
    config = LlamaConfig(num_hidden_layers=N_LAYERS) if seed % 2 else None
    pair = Pair(IndirectCache(config, kv_cache="int8"), RoundedCache(config=config), dtype)
    pair.update(chance.randint(1, 4), chance.randint(1, 70))
    for _ in range(25):
        kinds = ["update", "update", "reorder", "repeat", "select", "crop", "copy", "pickle"]
        operate(pair, chance, chance.choice(kinds))
    pair.reset()
    assert pair.ours.get_seq_length() == 0 and pair.ours.kv_cache == "int8"
    assert all(layer.prefix_scales is None for layer in pair.ours.layers)
    pair.theirs = RoundedCache(config=config)  # reset() of transformers 4 leaves zeros
    pair.update(3, 5)
    pair.check()


@torch.no_grad()
def test_what_is_stored() -> None:
    cache = IndirectCache(kv_cache="int8")
    keys, values = states(2, 5, torch.bfloat16)
    cache.update(keys, values, 0)
    layer: Any = cache.layers[0]
    assert layer.prefix.dtype == torch.int8 and layer.prefix.shape == (2, 2, N_HEADS, 64, HEAD_DIM)
    assert layer.prefix_scales.dtype == torch.float32 and layer.prefix_scales.shape == (2, 2, N_HEADS, 64)
    codes, scales = cache.newest()
    expected = quantised(torch.stack([keys, values]))
    assert torch.equal(codes, expected[0][:, :, :, -1]) and torch.equal(scales, expected[1][:, :, :, -1])
    cache.reorder_cache(torch.tensor([1, 1]))
    appended = cache.append(0, 2, 1, N_HEADS, HEAD_DIM, torch.bfloat16)
    assert appended.in_suffix and appended.suffix_scales is not None and appended.prefix_scales is not None
    assert appended.suffix.shape[:4] == appended.suffix_scales.shape
    codes, scales = cache.newest()
    codes.fill_(3)
    scales.fill_(0.5)
    assert (layer.keys[:, :, -1] == 1.5).all() and (layer.values[:, :, -1] == 1.5).all()
    assert not (layer.keys[:, :, :-1] == 1.5).all()


def test_keys_that_autograd_records_and_what_follows() -> None:
    cache = IndirectCache(kv_cache="int8")
    keys, values = states(2, 3, torch.float32)
    cache.update(keys.requires_grad_(), values, 0)  # as they are: a plain layer
    layer: Any = cache.layers[0]
    assert layer.prefix is None and torch.equal(layer.keys, keys)
    with torch.no_grad():
        more = states(2, 1, torch.float32)
        found, _ = cache.update(*more, 0)
        assert layer.prefix is not None
        assert torch.equal(found, rounded(torch.cat([keys, more[0]], 2)))
    cache.update(*states(2, 1, torch.float32), 0)
    assert layer.prefix is None and torch.equal(layer.keys[:, :, :4], found)


def test_memory_is_counted_with_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_UNCHECKED_BYTES", 0)
    one_layer = 64 * 2 * N_HEADS * (HEAD_DIM + 4)
    cache = IndirectCache(LlamaConfig(num_hidden_layers=N_LAYERS), kv_cache="int8")
    monkeypatch.setattr(storage, "available_memory", lambda: one_layer * N_LAYERS - 1)
    with pytest.raises(CacheFull, match=f"{one_layer * N_LAYERS:,} bytes more"):
        cache.append(0, 1, 5, N_HEADS, HEAD_DIM, torch.float32)
    monkeypatch.setattr(storage, "available_memory", lambda: one_layer * N_LAYERS)
    cache.append(0, 1, 5, N_HEADS, HEAD_DIM, torch.float32)
    layer: Any = cache.layers[0]
    assert layer.prefix.nbytes + layer.prefix_scales.nbytes == one_layer


def test_gptj_in_a_prompt_of_many_tokens() -> None:
    """More tokens than a block of keys has."""
    assert_same_results(gptj(), MODES["greedy"], **prompts(2, 80), max_new_tokens=10)
