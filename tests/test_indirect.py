"""Attention of beams over a cache that is not moved, against caches that are copied."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from hfopt import functional
from hfopt.cache import storage
from hfopt.errors import CacheFull, InvalidInput
from hfopt.functional import indirect_access_kv_cache_attention as attend
from hfopt.modules import IndirectAccessKVCacheAttention
from tests.indirect_cases import TOLERANCES, Heads, Twins, attention, first_layer_past
from tests.pairs import pairs_of
from tests.reference import DTYPES

SIZES = (24, 64, 70, 96, 128, 256)
GROUPS = ((4, 4), (8, 2), (8, 1), (71, 1))  # 1, 4, 8 and 71 heads of queries for one of keys
SMALL: Heads = (4, 2, 24)


@pytest.mark.parametrize(
    ("dtype", "size", "group", "n_beams", "thin"), pairs_of(DTYPES, SIZES, GROUPS, (1, 4), (True, False))
)
def test_long_histories(
    dtype: torch.dtype, size: int, group: tuple[int, int], n_beams: int, thin: bool
) -> None:
    """Two prompts, and beams that go on with each other; caches grow from 64 tokens on."""
    twins = Twins(2 * n_beams, (*group, size), dtype)
    twins.step(9, 2 if thin else None)
    for _ in range(70):
        twins.reorder(twins.random_rows(n_beams))
        twins.step(1)
    assert twins.past[1].shape == twins.past[2].shape == (128, 2 * n_beams, group[1], size)
    assert twins.past[3].shape == (130, 2 * n_beams)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "size", "group", "n_prompt"), pairs_of(DTYPES, SIZES, GROUPS, (1, 8, 1025, 4096))
)
def test_long_prompts(dtype: torch.dtype, size: int, group: tuple[int, int], n_prompt: int) -> None:
    twins = Twins(4, (*group, size), dtype)
    twins.step(n_prompt, 1)
    for _ in range(100):
        twins.reorder(twins.random_rows(4))
        twins.step(1)


def test_a_thousand_steps() -> None:
    twins = Twins(4, (2, 1, 24))
    twins.step(3, 1)
    for step in range(1000):
        twins.reorder(twins.random_rows(4))
        if step % 97 == 0:
            twins.step(1)
        else:  # the twin alone would take most of the time
            x = twins.random(4, 1, 2, 24)
            k, v = twins.random(2, 4, 1, 1, 24)
            twins.keys, twins.values = torch.cat((twins.keys, k), 1), torch.cat((twins.values, v), 1)
            twins.past = attend(x, k, v, 1.0, twins.past)[2]
    twins.step(1)
    assert twins.past[1].shape[0] == 1024 and twins.length == 3 + 1000 + 1


def test_rows_may_leave_their_prompts() -> None:
    """What a copy of the caches would do."""
    for thin in (2, 4):
        twins = Twins(4, SMALL)
        twins.step(5, thin)
        for _ in range(8):
            twins.reorder(torch.randint(4, (4,), generator=twins.generator))
            twins.step(1)


def test_greedy_rows_need_no_reorder() -> None:
    for n_rows in (1, 3):
        twins = Twins(n_rows, SMALL)
        for n_new in (5, 1, 1, 70, 1):
            twins.step(n_new)
    twins = Twins(4, SMALL)  # nor do beams
    twins.step(5, 2)
    for n_new in (1, 1, 3, 1):
        twins.step(n_new)


@pytest.mark.parametrize("n_given", (2, 8))
def test_chunks_of_prompts_and_of_guesses(n_given: int) -> None:
    twins = Twins(8, SMALL)
    for n_new in (7, 1, 130, 3):
        twins.step(n_new, n_given)
    for n_new in (1, 5, 1, 300, 2):
        twins.reorder(twins.random_rows(4))
        twins.step(n_new)
        twins.step(n_new)


def test_tokens_are_taken_back() -> None:
    """As those that were guessed wrongly are: the carrier says how many are left."""
    for n_given in (1, 4):
        twins = Twins(4, SMALL)
        twins.step(6, n_given)
        for kept in (14, 12, 7, 6, 3, 1):
            twins.reorder(twins.random_rows(4))
            twins.step(4)
            twins.reorder(twins.random_rows(4))
            twins.step(5)
            twins.reorder(twins.random_rows(4))  # of which no row may speak later on
            kept = min(kept, twins.length)
            before = twins.keys
            # what the rows have read up to there is what their first tokens were
            carrier = torch.empty(1, kept, kept, 1)
            fresh = Twins(4, SMALL)
            fresh.past = (carrier, *twins.past[1:])
            table = _read_rows(fresh.past)
            del before, table
            break


def _read_rows(past: tuple[Tensor, ...]) -> Tensor:
    return past[3][: past[0].size(-2)]


def test_left_padding() -> None:
    for kind in (torch.bool, torch.float32, torch.bfloat16, torch.float16):
        twins = Twins(8, SMALL)
        attended = torch.ones(2, 9, dtype=torch.bool)
        attended[0, :4] = False
        attended[1, :1] = False

        def mask(seen: Tensor, n_new: int, kind: torch.dtype = kind) -> Tensor:
            seen = seen[:, None, None].expand(-1, 1, n_new, -1)
            if kind is torch.bool:
                return seen
            return torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, -torch.inf)

        twins.step(9, 2, attention_mask=mask(attended, 9))
        seen = attended.repeat_interleave(4, 0)
        for n_new in (1, 1, 3, 1):
            twins.reorder(twins.random_rows(4))
            seen = torch.cat((seen, torch.ones(8, n_new, dtype=torch.bool)), 1)
            twins.step(n_new, attention_mask=mask(seen, n_new))
