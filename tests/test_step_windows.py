"""Programs whose layers differ: windows, heads of other shapes, a layer that reads what another has stored."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config

from hfopt.cache import AppendedEverywhere, IndirectCache, Layout
from hfopt.errors import InvalidInput
from hfopt.functional import Epilogue, LinearWeights, Mask, Scoring
from hfopt.program.builder import Builder
from hfopt.program.program import Program, Table
from hfopt.program.run import Run
from tests.generation_cases import one_thread
from tests.reference import DTYPES

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

SIZE, N_TOKENS, WINDOW = 64, 19, 7
# heads of the layers; the last two have a window, and what comes behind them reads the second
HEADS = ((4, 2, 24), (4, 4, 8), (2, 1, 32))
_EVERYTHING = 1 << 40


def config() -> Any:
    return Qwen2Config(
        num_hidden_layers=len(HEADS), use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    )


def matrix(dtype: torch.dtype, n: int, m: int) -> LinearWeights:
    return LinearWeights.of([(torch.randn(n, m) / m**0.5).to(dtype)], [None])


def decoder(dtype: torch.dtype) -> Program:
    torch.manual_seed(0)
    builder = Builder(dtype)
    x = builder.look_up(Table(torch.randn(N_TOKENS, SIZE).to(dtype)), "tokens")
    for layer, index in enumerate((0, 1, 2, 1)):
        heads = n_heads, n_kv_heads, head_dim = HEADS[index]
        qkv = builder.linear(x, matrix(dtype, (n_heads + 2 * n_kv_heads) * head_dim, SIZE))
        if layer == index:
            builder.rotate_and_store(qkv, layer, heads, "none", None)
        attended = builder.attend(qkv, index, heads, Scoring(0.5, window=WINDOW if index else None))
        x = builder.linear(attended, matrix(dtype, SIZE, n_heads * head_dim), Epilogue(residuals=(x,)))
    builder.take_last(x)
    return builder.program(builder.linear(x, matrix(dtype, N_TOKENS, SIZE)), len(HEADS))


class Request:
    """A program over a cache whose layers have windows, or over one whose layers hold everything."""

    def __init__(self, program: Program, *, is_windowed: bool, n_rows: int, kv_cache: str | None) -> None:
        max_length = _EVERYTHING if is_windowed else 1
        self.program, self.n_rows = program, n_rows
        self.cache = IndirectCache(config(), kv_cache=kv_cache, max_length=max_length)
        assert self.cache.is_sliding == [False, is_windowed, is_windowed]
        self.chance = np.random.default_rng(0)
        self.seen = np.ones((n_rows, 2000), np.uint8)
        self.seen[-1, :5] = 0

    def appended(self, n_new: int) -> AppendedEverywhere:
        found = self.cache.append_everywhere(self.n_rows, n_new, self.program.layouts)
        assert found is not None
        return found

    def _place(self) -> np.ndarray:
        return np.full(self.n_rows, self.cache.get_seq_length() - 1)

    def tokens(self, *shape: int) -> np.ndarray:
        return self.chance.integers(0, N_TOKENS, shape)

    def prompt(self, n_new: int, *, is_padded: bool) -> np.ndarray:
        appended, n_keys = self.appended(n_new), self.cache.get_seq_length()
        mask = Mask("causal")
        if is_padded:
            seen = np.tri(n_new, n_keys, n_keys - n_new, dtype=np.uint8) & self.seen[:, None, :n_keys]
            mask = Mask("bytes", np.ascontiguousarray(seen))
        positions = np.arange(n_keys - n_new, n_keys)[None]
        logits = self.program.prefill(self.tokens(self.n_rows, n_new), positions, appended, mask)
        return logits.float().numpy()

    def step(self, *, is_padded: bool) -> np.ndarray:
        appended, run = self.appended(1), Run(self.program, self.n_rows)
        mask = self.seen if is_padded else None
        logits = run.logits(self.tokens(self.n_rows), self._place(), appended, mask)
        return logits.float().numpy()

    def steps(self, n_steps: int, *, is_padded: bool) -> np.ndarray:
        tokens, run = self.tokens(self.n_rows), Run(self.program, self.n_rows)
        appended = self.appended(n_steps)
        place, mask = self._place() - n_steps + 1, self.seen if is_padded else None
        return run.choose(tokens, place, appended, mask)

    def reorder(self) -> np.ndarray:
        rows = self.chance.integers(0, self.n_rows, self.n_rows)
        self.cache.reorder_cache(torch.from_numpy(rows))
        self.seen = self.seen[rows]
        return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_what_has_left_the_window_is_not_missed(
    dtype: torch.dtype, kv_cache: str | None, is_padded: bool, n_rows: int
) -> None:
    """The same bits as over a cache that holds all: prompts, chunks, steps alone and together, beams, tokens taken back."""
    program = decoder(dtype)
    options: dict[str, Any] = {"n_rows": n_rows, "kv_cache": kv_cache}
    ours, theirs = (Request(program, is_windowed=each, **options) for each in (True, False))
    found: list[list[np.ndarray]] = [[], []]
    for results, request in zip(found, (ours, theirs), strict=True):
        for n_new in (60, 100, 5):
            results.append(request.prompt(n_new, is_padded=is_padded))
        for index in range(100):
            results.append(request.step(is_padded=is_padded))
            if index > 50 and index % 4 == 0:
                results.append(request.reorder())
            if index % 9 == 0:
                request.cache.crop(-1)
        for _ in range(10):
            results.append(request.steps(30, is_padded=is_padded))
            request.cache.crop(-3)
        results.append(request.prompt(40, is_padded=is_padded))
    for number, (one, other) in enumerate(zip(*found, strict=True)):
        assert np.array_equal(one, other), number
    columns = [layer.prefix.shape[3] for layer in ours.cache.layers]
    assert columns[0] > 160 and max(columns[1:]) <= (192 if n_rows == 1 else 0)


def test_attention_over_tokens_that_have_left() -> None:
    """A cache of another window than the program's."""
    program = decoder(torch.float32)
    other = config()
    other.sliding_window = WINDOW - 2
    cache, run = IndirectCache(other), Run(program, 1)
    place = np.zeros(1, np.int64)
    with pytest.raises(InvalidInput, match="left behind tokens that are seen"):
        for _ in range(300):
            appended = cache.append_everywhere(1, 1, program.layouts)
            assert appended is not None
            run.logits(place, place, appended)


def test_layers_of_other_shapes_than_the_cache() -> None:
    program = decoder(torch.float32)
    layouts: list[Layout] = [(2, 24, torch.float32)] * 3
    appended = IndirectCache(config()).append_everywhere(1, 1, layouts)
    assert appended is not None
    place = np.zeros(1, np.int64)
    with pytest.raises(InvalidInput, match=r"\(2, rows, 4, columns, 8\) is needed"):
        Run(program, 1).logits(place, place, appended)
    with pytest.raises(InvalidInput, match="the cache has 3 layers"):
        IndirectCache(config()).append_everywhere(1, 1, layouts[:2])


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_a_layer_that_nothing_has_stored(layer: int) -> None:
    builder = Builder(torch.float32)
    x = builder.look_up(Table(torch.randn(N_TOKENS, SIZE)), "tokens")
    heads = HEADS[0]
    qkv = builder.linear(x, matrix(torch.float32, 8 * 24, SIZE))
    builder.rotate_and_store(qkv, 0, heads, "none", None)
    other = heads if layer else (4, 4, 24)
    if layer == 0:
        qkv = builder.linear(x, matrix(torch.float32, 12 * 24, SIZE))
    with pytest.raises(InvalidInput, match=f"layer {layer} caches heads of"):
        builder.attend(qkv, layer, other, Scoring(0.3))
