"""Caches, queries and masks for the tests of attention."""

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hfopt import functional
from hfopt.cache import Appended
from hfopt.cache.codes import quantised
from hfopt.functional import Mask, Scoring
from tests import reference
from tests.reference import assert_as_exact_as_torch, bits


def random_cache(
    dtype: torch.dtype,
    n_rows: int,
    n_prefix_rows: int,
    n_kv_heads: int,
    size: int,
    lengths: tuple[int, int],
    spare: int = 3,
) -> Appended:
    """A cache of random keys, values and rows, with unused columns behind them that hold NaN."""
    prefix_len, suffix_len = lengths
    prefix = torch.randn(2, n_prefix_rows, n_kv_heads, prefix_len + spare, size).to(dtype)
    suffix = torch.randn(2, n_rows, n_kv_heads, suffix_len + 2 if suffix_len else 0, size).to(dtype)
    prefix[:, :, :, prefix_len:] = torch.nan
    suffix[:, :, :, suffix_len:] = torch.nan
    rows = torch.randint(n_prefix_rows, (n_rows,), dtype=torch.int32)
    table = torch.randint(n_rows, (n_rows, suffix_len + 2), dtype=torch.int32)
    return Appended(
        bits(prefix), bits(suffix), prefix_len, suffix_len, suffix_len > 0, 1, rows.numpy(), table.numpy()
    )


def coded(cache: Appended, dtype: torch.dtype) -> Appended:
    """The same cache as codes."""
    (prefix, prefix_scales), (suffix, suffix_scales) = (
        [part.numpy() for part in quantised(torch.from_numpy(array).view(dtype))]
        for array in (cache.prefix, cache.suffix)
    )
    return cache._replace(
        prefix=prefix, suffix=suffix, prefix_scales=prefix_scales, suffix_scales=suffix_scales
    )


def coded_cache(dtype: torch.dtype, *sizes: Any, **options: Any) -> Appended:
    """A `random_cache` of codes."""
    return coded(random_cache(dtype, *sizes, **options), dtype)


MakeCache: TypeAlias = Callable[..., Appended]
CACHES: tuple[MakeCache, ...] = random_cache, coded_cache


def random_qkv(dtype: torch.dtype, n_rows: int, n_new: int, heads: tuple[int, int, int]) -> Tensor:
    n_heads, n_kv_heads, size = heads
    return torch.randn(n_rows, n_new, (n_heads + 2 * n_kv_heads) * size).to(dtype)


def causal_mask(n_rows: int, n_new: int, n_keys: int) -> Tensor:
    return torch.ones(n_rows, n_new, n_keys, dtype=torch.bool).tril(n_keys - n_new)


def by_bytes(seen: Tensor) -> Mask:
    return Mask("bytes", seen.to(torch.uint8).numpy())


def queries_of(qkv: Tensor, heads: tuple[int, int, int]) -> Tensor:
    n_heads, _, size = heads
    return qkv[..., : n_heads * size].unflatten(-1, (n_heads, size)).transpose(1, 2)


def flat(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def check_attend(
    qkv: Tensor,
    cache: Appended,
    mask: Mask,
    seen: Tensor,
    heads: tuple[int, int, int],
    scoring: Scoring | None = None,
) -> Tensor:
    """Compares `attend` with float64 and with torch at the same dtype; returns its result."""
    scoring = scoring or Scoring(heads[2] ** -0.5)
    out = functional.attend(qkv, cache._replace(n_new=qkv.shape[1]), mask, scoring, *heads)
    keys, values = reference.gathered(cache, qkv.dtype)
    exactly = [part.double() for part in (keys, values)]
    if cache.prefix_scales is not None:
        exactly = list(reference.gathered(cache, torch.float64))
    # what nobody sees may be NaN, and torch cannot skip it
    if scoring.window is not None:
        seen = seen & (reference.distances(*seen.shape[1:]) > -scoring.window)
    hidden = ~seen.any(1)[:, None, :, None]
    keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
    exact_keys, exact_values = (part.masked_fill(hidden, 0) for part in exactly)
    q = queries_of(qkv, heads)
    theirs = reference.attention(q, keys, values, seen, scoring)
    exact = reference.attention(q.double(), exact_keys, exact_values, seen, scoring)
    # a score that is rounded changes a weight by as much; those that are far from the largest have none
    scores = reference.attention_scores(q.double(), exact_keys, seen, scoring)
    counted = scores > scores.amax(-1, keepdim=True) - 16
    largest = max(scores[counted].abs().tolist(), default=0)
    # plain ones are float32, whatever the elements are
    is_plain = scoring.is_plain(sys.maxsize)
    eps, of_sums = torch.finfo(qkv.dtype).eps, torch.finfo(torch.float32).eps
    # and as sums they are rounded by what their terms are, not by what is left of those
    sizes = reference.attention_scores(q.double().abs(), exact_keys.abs(), seen, Scoring(abs(scoring.scale)))
    terms = max(sizes[counted].tolist(), default=0)
    n_ulps = 1 + max(largest * (of_sums if is_plain else eps), terms * of_sums) / eps
    assert_as_exact_as_torch(out, flat(theirs), flat(exact), n_ulps)
    return out
