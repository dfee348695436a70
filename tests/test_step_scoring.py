"""Programs whose layers score in their own ways: bits of the operations alone, and what their rows and listings say."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hfopt import functional
from hfopt.cache import AppendedEverywhere, Buffers, IndirectCache
from hfopt.errors import InvalidInput
from hfopt.functional import Epilogue, LinearWeights, Mask, Scoring
from hfopt.program.builder import Builder
from hfopt.program.program import Program, Table
from hfopt.program.run import Run
from tests.reference import DTYPES

HEADS = (4, 2, 24)  # of queries, of keys, channels
SIZE, WIDTH, N_TOKENS = HEADS[0] * HEADS[2], 8 * HEADS[2], 19


def scorings(dtype: torch.dtype) -> list[Scoring]:
    """Of four layers."""
    slopes, sinks = torch.tensor([0.5, 0.1, 0.02, 0.0]), torch.randn(4).to(dtype)
    return [
        Scoring(0.2, 2.0, slopes, sinks, 5),
        Scoring(0.3),
        Scoring(0.2, window=17),
        Scoring(-0.2, 0.5, sinks=sinks.flip(0)),
    ]


class Decoder:
    """Embeddings, layers that are attention alone, logits."""

    def __init__(self, dtype: torch.dtype) -> None:
        def matrix(n: int, m: int) -> LinearWeights:
            return LinearWeights.of([(torch.randn(n, m) / m**0.5).to(dtype)], [None])

        self.dtype, self.scorings = dtype, scorings(dtype)
        self.table, self.head = torch.randn(N_TOKENS, SIZE).to(dtype), matrix(23, SIZE)
        self.layers = [(matrix(WIDTH, SIZE), matrix(SIZE, SIZE)) for _ in self.scorings]

    def program(self) -> Program:
        builder = Builder(self.dtype)
        x = builder.look_up(Table(self.table), "tokens")
        for layer, ((inputs, output), scoring) in enumerate(zip(self.layers, self.scorings, strict=True)):
            builder.layer = layer
            qkv = builder.linear(x, inputs)
            builder.rotate_and_store(qkv, layer, HEADS, "none", None)
            x = builder.linear(builder.attend(qkv, layer, HEADS, scoring), output, Epilogue(residuals=(x,)))
        builder.take_last(x)
        return builder.program(builder.linear(x, self.head), len(self.layers))

    def __call__(self, tokens: np.ndarray, cache: IndirectCache, mask: Mask) -> Tensor:
        """Logits by the operations alone."""
        x = self.table[torch.from_numpy(tokens)]
        for layer, ((inputs, output), scoring) in enumerate(zip(self.layers, self.scorings, strict=True)):
            qkv = functional.linear(x, inputs)
            appended = cache.append(layer, len(x), x.shape[1], *HEADS[1:], self.dtype)
            functional.rotate_and_store(qkv, None, None, appended, *HEADS, "none")
            attended = functional.attend(qkv, appended, mask, scoring, *HEADS)
            x = functional.linear(attended, output, residuals=(x,))
        return functional.linear(x[:, -1:].contiguous(), self.head)


def everywhere(cache: IndirectCache, n_rows: int, n_new: int, n_layers: int, dtype: torch.dtype) -> Any:
    layers = [cache.append(layer, n_rows, n_new, *HEADS[1:], dtype) for layer in range(n_layers)]
    scales = [(each.prefix_scales, each.suffix_scales) for each in layers]
    buffers = [Buffers(each.prefix, each.suffix, *more) for each, more in zip(layers, scales, strict=True)]
    return AppendedEverywhere(layers[0], buffers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_cache", (None, "int8"))
@pytest.mark.parametrize("is_padded", (False, True))
def test_each_layer_scores_in_its_own_way(dtype: torch.dtype, kv_cache: Any, is_padded: bool) -> None:
    decoder = Decoder(dtype)
    program = decoder.program()
    ours, theirs = IndirectCache(kv_cache=kv_cache), IndirectCache(kv_cache=kv_cache)
    run, n_new = Run(program, 2), 41
    for n_keys in (41, 42, 43, 44):
        tokens = np.random.default_rng(n_keys).integers(0, N_TOKENS, (2, n_new))
        positions = np.arange(n_keys - n_new, n_keys)[None].repeat(2, 0)
        seen = np.tri(n_new, n_keys, n_keys - n_new, dtype=np.uint8)[None].repeat(2, 0)
        seen[1, :, : 7 if is_padded else 0] = 0
        mask = Mask("bytes", seen) if is_padded else Mask("causal")
        appended = everywhere(ours, 2, n_new, len(decoder.layers), dtype)
        if n_new > 1:
            logits = program.prefill(tokens, positions, appended, mask)
        else:
            logits = run.logits(tokens[:, 0], positions[:, 0], appended, seen[:, 0] if is_padded else None)
        assert torch.equal(logits, decoder(tokens, theirs, mask))
        n_new = 1


def test_steps_ahead_see_the_windows_of_their_own() -> None:
    decoder = Decoder(torch.float32)
    program = decoder.program()
    tokens, positions = np.zeros((2, 30), np.int64), np.arange(30)[None]
    chosen = []
    for n_steps in (1, 6):
        cache, run = IndirectCache(), Run(program, 2)
        appended = everywhere(cache, 2, 30, 4, torch.float32)
        last = program.prefill(tokens, positions, appended, Mask("causal"))[:, 0].argmax(-1).numpy()
        found: list[np.ndarray] = []
        while len(found) < 6:
            place = np.full(2, 30 + len(found))
            found += list(run.choose(last, place, everywhere(cache, 2, n_steps, 4, torch.float32)))
            last = found[-1]
        chosen.append(np.stack(found))
    assert (chosen[0] == chosen[1]).all()


def test_listing() -> None:
    lines = [line for line in Decoder(torch.float32).program().listing.instructions if line.name == "attend"]
    said = ["softcap 2, slopes, sinks, window 5", "", "window 17", "softcap 0.5, sinks"]
    assert [line.then for line in lines] == said


def test_tensors_stay_alive() -> None:
    decoder = Decoder(torch.float32)
    kept = {id(tensor) for tensor in decoder.program().tensors()}
    for scoring in decoder.scorings:
        assert all(id(tensor) in kept for tensor in scoring.tensors)


@pytest.mark.parametrize("wrong", ({"slopes": torch.ones(3)}, {"sinks": torch.ones(4, dtype=torch.bfloat16)}))
def test_what_does_not_fit_is_refused(wrong: dict[str, Any]) -> None:
    decoder = Decoder(torch.float32)
    decoder.scorings[1] = Scoring(0.3, **wrong)
    with pytest.raises(InvalidInput, match=r"(slopes|sinks) has"):
        decoder.program()
