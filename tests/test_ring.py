"""Long prompts that processes read together, and the steps behind them."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hfopt
from hfopt import functional
from hfopt.cache import IndirectCache, ShardedLayer, Share
from hfopt.distributed.ring import Ring
from hfopt.errors import InvalidInput
from hfopt.functional import Scoring
from tests.context_work import ALONE, FAMILIES, N_TOKENS, model_of
from tests.ranks import Ranks, results

HEADS = 4, 2, 24  # heads of queries, of keys, channels
QUICK = ("llama",)


def call(name: str, *arguments: Any) -> tuple[str, tuple[Any, ...]]:
    return f"tests.context_work:{name}", arguments


# ---- parts of a softmax -----------------------------------------------------------------------------------------------


def held(keys: Tensor, dtype: torch.dtype) -> Any:
    """A layer that holds keys and values [2, rows, heads, tokens, channels]."""
    cache = IndirectCache()
    with torch.no_grad():
        cache.update(*keys.to(dtype), 0)
    return cache.layers[0].appended(1, 0)


def attended(qkv: Tensor, keys: Tensor, scoring: Scoring, size: int) -> Tensor:
    """Attention in float64."""
    n_heads, n_kv_heads, _ = HEADS
    queries = qkv[..., : n_heads * size].unflatten(-1, (n_heads, size))[:, 0].double()
    k, v = keys.double().repeat_interleave(n_heads // n_kv_heads, 2)
    scores = torch.einsum("rhd,rhnd->rhn", queries, k) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    if scoring.sinks is not None:
        scores = torch.cat([scores, scoring.sinks.double()[None, :, None].expand(len(k), -1, 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return torch.einsum("rhn,rhnd->rhd", weights, v).flatten(1)[:, None]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("size", (16, 24, 64))
@pytest.mark.parametrize("cuts", ((0, 100, 101, 300), (0, 300), (0, 7, 7, 300)))
def test_joined_parts_are_attention_over_all_keys(
    dtype: torch.dtype, cuts: tuple[int, ...], size: int
) -> None:
    n_heads, n_kv_heads, _ = HEADS
    torch.manual_seed(0)
    qkv = torch.randn(2, 1, (n_heads + 2 * n_kv_heads) * size).to(dtype)
    keys = torch.randn(2, 2, n_kv_heads, cuts[-1], size).to(dtype)
    keys[0, :, :, : cuts[1]] *= 4  # parts of unlike weight
    for sinks, softcap in ((None, None), (torch.randn(n_heads).to(dtype), None), (None, 5.0)):
        scoring = Scoring(0.3, softcap, sinks=sinks)
        parts = [
            functional.attend_part(
                qkv, held(keys[:, :, :, begin:end], dtype), scoring, n_heads, n_kv_heads, size
            )
            for begin, end in itertools.pairwise(cuts)
            if end > begin
        ]
        found = functional.join_parts(torch.cat(parts, 1), scoring, n_heads, size, dtype)
        expected = attended(qkv, keys, scoring, size)
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_parts_are_checked() -> None:
    scoring, keys = Scoring(1.0), torch.zeros(2, 1, 2, 5, 24)
    appended = held(keys, torch.float32)
    qkv = torch.zeros(1, 1, 8 * 24)
    wrong: list[tuple[Any, ...]] = [
        (torch.zeros(1, 2, 8 * 24), appended._replace(n_new=2), scoring),
        (qkv, appended, Scoring(1.0, window=3)),
        (qkv, appended, Scoring(1.0, slopes=torch.ones(4))),
        (qkv, appended._replace(prefix_len=65), scoring),
        (qkv, appended._replace(prefix_row=np.array([1], np.int32)), scoring),
        (qkv.double(), appended, scoring),
    ]
    for given in wrong:
        with pytest.raises(InvalidInput):
            functional.attend_part(given[0], given[1], given[2], *HEADS)
    parts = functional.attend_part(qkv, appended, scoring, *HEADS)
    for each, heads, dtype in (
        (parts[..., :-1], 4, torch.float32),
        (parts.double(), 4, torch.float32),
        (parts, 3, torch.float32),
        (parts[0], 4, torch.float32),
        (parts, 4, torch.int8),
    ):
        with pytest.raises(InvalidInput):
            functional.join_parts(each, scoring, heads, 24, dtype)


# ---- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", (1, 2, 3, 4, 7))
@pytest.mark.parametrize("n_tokens", (1024, N_TOKENS))
def test_chunks_are_all_of_a_prompt_and_the_last_token_is_of_rank_0(size: int, n_tokens: int) -> None:
    rings = [Ring.__new__(Ring) for _ in range(size)]
    work = []
    tokens: list[int] = []
    for rank, ring in enumerate(rings):
        ring.rank, ring.size = rank, size
        own = [token for chunk in ring.chunks(n_tokens) for token in range(n_tokens)[chunk]]
        assert own == sorted(own) and (rank > 0 or own[-1] == n_tokens - 1)
        work.append(sum(own))  # keys that they see
        tokens += own
    assert sorted(tokens) == list(range(n_tokens))
    assert max(work) - min(work) <= 2 * n_tokens  # chunks differ by a token


def test_steps_are_held_in_turn_and_nothing_else_is_done_with_a_shared_cache() -> None:
    config = model_of("llama").config
    ring = Ring.__new__(Ring)
    ring.rank, ring.size = 1, 3
    cache = IndirectCache(config)
    cache.shard(Share(ring, 10, 4))
    own = []
    for n_new in (4, 1, 1, 1, 1):
        for layer in range(2):
            appended = cache.append(layer, 1, n_new, 2, 16, torch.float32)
            assert appended.n_new == n_new
        own.append((cache.layers[1].prefix_len, cache.get_seq_length()))
    assert own == [(4, 10), (5, 11), (5, 12), (5, 13), (6, 14)]  # tokens 10 and 13 are those of rank 1
    assert cache.is_sharded and all(isinstance(layer, ShardedLayer) for layer in cache.layers)
    states = torch.zeros(1, 2, 1, 16)
    for ask in (
        lambda: cache.append(0, 1, 2, 2, 16, torch.float32),
        lambda: cache.update(states, states, 0),
        lambda: cache.crop(-1),
    ):
        with pytest.raises(InvalidInput):
            ask()


# ---- models -----------------------------------------------------------------------------------------------------------


def check_tokens(size: int, *names: str) -> None:
    found = results(size, *(call("tokens_are_theirs", each) for each in names))
    for name, of_ranks in zip(names, found, strict=True):
        assert [are_equal for are_equal, _ in of_ranks] == [[True] * 3] * size, name
        for (*layers,) in zip(*(caches for _, caches in of_ranks), strict=True):
            for of_layer in zip(*layers, strict=True):
                lengths, (total, *others) = zip(*of_layer, strict=True)
                assert sum(lengths) == total and set(others) <= {total}
                assert max(lengths) - min(lengths) <= 3  # by a token for each chunk, and for the steps


def test_tokens_are_those_of_transformers() -> None:
    check_tokens(2, *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("size", (2, 3, 4))
def test_tokens_of_other_families(size: int) -> None:
    check_tokens(size, *FAMILIES)


@pytest.mark.slow
def test_models_and_requests_that_need_whole_prompts() -> None:
    alone = [call("each_reads_all", name) for name in ALONE]
    others = [call(name) for name in ("declined", "whole_requests", "other_settings", "copied")]
    *of_models, requests, settings, copies = results(2, *alone, *others)
    assert copies == [True] * 2
    assert of_models == [[(True, True)] * 2] * (len(ALONE) + 1)
    assert requests == [[(True, True)] * 7] * 2
    assert settings == [[True] * 3] * 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_scores_are_as_near_as_those_of_one_process(dtype: torch.dtype) -> None:
    for of_ranks in results(2, *(call("scores", dtype, {"kernels": each}) for each in ("auto", "hfopt"))):
        exact, theirs, ours = of_ranks[0]
        assert torch.equal(ours, of_ranks[1][2])
        assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


def test_processes_have_to_be_there_and_to_ask_for_the_same() -> None:
    with pytest.raises(InvalidInput, match="is not initialised"):
        hfopt.optimize(model_of("llama"), context_parallel=True)
    for said in results(2, call("refused"))[0]:
        assert [each.partition(":")[0] for each in said] == [
            "context_parallel",
            "inputs of rank 1 is another than that of rank 0",
        ]


def test_a_process_that_is_killed_ends_the_request_of_the_others() -> None:
    ((said, seconds),), nothing = Ranks(2, call("one_is_killed", 2)).wait(killed=[1])
    assert said.startswith("rank 1 (pid ") and "has ended" in said and not nothing
    assert seconds < 10
