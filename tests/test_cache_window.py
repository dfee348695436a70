"""IndirectCache with layers of a window against DynamicCache, and what it keeps of a long text."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, MistralConfig, Qwen2Config

from hfopt import functional
from hfopt.cache import Appended, IndirectCache, storage
from hfopt.cache.window import WindowLayer
from hfopt.errors import CacheFull, InvalidInput
from hfopt.functional import Mask, Scoring
from tests import cache_cases
from tests.cache_cases import HEAD_DIM, N_HEADS, N_LAYERS, operate, random_states

DTYPES = [torch.float32, torch.bfloat16]
WINDOWS = [2, 3, 8, 17, 60, 150]


@pytest.fixture(autouse=True)
def without_autograd() -> Any:
    with torch.no_grad():
        yield


def config_of(window: int, n_full: int = 0) -> Any:
    """Of a model whose first n_full layers have no window."""
    if not n_full:
        return MistralConfig(num_hidden_layers=N_LAYERS, sliding_window=window)
    return Qwen2Config(
        num_hidden_layers=N_LAYERS,
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=n_full,
    )


class Pair(cache_cases.Pair):
    """The same operations on both caches."""

    def __init__(self, config: Any, dtype: torch.dtype = torch.float32, *, is_recorded: bool = False) -> None:
        super().__init__(IndirectCache(config), DynamicCache(config=config), dtype)
        self.window, self.is_recorded, self.n_since = config.sliding_window, is_recorded, 0
        if is_recorded:
            self.ours.activate_past_recording()
            self.theirs.activate_past_recording()

    def update(self, n_rows: int, n_new: int, layers: range = range(N_LAYERS)) -> None:
        super().update(n_rows, n_new, layers)
        self.n_since += n_new

    def append(self, n_rows: int, n_new: int) -> None:
        """As kernels do: into the arrays, from which they read."""
        for layer_idx in range(N_LAYERS):
            keys, values = random_states(n_rows, n_new, self.dtype), random_states(n_rows, n_new, self.dtype)
            expected = self.theirs.update(keys, values, layer_idx)
            appended = self.ours.append(layer_idx, n_rows, n_new, N_HEADS, HEAD_DIM, self.dtype)
            write(appended, keys, values)
            for which, states in enumerate(expected):
                assert np.array_equal(read(appended, which), bits(states))
        self.n_since += n_new

    def both(self, method: str, argument: Any) -> None:
        if method == "crop":
            # without records theirs crops no longer text; with them, no more than what came since the last crop
            most = self.n_since if self.is_recorded else self.window - 1 - self.theirs.get_seq_length()
            if not self.is_recorded and most < 0:
                return
            argument, self.n_since = -min(-argument, most if self.is_recorded else -argument), 0
        super().both(method, argument)


def bits(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def write(appended: Appended, keys: Tensor, values: Tensor) -> None:
    """What a kernel does with new keys and values."""
    length = appended.suffix_len if appended.in_suffix else appended.prefix_len
    storage = appended.suffix if appended.in_suffix else appended.prefix
    end = length - appended.starts[appended.in_suffix]
    for which, states in enumerate((keys, values)):
        storage[which, : len(states), :, end - appended.n_new : end] = bits(states)


def read(appended: Appended, which: int) -> np.ndarray:
    """What a kernel reads, by the definition in Appended, one token at a time."""
    n_rows = len(appended.prefix_row)
    found = np.empty((n_rows, N_HEADS, appended.n_keys, HEAD_DIM), appended.prefix.dtype)
    for r in range(n_rows):
        for t in range(appended.n_keys):
            a = t + appended.skipped
            b = a - appended.prefix_len
            if b < 0:
                assert a >= appended.starts[0]
                token = appended.prefix[which, appended.prefix_row[r], :, a - appended.starts[0]]
            else:
                assert b >= appended.starts[1]
                token = appended.suffix[which, appended.table[r, b], :, b - appended.starts[1]]
            found[r, :, t] = token
    return found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    window=st.sampled_from(WINDOWS),
    n_full=st.integers(0, N_LAYERS - 1),
    is_recorded=st.booleans(),
)
def test_any_sequence_of_operations(
    seed: int, dtype: torch.dtype, window: int, n_full: int, is_recorded: bool
) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    pair = Pair(config_of(window, n_full), dtype, is_recorded=is_recorded)
    pair.update(chance.randint(1, 3), chance.randint(1, 2 * window))
    kinds = ["update", "append", "append", "reorder", "repeat", "select", "crop", "copy", "pickle"]
    for _ in range(12):
        operate(pair, chance, chance.choice(kinds))


def test_what_it_says_of_itself() -> None:
    config = config_of(8, 1)
    ours, theirs = IndirectCache(config), DynamicCache(config=config)
    assert ours.is_sliding == theirs.is_sliding == [False, True, True]
    assert [each.get_max_length() for each in ours.layers] == [
        each.get_max_length() for each in theirs.layers
    ]
    assert [isinstance(each, WindowLayer) for each in ours.layers] == ours.is_sliding


def filled(config: Any, n_tokens: int, n_new: int, *, copies: int = 1, **options: Any) -> IndirectCache:
    """A cache that has been given n_tokens, n_new at once, and then 300 one by one."""
    cache = IndirectCache(config, copies=copies, **options)
    layouts = [(N_HEADS, HEAD_DIM, torch.float32)] * N_LAYERS
    for _ in range(n_tokens // n_new):
        assert cache.append_everywhere(1, n_new, layouts) is not None
    for _ in range(300):
        assert cache.append_everywhere(copies, 1, layouts) is not None
    return cache


def n_bytes(cache: IndirectCache) -> list[int]:
    parts = ("prefix", "suffix", "prefix_scales", "suffix_scales")
    return [sum(getattr(layer, name).nbytes for name in parts if getattr(layer, name) is not None)
            for layer in cache.layers]  # fmt: skip


@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("n_new", [1000, 100, 1])
def test_memory_ends_with_the_window(n_new: int, copies: int, kv_cache: str | None) -> None:
    """However long the text was, and however it came."""
    window = 96
    long = filled(config_of(window, 1), 4000, n_new, copies=copies, kv_cache=kv_cache)
    token = 2 * N_HEADS * (HEAD_DIM * 4 if kv_cache is None else HEAD_DIM + 4)
    assert long.get_seq_length() == 4300
    n_full, *n_windowed = n_bytes(long)
    assert n_full >= (4000 + 300 * copies) * token
    # the window and its slack, in whole steps of 64 columns
    assert all(each <= 256 * copies * token for each in n_windowed)
    if copies > 1:
        assert all(layer.prefix is not None and layer.prefix.shape[3] == 0 for layer in long.layers[1:])


def test_a_prompt_is_read_by_beams_until_all_of_it_has_left() -> None:
    torch.manual_seed(0)
    config = config_of(20)
    ours, theirs = IndirectCache(config, copies=2), DynamicCache(config=config)
    pair = cache_cases.Pair(ours, theirs, torch.float32)
    prompt = random_states(1, 50)
    for layer_idx in range(N_LAYERS):
        ours.update(prompt, prompt, layer_idx)
        theirs.update(prompt.repeat(2, 1, 1, 1), prompt.repeat(2, 1, 1, 1), layer_idx)
    for step in range(100):
        pair.update(2, 1)
        pair.both("reorder_cache", torch.tensor([step % 2, 1 - step % 3 % 2]))
        pair.check()


def test_crops_beyond_what_is_held_change_nothing() -> None:
    config = config_of(20, 1)
    cache = IndirectCache(config)
    for n_new in (400, 1, 1):
        for layer_idx in range(N_LAYERS):
            states = random_states(1, n_new)
            cache.update(states, states, layer_idx)
    cache.crop(-2)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(RuntimeError, match="left the window of 20"):
        cache.crop(-390)
    assert cache.get_seq_length() == 400
    assert all(torch.equal(layer.keys, then) for layer, then in zip(cache.layers, before, strict=True))


def test_what_was_given_out_stays_as_it_was() -> None:
    cache = IndirectCache(config_of(8))
    keys, _ = cache.update(random_states(1, 5), random_states(1, 5), 0)
    then = keys.clone()
    for _ in range(300):
        cache.update(random_states(1, 1), random_states(1, 1), 0)
    assert torch.equal(keys, then)


def test_tokens_that_autograd_records_go_on_as_in_theirs() -> None:
    config = config_of(8)
    pair = Pair(config)
    pair.update(2, 12)
    with torch.enable_grad():
        keys = random_states(2, 3).requires_grad_()
        for layer_idx in range(N_LAYERS):
            for mine, his in zip(
                pair.ours.update(keys, keys, layer_idx),
                pair.theirs.update(keys, keys, layer_idx),
                strict=True,
            ):
                assert torch.equal(mine, his) and mine.requires_grad
    pair.check()
    pair.update(2, 1)
    pair.append(2, 2)
    pair.check()


def test_codes_of_a_window() -> None:
    config = config_of(12)
    coded, plain = IndirectCache(config, kv_cache="int8"), IndirectCache(config)
    for n_new in (30, *[1] * 100, 7, 1):
        states = random_states(2, n_new)
        found, expected = coded.update(states, states, 0)[0], plain.update(states, states, 0)[0]
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= float(expected.abs().max()) / 250


@pytest.mark.parametrize("copies", [1, 2])
def test_a_request_beyond_memory_changes_nothing(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(20)
    ours, theirs = IndirectCache(config, copies=copies), DynamicCache(config=config)
    pair = cache_cases.Pair(ours, theirs, torch.float32)
    prompt = random_states(1, 500)
    for layer_idx in range(N_LAYERS):
        ours.update(prompt, prompt, layer_idx)
        theirs.update(prompt.repeat(copies, 1, 1, 1), prompt.repeat(copies, 1, 1, 1), layer_idx)
    pair.update(copies, 1)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "available_memory", lambda: 0)
        patched.setattr(storage, "_UNCHECKED_BYTES", 0)
        with pytest.raises(CacheFull, match="bytes more; 0 bytes are available"):
            ours.append(0, copies, 1000, N_HEADS, HEAD_DIM, torch.float32)
    pair.check()
    for _ in range(300):
        pair.update(copies, 1)
    pair.check()


WRONG: dict[str, Any] = {
    "tokens that are not there": {"skipped": 0},
    "fewer than none": {"skipped": -1},
    "new tokens too": {"skipped": 1 << 40},
    "columns before the first": {"starts": (-1, 0)},
    "columns behind the length": {"starts": (1 << 40, 0)},
    "columns of a suffix that has none": {"starts": (300, 5)},
}


@pytest.mark.parametrize("n_new", [1, 3])
@pytest.mark.parametrize("name", WRONG)
def test_attention_refuses(name: str, n_new: int) -> None:
    cache = IndirectCache(config_of(20))
    for _ in range(300):
        appended = cache.append(0, 1, n_new, N_HEADS, HEAD_DIM, torch.float32)
        appended.prefix[:] = 1
    assert appended.starts[0] > 0
    qkv = torch.ones(1, n_new, 3 * N_HEADS * HEAD_DIM)
    heads = N_HEADS, N_HEADS, HEAD_DIM
    functional.rotate_and_store(qkv, None, None, appended, *heads, "none")
    found = functional.attend(qkv, appended, Mask("causal"), Scoring(0.5), *heads)
    torch.testing.assert_close(found, torch.ones_like(found))
    with pytest.raises(InvalidInput):
        functional.attend(qkv, appended._replace(**WRONG[name]), Mask("causal"), Scoring(0.5), *heads)
