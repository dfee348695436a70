"""IndirectCache against DynamicCache: every method, and unpatched models that generate with it."""

import copy
import io
import pickle
import random
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    cache_utils,
)

from hfopt.cache import Appended, IndirectCache, storage
from hfopt.errors import CacheFull, InvalidInput
from hfopt.machine import memory
from tests import cache_cases, fake_machine
from tests.cache_cases import HEAD_DIM, N_HEADS, N_LAYERS, operate, random_states
from tests.generation_cases import CACHE, cache_of
from tests.reference import bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def without_autograd():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def dynamic_cache(*args: Any, **kwargs: Any) -> Any:
    """The oracle. Untyped, as transformers says that its layers may be anything."""
    return DynamicCache(*args, **kwargs)


class Pair(cache_cases.Pair):
    """The same operations on both caches."""

    def __init__(self, dtype: torch.dtype = torch.float32, config: LlamaConfig | None = None) -> None:
        super().__init__(IndirectCache(config), dynamic_cache(config=config), dtype)

    def append(self, n_rows: int, n_new: int) -> None:
        """As kernels do: into the arrays."""
        for layer_idx in range(N_LAYERS):
            keys, values = random_states(n_rows, n_new, self.dtype), random_states(n_rows, n_new, self.dtype)
            self.theirs.update(keys, values, layer_idx)
            write(self.ours.append(layer_idx, n_rows, n_new, N_HEADS, HEAD_DIM, self.dtype), keys, values)


def write(appended: Appended, keys: torch.Tensor, values: torch.Tensor) -> None:
    """What a kernel does with new keys and values."""
    length = appended.suffix_len if appended.in_suffix else appended.prefix_len
    storage = appended.suffix if appended.in_suffix else appended.prefix
    for which, states in enumerate((keys, values)):
        storage[which, : len(states), :, length - appended.n_new : length] = bits(states)


def read(appended: Appended, which: int) -> np.ndarray:
    """What a kernel reads, by the definition in Appended, one token at a time."""
    n_rows, length = len(appended.prefix_row), appended.prefix_len + appended.suffix_len
    found = np.empty((n_rows, N_HEADS, length, HEAD_DIM), appended.prefix.dtype)
    for r in range(n_rows):
        for t in range(length):
            b = t - appended.prefix_len
            found[r, :, t] = (
                appended.prefix[which, appended.prefix_row[r], :, t]
                if b < 0
                else appended.suffix[which, appended.table[r, b], :, b]
            )
    return found


def n_maps(cache: IndirectCache) -> int:
    return len({id(layer.rows) for layer in cache.layers})


def pointers(cache: IndirectCache) -> list[int]:
    return [buffer.data_ptr() for layer in cache.layers for buffer in (layer.prefix, layer.suffix)]


# Every method against DynamicCache


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(DTYPES), with_config=st.booleans())
def test_random_operations_give_what_dynamic_cache_gives(seed, dtype, with_config):
    torch.manual_seed(seed)
    chance = random.Random(seed)
    pair = Pair(dtype, LlamaConfig(num_hidden_layers=N_LAYERS) if with_config else None)
    pair.update(chance.randint(1, 4), chance.randint(1, 70))
    for _ in range(25):
        kinds = ["update", "append", "reorder", "reorder", "repeat", "select", "crop", "reset", "copy"]
        operate(pair, chance, chance.choice(kinds))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_what_kernels_read_is_what_was_written(dtype):
    torch.manual_seed(0)
    pair = Pair(dtype)
    pair.append(3, 7)
    for step in range(70):
        pair.both("reorder_cache", torch.randint(0, 3, (3,)))
        pair.append(3, 1 + step % 2)
    pair.check()
    for layer_idx in range(N_LAYERS):
        appended = pair.ours.append(layer_idx, 3, 0, N_HEADS, HEAD_DIM, dtype)
        assert appended.prefix_row.dtype == appended.table.dtype == np.int32
        assert appended.table.flags.c_contiguous
        assert appended.prefix.flags.c_contiguous
        assert appended.suffix.flags.c_contiguous
        assert np.array_equal(read(appended, 0), bits(pair.theirs.layers[layer_idx].keys))
        assert np.array_equal(read(appended, 1), bits(pair.theirs.layers[layer_idx].values))


def test_arrays_are_the_storage_and_keys_see_what_is_written():
    cache = IndirectCache()
    appended = cache.append(0, 2, 3, N_HEADS, HEAD_DIM, torch.bfloat16)
    keys, values = random_states(2, 3, torch.bfloat16), random_states(2, 3, torch.bfloat16)
    assert appended.prefix.dtype == np.uint16
    assert appended.suffix.shape == (2, 1, N_HEADS, 0, HEAD_DIM)
    assert (appended.prefix_len, appended.suffix_len, appended.in_suffix, appended.n_new) == (3, 0, False, 3)
    write(appended, keys, values)
    assert torch.equal(cache.layers[0].keys, keys)
    assert torch.equal(cache.layers[0].values, values)
    assert appended.prefix.ctypes.data == cache.layers[0].prefix.data_ptr()


def test_reordering_moves_nothing():
    pair = Pair()
    pair.update(4, 10)
    pair.both("reorder_cache", torch.tensor([2, 2, 0, 3]))
    pair.update(4, 1)
    before = pointers(pair.ours)

    def stored() -> list[torch.Tensor]:
        return [
            tokens.clone()
            for layer in pair.ours.layers
            for tokens in (layer.prefix[..., :10, :], layer.suffix[..., :1, :])
        ]

    stored_before = stored()
    for indices in ([1, 0, 0, 2], [3, 3, 3, 3], [0, 1, 2, 3]):
        pair.both("reorder_cache", torch.tensor(indices))
        pair.update(4, 1)
    assert pointers(pair.ours) == before
    for tokens, tokens_before in zip(stored(), stored_before, strict=True):
        assert torch.equal(tokens, tokens_before)


def test_update_returns_a_view_until_rows_diverge():
    cache = IndirectCache()
    for n_new in (5, 1, 1):
        keys, _ = cache.update(random_states(2, n_new), random_states(2, n_new), 0)
        assert keys.data_ptr() == cache.layers[0].prefix.data_ptr()
    cache.reorder_cache(torch.tensor([0, 1]))  # nothing changes places: still no suffix
    keys, _ = cache.update(random_states(2, 1), random_states(2, 1), 0)
    assert keys.data_ptr() == cache.layers[0].prefix.data_ptr()


@pytest.mark.parametrize("removed", [1, 3, 4, 5, 9, 14, 20])
def test_crop_at_the_boundary_of_suffix_and_prefix(removed):
    pair = Pair()
    pair.update(3, 10)
    pair.both("reorder_cache", torch.tensor([1, 1, 2]))
    pair.update(3, 2)
    pair.both("reorder_cache", torch.tensor([2, 0, 1]))
    pair.update(3, 2)
    pair.both("crop", -removed)
    pair.check()
    pair.update(3, 3)
    pair.both("reorder_cache", torch.tensor([2, 1, 0]))
    pair.update(3, 1)
    pair.check()
    assert n_maps(pair.ours) == 1


def test_crop_to_a_positive_length_is_refused_as_in_dynamic_cache():
    pair = Pair()
    pair.update(1, 5)
    with pytest.raises(ValueError, match="positive"):
        pair.theirs.crop(3)
    with pytest.raises(ValueError, match="tokens_to_remove = 3"):
        pair.ours.crop(3)
    pair.check()


def test_growth_past_every_size():
    pair = Pair()
    pair.update(2, 60)
    for _ in range(150):
        pair.update(2, 1)
    pair.both("reorder_cache", torch.tensor([1, 0]))
    for _ in range(150):
        pair.update(2, 1)
    pair.both("batch_repeat_interleave", 3)  # the suffix needs more rows, not more columns
    pair.update(6, 1)
    pair.check()


def test_reordering_between_two_layers_of_a_step():
    """A layer that lags behind takes its token after the others have been reordered."""
    pair = Pair()
    pair.update(3, 4)
    pair.both("reorder_cache", torch.tensor([2, 0, 0]))
    pair.update(3, 1)
    pair.update(3, 1, range(1))
    pair.both("reorder_cache", torch.tensor([1, 2, 0]))
    pair.update(3, 1, range(1, N_LAYERS))
    pair.both("reorder_cache", torch.tensor([2, 2, 1]))
    pair.update(3, 1)
    pair.both("crop", -1)
    pair.check()
    pair.update(3, 2)


def test_methods_of_a_single_layer():
    pair = Pair()
    pair.update(3, 4)
    for reordered in (False, True):
        if reordered:
            pair.both("reorder_cache", torch.tensor([2, 0, 0]))
            pair.update(3, 3)
        for cache in (pair.ours, pair.theirs):
            cache.layers[1].reorder_cache(torch.tensor([1, 1, 2]))
            cache.layers[1].crop(-2)
            cache.layers[2].batch_repeat_interleave(2)
            cache.layers[2].batch_select_indices(torch.tensor([0, 4, 5]))
        pair.check()
        pair.update(3, 1)
    pair.both("reorder_cache", torch.tensor([0, 2, 1]))
    pair.check()


def test_cropping_a_single_layer_leaves_the_others():
    pair = Pair()
    pair.update(3, 4)
    for _ in range(3):
        pair.both("reorder_cache", torch.tensor([2, 0, 0]))
        pair.update(3, 1)
    pair.both("reorder_cache", torch.tensor([1, 2, 0]))
    for cache in (pair.ours, pair.theirs):
        cache.layers[1].crop(-2)
    pair.update(3, 1)
    pair.check()
    for cache in (pair.ours, pair.theirs):
        cache.layers[1].crop(-pair.theirs.get_seq_length(1))
        cache.layers[1].batch_repeat_interleave(2)  # ignored: it is empty
    pair.update(3, 1)
    pair.check()


@pytest.mark.parametrize("indices", [[2, 0, 0], [0, 1, 2]])
def test_layers_that_start_late(indices):
    pair = Pair(config=LlamaConfig(num_hidden_layers=N_LAYERS))
    pair.update(3, 4, range(1))
    pair.both("reorder_cache", torch.tensor(indices))
    pair.update(3, 2, range(2))
    pair.update(5, 2, range(2, 3))
    pair.update(5, 1, range(2, 3))
    pair.check()
    assert [layer.prefix_len for layer in pair.ours.layers][1:] == [2, 3]


@pytest.mark.parametrize("indices", [torch.tensor([True, False, True]), [2, 0], torch.tensor([-1])])
def test_select_takes_what_indexing_takes(indices):
    pair = Pair()
    pair.update(3, 4)
    pair.both("batch_select_indices", indices)
    pair.check()


def test_rows_that_do_not_exist_are_refused():
    cache = IndirectCache()
    cache.update(random_states(3, 4), random_states(3, 4), 0)
    with pytest.raises(IndexError):
        cache.reorder_cache(torch.tensor([0, 1, 3]))
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([3]))


def test_the_rest_of_the_interface():
    config = LlamaConfig(num_hidden_layers=N_LAYERS)
    pair = Pair(config=config)
    for _ in range(2):
        for attribute in (
            "is_initialized",
            "is_sliding",
            "is_linear",
            "is_dummy",
            "is_compileable",
            "is_croppable",
        ):
            assert getattr(pair.ours, attribute) == getattr(pair.theirs, attribute)
        assert pair.ours.batch_size == pair.theirs.batch_size
        for method in ("get_max_length", "get_max_cache_shape"):
            if hasattr(pair.theirs, method):
                assert getattr(pair.ours, method)() == getattr(pair.theirs, method)()
        assert pair.ours.get_query_offset() == pair.theirs.get_query_offset()
        assert pair.ours.is_recording_past(0) == pair.theirs.is_recording_past(0)
        pair.ours.activate_past_recording()
        pair.check()
        pair.update(2, 5)
    pair.ours.offload(1)
    pair.ours.layers[1].prefetch()
    assert pointers(pair.ours)
    rebuilt = dynamic_cache(iter(pair.ours))
    assert torch.equal(rebuilt.layers[2].values, pair.theirs.layers[2].values)
    pair.check()


def test_early_initialization():
    pair = Pair(config=LlamaConfig(num_hidden_layers=N_LAYERS))
    for cache in (pair.ours, pair.theirs):
        cache.early_initialization(2, N_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    pair.check()
    pair.update(2, 3)
    pair.check()


def test_reset_lets_another_batch_in_and_releases_memory():
    pair = Pair()
    pair.update(3, 100)
    pair.both("reorder_cache", torch.tensor([0, 0, 1]))
    pair.update(3, 1)
    pair.ours.layers[1].crop(-1)
    pair.ours.reset()
    pair.theirs.reset()
    assert pair.ours.n_rows == 0
    assert all(layer.prefix is None for layer in pair.ours.layers)
    pair.check()
    pair.update(2, 4)
    assert n_maps(pair.ours) == 1
    pair.both("reorder_cache", torch.tensor([1, 1]))
    pair.update(2, 1)
    pair.check()


def test_empty_caches_ignore_rearrangement():
    pair = Pair(config=LlamaConfig(num_hidden_layers=N_LAYERS))
    pair.both("reorder_cache", torch.tensor([1, 0]))
    pair.both("batch_repeat_interleave", 3)
    pair.both("crop", -1)
    pair.check()
    pair.update(2, 3)
    pair.both("crop", -3)
    pair.both("batch_repeat_interleave", 3)
    pair.update(2, 3)
    pair.check()


def pickled(cache: IndirectCache) -> IndirectCache:
    return pickle.loads(pickle.dumps(cache))


def saved(cache: IndirectCache) -> IndirectCache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_config", [False, True])
def test_a_duplicate_goes_its_own_way(duplicate, dtype, with_config):
    pair = Pair(dtype, LlamaConfig(num_hidden_layers=N_LAYERS) if with_config else None)
    pair.update(3, 4)
    pair.both("reorder_cache", torch.tensor([2, 0, 0]))
    pair.update(3, 2)
    pair.ours.memo("mask", torch.ones(1), threading.Lock)  # what kernels note down is not for a file
    other = Pair(dtype)
    other.ours, other.theirs = duplicate(pair.ours), copy.deepcopy(pair.theirs)
    other.both("reorder_cache", torch.tensor([1, 1, 2]))
    other.append(3, 1)
    other.check()
    pair.append(3, 3)
    pair.check()
    other.both("reorder_cache", torch.tensor([0, 2, 1]))
    assert n_maps(other.ours) == 1


# Sharing prompts


def prompts_and_continuation(how: str, n_new: int = 3) -> tuple[IndirectCache, Any]:
    ours, theirs = IndirectCache(copies=4), dynamic_cache()
    for layer_idx in range(N_LAYERS):
        for chunk in (4, 3):  # as `prefill_chunk_size` brings them
            keys, values = random_states(2, chunk), random_states(2, chunk)
            ours.update(keys, values, layer_idx)
            theirs.update(keys, values, layer_idx)
    assert (ours.copies, ours.n_rows) == (4, 2)
    theirs.batch_repeat_interleave(4)
    if how == "fork":
        ours.fork()
        ours.fork()
        assert (ours.copies, ours.n_rows) == (1, 8)
    for layer_idx in range(N_LAYERS):
        keys, values = random_states(8, n_new), random_states(8, n_new)
        theirs.update(keys, values, layer_idx)
        if how == "append":
            write(ours.append(layer_idx, 8, n_new, N_HEADS, HEAD_DIM, torch.float32), keys, values)
        else:
            ours.update(keys, values, layer_idx)
    return ours, theirs


@pytest.mark.parametrize("how", ["fork", "append", "update"])
def test_a_prompt_is_stored_once(how):
    ours, theirs = prompts_and_continuation(how)
    assert (ours.copies, ours.n_rows) == (1, 8)
    indices = torch.tensor([3, 3, 0, 1, 6, 7, 5, 5])
    ours.reorder_cache(indices)
    theirs.reorder_cache(indices)
    for mine, his in zip(ours.layers, theirs.layers, strict=True):
        assert mine.prefix.shape[1] == 2
        assert torch.equal(mine.keys, his.keys)
        assert torch.equal(mine.values, his.values)


@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("reorder_cache", torch.tensor([2, 1, 0, 5, 4, 3])),
        ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([4, 1])),
    ],
)
def test_rearranging_prompts_forks_them_first(method, argument):
    ours, theirs = IndirectCache(copies=3), dynamic_cache()
    keys, values = random_states(2, 5), random_states(2, 5)
    ours.update(keys, values, 0)
    theirs.update(keys.repeat_interleave(3, 0), values.repeat_interleave(3, 0), 0)
    getattr(ours, method)(argument)
    getattr(theirs, method)(argument)
    assert ours.copies == 1
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)


def test_beams_that_brought_their_own_prompts_are_not_forked():
    cache = IndirectCache(copies=3)
    keys = random_states(6, 5)
    cache.update(keys, keys, 0)
    indices = torch.tensor([1, 1, 2, 5, 4, 3])
    cache.reorder_cache(indices)
    assert (cache.copies, cache.n_rows) == (1, 6)
    assert torch.equal(cache.layers[0].keys, keys[indices])


def test_forking_layers_that_are_plain():
    cache = IndirectCache(copies=2)
    keys, values = random_states(2, 5), random_states(2, 5, head_dim=8)
    cache.update(keys, values, 0)
    cache.update(keys, keys, 1)
    cache.update(random_states(4, 1), random_states(4, 1, head_dim=8), 0)
    cache.update(random_states(4, 1), random_states(4, 1), 1)
    assert torch.equal(cache.layers[0].values[:, :, :5], values.repeat_interleave(2, 0))
    assert torch.equal(cache.layers[1].keys[:, :, :5], keys.repeat_interleave(2, 0))


def test_copies_below_one():
    with pytest.raises(InvalidInput, match="copies = 0"):
        IndirectCache(copies=0)


# What the buffers cannot hold


def test_values_of_another_size_than_keys():
    ours, theirs = IndirectCache(), dynamic_cache()
    for step in range(3):
        keys, values = random_states(3, 4), random_states(3, 4, head_dim=16)
        for cache in (ours, theirs):
            cache.update(keys, values, 0)
            cache.reorder_cache(torch.tensor([1, 0, step]))
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
    assert torch.equal(ours.layers[0].values, theirs.layers[0].values)
    with pytest.raises(InvalidInput, match="n_rows = 3"):
        ours.append(0, 3, 1, N_HEADS, HEAD_DIM, torch.float32)


def test_dtypes_mix_as_torch_mixes_them():
    ours, theirs = IndirectCache(), dynamic_cache()
    for dtype in (torch.bfloat16, torch.float32):
        keys, values = random_states(2, 3, dtype), random_states(2, 3, dtype)
        ours.update(keys, values, 0)
        theirs.update(keys, values, 0)
    assert ours.layers[0].keys.dtype == torch.float32
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)


def test_keys_assigned_from_outside_are_kept_and_can_be_continued():
    pair = Pair()
    pair.update(2, 6)
    for cache in (pair.ours, pair.theirs):
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]
    pair.check()
    pair.append(2, 2)
    pair.both("reorder_cache", torch.tensor([1, 1]))
    pair.append(2, 1)
    pair.check()
    assert n_maps(pair.ours) == 1


def test_gradients_flow_through_a_cache():
    gradients = []
    for cache in (IndirectCache(), dynamic_cache()):
        torch.manual_seed(0)
        with torch.enable_grad():
            weight = torch.randn(HEAD_DIM, HEAD_DIM, requires_grad=True)
            total = torch.zeros(())
            for _ in range(3):
                keys, values = cache.update(random_states(2, 2) @ weight, random_states(2, 2), 0)
                total = total + (keys * keys).sum() * values.sum()
            total.backward()
        assert weight.grad is not None
        gradients.append(weight.grad)
        keys = random_states(2, 1)
        cache.update(
            keys, keys, 0
        )  # and what was read while autograd recorded is a prefix for what comes after
    assert torch.equal(*gradients)


def test_appending_to_keys_that_autograd_recorded():
    cache = IndirectCache()
    with torch.enable_grad():
        keys = random_states(2, 3).requires_grad_()
        cache.update(keys, keys, 0)
        appended = cache.append(0, 2, 1, N_HEADS, HEAD_DIM, torch.float32)
    assert np.array_equal(appended.prefix[0, :, :, :3], keys.detach().numpy())
    assert not cache.layers[0].keys.requires_grad


def test_inference_mode_inside_and_outside():
    pair = Pair()
    with torch.inference_mode():
        pair.update(2, 3)
        pair.both("reorder_cache", torch.tensor([1, 1]))
        pair.update(2, 1)
    pair.update(2, 1)
    pair.both("reorder_cache", torch.tensor([1, 0]))
    pair.append(2, 1)
    pair.check()


class OtherLayer(cache_utils.DynamicSlidingWindowLayer):
    pass


def test_layers_of_other_kinds_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "sliding_attention", OtherLayer)
    config = MistralConfig(num_hidden_layers=2, sliding_window=4)
    ours, theirs = IndirectCache(config), dynamic_cache(config=config)
    for n_new in (3, 1, 1, 1):
        keys, values = random_states(2, n_new), random_states(2, n_new)
        ours.update(keys, values, 0)
        theirs.update(keys, values, 0)
    assert ours.is_sliding == theirs.is_sliding == [True, True]
    ours.reorder_cache(torch.tensor([1, 0]))
    theirs.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
    with pytest.raises(InvalidInput, match="OtherLayer"):
        ours.append(0, 2, 1, N_HEADS, HEAD_DIM, torch.float32)


def test_appends_that_do_not_fit():
    cache = IndirectCache()
    cache.append(0, 3, 4, N_HEADS, HEAD_DIM, torch.float32)
    for n_rows, n_kv_heads, head_dim, dtype in (
        (2, N_HEADS, HEAD_DIM, torch.float32),
        (3, N_HEADS + 1, HEAD_DIM, torch.float32),
        (3, N_HEADS, HEAD_DIM + 1, torch.float32),
        (3, N_HEADS, HEAD_DIM, torch.bfloat16),
    ):
        with pytest.raises(InvalidInput, match=f"n_rows = {n_rows}"):
            cache.append(0, n_rows, 1, n_kv_heads, head_dim, dtype)
    with pytest.raises(InvalidInput, match="int8"):
        cache.append(1, 3, 1, N_HEADS, HEAD_DIM, torch.int8)
    assert cache.get_seq_length() == 4


# Memory


def test_a_request_beyond_memory_changes_nothing():
    cache = IndirectCache(LlamaConfig(num_hidden_layers=N_LAYERS))
    with pytest.raises(CacheFull, match=r"[\d,]{20,} bytes more; [\d,]+ bytes are available"):
        cache.append(0, 4, 10**12, N_HEADS, HEAD_DIM, torch.float32)
    assert (cache.n_rows, cache.is_initialized) == (0, False)
    keys, values = random_states(2, 4), random_states(2, 4)
    cache.update(keys, values, 0)
    with pytest.raises(CacheFull):
        cache.append(0, 2, 10**12, N_HEADS, HEAD_DIM, torch.float32)
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(MemoryError):
        cache.append(0, 2, 10**12, N_HEADS, HEAD_DIM, torch.float32)
    assert torch.equal(cache.layers[0].keys, keys[[1, 0]])
    assert torch.equal(cache.layers[0].values, values[[1, 0]])


def test_growth_is_modest_when_memory_is_short(monkeypatch):
    column_bytes = 2 * N_HEADS * HEAD_DIM * 4
    monkeypatch.setattr(storage, "_UNCHECKED_BYTES", 0)
    cache = IndirectCache()
    cache.append(0, 1, 640, N_HEADS, HEAD_DIM, torch.float32)
    monkeypatch.setattr(storage, "available_memory", lambda: 704 * column_bytes)
    assert cache.append(0, 1, 1, N_HEADS, HEAD_DIM, torch.float32).prefix.shape[3] == 704
    with pytest.raises(
        CacheFull, match=f"{768 * column_bytes:,} bytes more; {704 * column_bytes:,} bytes are"
    ):
        cache.append(0, 1, 64, N_HEADS, HEAD_DIM, torch.float32)
    assert cache.get_seq_length() == 641


def test_the_first_layer_asks_for_all(monkeypatch):
    monkeypatch.setattr(storage, "_UNCHECKED_BYTES", 0)
    one_layer = 64 * 2 * N_HEADS * HEAD_DIM * 4
    monkeypatch.setattr(storage, "available_memory", lambda: one_layer * N_LAYERS - 1)
    cache = IndirectCache(LlamaConfig(num_hidden_layers=N_LAYERS))
    with pytest.raises(CacheFull, match=f"{one_layer * N_LAYERS:,} bytes more"):
        cache.append(0, 1, 5, N_HEADS, HEAD_DIM, torch.float32)


CGROUP_2 = {
    "/proc/self/cgroup": "0::/job/task\n",
    "/proc/self/mountinfo": fake_machine.SECOND,
    "job/memory.max": "5000\n",
    "job/memory.current": "3000\n",
    "job/memory.stat": "anon 100\ninactive_file 700\n",
    "job/task/memory.max": "max\n",
    "job/task/memory.current": "2000\n",
}
CGROUP_1 = {
    "/proc/self/cgroup": "7:cpu:/\n5:memory,hugetlb:/not/here\n",
    "/proc/self/mountinfo": fake_machine.FIRST,
    "memory/memory.limit_in_bytes": "4000\n",
    "memory/memory.usage_in_bytes": "1500\n",
    "memory/memory.stat": "total_inactive_file 500\n",
}


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, sys.maxsize),
        ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   2 kB\n"}, 2048),
        ({"/proc/meminfo": "MemAvailable: 2 kB\n", **CGROUP_2}, 2048),
        ({"/proc/meminfo": "MemAvailable: 3 kB\n", **CGROUP_2}, 2700),
        (CGROUP_1, 3000),
        ({**CGROUP_1, "memory/memory.usage_in_bytes": "9000\n"}, 0),
    ],
)
def test_available_memory(tmp_path, files, available):
    fake_machine.write(tmp_path, files)
    assert memory.available_memory(tmp_path) == available


def test_available_memory_of_this_machine():
    assert 1 << 20 < memory.available_memory() <= sys.maxsize


# Notes of a step


def test_memo():
    cache = IndirectCache()
    built: list[int] = []

    def build() -> int:
        built.append(len(built))
        return built[-1]

    mask, other = torch.ones(2), torch.ones(2)
    assert [cache.memo("mask", mask, build) for _ in range(3)] == [0, 0, 0]
    assert cache.memo("rotary", mask, build) == 1
    assert [cache.memo("mask", other, build), cache.memo("mask", mask, build)] == [2, 3]
    assert [cache.memo("mask", None, build), cache.memo("mask", None, build)] == [4, 5]
    assert cache.memo("mask", mask, build) == 6


# Unpatched models

VOCABULARY = 120


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=64,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def gptj() -> PreTrainedModel:
    return GPTJForCausalLM(
        GPTJConfig(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_inner=96,
            n_layer=2,
            n_head=4,
            rotary_dim=8,
            n_positions=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


@pytest.fixture(scope="module", params=[llama, opt, gptj], ids=lambda build: build.__name__)
def model(request) -> Any:
    torch.manual_seed(0)
    model = request.param().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # small random weights repeat one token for ever
    return model


def padded_prompts(n_rows: int, length: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (n_rows, length))
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, n_rows):
        attention_mask[row, : 2 * row] = 0
        input_ids[row, : 2 * row] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def generated(model: Any, cache: Any, inputs: dict[str, torch.Tensor], **kwargs):
    return model.generate(
        **inputs, **{CACHE: cache}, min_new_tokens=1, pad_token_id=0, do_sample=False, **kwargs
    )


@pytest.mark.parametrize(
    ("n_rows", "kwargs"),
    [
        (3, {"max_new_tokens": 80}),
        (3, {"num_beams": 4, "max_new_tokens": 50}),
        (2, {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 20, "length_penalty": 0.3}),
        (1, {"prompt_lookup_num_tokens": 3, "max_new_tokens": 40}),
        (3, {"prefill_chunk_size": 4, "max_new_tokens": 20}),
        (2, {"prefill_chunk_size": 5, "num_beams": 4, "max_new_tokens": 20}),
    ],
    ids=["greedy", "beams", "all beams", "prompt lookup", "chunks", "chunks and beams"],
)
def test_tokens_of_unpatched_models(model, n_rows, kwargs):
    inputs = padded_prompts(n_rows, 13)
    if "prompt_lookup_num_tokens" in kwargs:
        inputs = {name: tensor.repeat(1, 3) for name, tensor in inputs.items()}  # something to look up
    expected = generated(model, dynamic_cache(config=model.config), inputs, **kwargs)
    cache = IndirectCache(model.config)
    assert torch.equal(generated(model, cache, inputs, **kwargs), expected)
    assert cache.layers[0].prefix is not None
    assert expected[:, inputs["input_ids"].shape[1] :].unique().numel() > 5


@pytest.mark.parametrize("num_beams", [1, 4])
def test_continuing_from_a_returned_cache(model, num_beams):
    """One turn of a conversation after another, the second with two new tokens and the cache of the first."""
    tokens = []
    for cache in (IndirectCache(), dynamic_cache()):
        inputs = padded_prompts(1 if num_beams > 1 else 2, 11)
        first = generated(
            model,
            cache,
            inputs,
            max_new_tokens=10,
            eos_token_id=None,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            return_dict_in_generate=True,
        )
        assert cache_of(first) is cache
        turn = torch.tensor([[5, 9]]).expand(len(first.sequences), 2)
        input_ids = torch.cat([first.sequences, turn], dim=1)
        padding = inputs["attention_mask"].repeat_interleave(num_beams, 0)
        attention_mask = torch.nn.functional.pad(padding, (0, input_ids.shape[1] - padding.shape[1]), value=1)
        second = generated(
            model, cache, {"input_ids": input_ids, "attention_mask": attention_mask}, max_new_tokens=10
        )
        tokens.append(second)
    assert torch.equal(*tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision(model, dtype):
    """Tokens could hide behind ties; the logits of each step may not differ in a single bit."""
    model = copy.deepcopy(model).to(dtype)
    inputs = padded_prompts(2, 9)
    outputs = [
        generated(
            model,
            cache,
            inputs,
            num_beams=3,
            max_new_tokens=12,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for cache in (IndirectCache(), dynamic_cache())
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for mine, his in zip(outputs[0].logits, outputs[1].logits, strict=True):
        assert torch.equal(mine, his)


def test_in_an_encoder_decoder_cache():
    pair: Any = EncoderDecoderCache(IndirectCache(), IndirectCache())
    keys, values = random_states(2, 3), random_states(2, 3)
    pair.self_attention_cache.update(keys, values, 0)
    pair.cross_attention_cache.update(keys, values, 0)
    pair.batch_repeat_interleave(2)
    pair.reorder_cache(torch.tensor([3, 0, 1, 2]))
    pair.crop(-1)
    assert torch.equal(pair.self_attention_cache.layers[0].keys, keys[[1, 0, 0, 1], :, :2])


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="a kernel with huge pages is needed",
)
def test_large_buffers_ask_for_huge_pages():
    cache = IndirectCache()
    appended = cache.append(0, 1, 4096, 8, 64, torch.float32)
    middle = appended.prefix.ctypes.data + appended.prefix.nbytes // 2
    flags = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= middle < end
        elif inside and first == "VmFlags:":
            flags = line.split()[1:]
    assert flags is not None and "hg" in flags
