"""Attention over a cache of 8-bit codes, and what is written to one, against float64 and against torch."""

from typing import Any

import numpy as np
import pytest
import torch

from hfopt import functional
from hfopt.cache import Appended, IndirectCache
from hfopt.cache.codes import dequantised, quantised
from hfopt.errors import InvalidInput
from hfopt.functional import Mask, Scoring
from tests import reference
from tests.attention_cases import by_bytes, causal_mask, check_attend, coded, coded_cache, random_qkv
from tests.reference import DTYPES, Guarded, bits

# ---- what is read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", (1, 4))
@pytest.mark.parametrize("size", (64, 512, 768))
def test_the_largest_products_do_not_overflow(group: int, size: int) -> None:
    """All codes and all numbers of a query at their limits, with the same sign; and all weights alike."""
    dtype, heads, n_keys = torch.bfloat16, (group, 1, size), 300
    prefix = torch.full((2, 1, 1, n_keys, size), 3.0, dtype=dtype)
    prefix[0, ..., ::2, :] *= -1
    nothing = np.zeros((2, 1, 1, 0, size), np.uint16)
    rows, table = np.zeros(1, np.int32), np.zeros((1, 0), np.int32)
    cache = coded(Appended(bits(prefix), nothing, n_keys, 0, False, 1, rows, table), dtype)
    everything = torch.ones(1, 1, n_keys, dtype=torch.bool)
    qkv = torch.full((1, 1, (group + 2) * size), 0.5, dtype=dtype)
    for scale in (1.0, 0.0):
        out = check_attend(qkv, cache, Mask("none"), everything, heads, Scoring(scale))
        assert torch.equal(out, torch.full_like(out, 3.0))


@pytest.mark.parametrize("group", (1, 4))
def test_a_key_with_a_small_value_takes_most_weight(group: int) -> None:
    """As the first token of a text often does: what the others add must not drown in rounding."""
    dtype, heads = torch.bfloat16, (group, 1, 64)
    keys, values = torch.randn(1, 1, 250, 64) * 0.1, torch.randn(1, 1, 250, 64)
    keys[:, :, 0], values[:, :, 0] = 2.0, values[:, :, 0] * 1e-3
    prefix = torch.stack([keys, values]).to(dtype)
    nothing = np.zeros((2, 1, 1, 0, 64), np.uint16)
    rows, table = np.zeros(1, np.int32), np.zeros((1, 0), np.int32)
    cache = coded(Appended(bits(prefix), nothing, 250, 0, False, 1, rows, table), dtype)
    qkv = (torch.randn(1, 1, (group + 2) * 64) * 0.1 + 0.5).to(dtype)
    check_attend(qkv, cache, Mask("none"), torch.ones(1, 1, 250, dtype=torch.bool), heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_new", (5, 60))
def test_attention_by_torch(dtype: torch.dtype, n_new: int) -> None:
    heads = (4, 2, 24)
    qkv, cache = (
        random_qkv(dtype, 4, n_new, heads),
        coded_cache(dtype, 4, 2, *heads[1:], (50, 20))._replace(n_new=n_new),
    )
    keys, values = reference.gathered(cache, dtype)
    causal = causal_mask(4, n_new, 70)
    expected = reference.attention(
        qkv[..., : 4 * 24].unflatten(-1, (4, 24)).transpose(1, 2), keys, values, causal, Scoring(0.2)
    )
    out = functional.attend(qkv, cache, Mask("causal"), Scoring(0.2), *heads, by="torch")
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", ((8, 2, 64), (2, 2, 64), (4, 2, 24)))
@pytest.mark.parametrize("n_new", (1, 9))
@pytest.mark.parametrize("place", ("keys", "values"))
def test_what_is_not_finite(dtype: torch.dtype, heads: tuple[int, int, int], n_new: int, place: str) -> None:
    """It is NaN for those who see it, and does not reach the others."""
    qkv, cache = random_qkv(dtype, 2, n_new, heads), coded_cache(dtype, 2, 2, *heads[1:], (40, 31))
    seen = causal_mask(2, n_new, 71)
    hidden = seen.clone()
    hidden[:, :, 7] = hidden[:, :, 50] = False
    expected = functional.attend(qkv, cache._replace(n_new=n_new), by_bytes(hidden), Scoring(0.2), *heads)
    assert cache.prefix_scales is not None and cache.suffix_scales is not None
    for scales, token in ((cache.prefix_scales, 7), (cache.suffix_scales, 10)):
        scales[0 if place == "keys" else 1, :, :, token] = np.nan
    out = functional.attend(qkv, cache._replace(n_new=n_new), by_bytes(hidden), Scoring(0.2), *heads)
    assert torch.equal(out, expected)
    assert (
        functional.attend(qkv, cache._replace(n_new=n_new), by_bytes(seen), Scoring(0.2), *heads)
        .isnan()
        .all()
    )


# ---- what is written -------------------------------------------------------------------------------------------------


def _states(dtype: torch.dtype, n_rows: int, n_new: int, n_heads: int, size: int) -> torch.Tensor:
    """[n_rows, n_new, n_heads, size] with vectors of zeros, of the smallest and the largest numbers, and of no numbers."""
    x = torch.randn(n_rows, n_new, n_heads, size) * torch.logspace(-3, 3, n_new)[:, None, None]
    x = x.to(dtype)
    x[0, 1] = 0
    x[0, 2] = 1e-40
    x[0, 3] = torch.finfo(dtype).max
    x[0, 4, :, 0] = torch.nan
    x[0, 5, :, -1] = -torch.inf
    x[0, 6] = torch.arange(size) - size // 2  # ties, with a largest of 127
    x[0, 6, :, 0] = 127
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_suffix", (False, True))
@pytest.mark.parametrize("size", (64, 80, 128, 16, 7, 24))
def test_kernels_write_what_update_writes(dtype: torch.dtype, in_suffix: bool, size: int) -> None:
    n_rows, n_new, heads = 3, 9, (4, 2, size)
    qkv = _states(dtype, n_rows, n_new, 8, size)
    ours, theirs = IndirectCache(kv_cache="int8"), IndirectCache(kv_cache="int8")
    with torch.no_grad():
        for cache in (ours, theirs):
            cache.update(*torch.ones(2, n_rows, 2, 3, size).to(dtype), 0)
            if in_suffix:
                cache.reorder_cache(torch.tensor([2, 0, 0]))
        theirs.update(qkv[:, :, 4:6].transpose(1, 2), qkv[:, :, 6:].transpose(1, 2), 0)
    appended = ours.append(0, n_rows, n_new, 2, size, dtype)
    functional.rotate_and_store(qkv.flatten(2), None, None, appended, *heads, "none")
    for mine, his in zip(_parts(ours, in_suffix), _parts(theirs, in_suffix), strict=True):
        assert torch.equal(mine.view(torch.int8), his.contiguous().view(torch.int8))


def _parts(cache: IndirectCache, in_suffix: bool) -> list[torch.Tensor]:
    layer = cache.layers[0]
    if in_suffix:
        return [part[:, :3, :, :9].contiguous() for part in (layer.suffix, layer.suffix_scales)]
    return [part[:, :3, :, :12].contiguous() for part in (layer.prefix, layer.prefix_scales)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("half", "interleaved"))
@pytest.mark.parametrize(("size", "n_rotary"), ((64, 64), (24, 14), (80, 32), (7, 6)))
def test_keys_are_rotated_before_they_are_quantised(
    dtype: torch.dtype, kind: str, size: int, n_rotary: int
) -> None:
    heads, n_rows, n_new = (4, 2, size), 2, 70
    angles = n_rotary if kind == "half" else n_rotary // 2
    cos, sin = torch.randn(1, n_new, angles), torch.randn(1, n_new, angles)
    qkv = torch.randn(n_rows, n_new, 8 * size).to(dtype)
    results = []
    for kv_cache in (None, "int8"):
        cache, rotated = IndirectCache(kv_cache=kv_cache), qkv.clone()
        appended = cache.append(0, n_rows, n_new, 2, size, dtype)
        functional.rotate_and_store(rotated, cos, sin, appended, *heads, kind)
        results.append((cache.layers[0], rotated))
    (floats, one), (codes, other) = results
    assert torch.equal(one[..., : 4 * size], other[..., : 4 * size])
    for mine, exact in ((codes.keys, floats.keys), (codes.values, floats.values)):
        assert torch.equal(mine, dequantised(*quantised(exact), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_suffix", (False, True))
@pytest.mark.parametrize("size", (24, 64, 7))
def test_nothing_is_stored_outside(dtype: torch.dtype, in_suffix: bool, size: int) -> None:
    codes, scales = Guarded(torch.int8, 2, 3, 2, 9, size), Guarded(torch.float32, 2, 3, 2, 9)
    before = codes.array.copy(), scales.array.copy()
    nothing = np.zeros((2, 1, 2, 0, size), np.int8), np.zeros((2, 1, 2, 0), np.float32)
    rows, table = np.arange(3, dtype=np.int32), np.repeat(np.arange(3, dtype=np.int32)[:, None], 9, 1)
    own, other = (codes.array, scales.array), nothing
    prefix, suffix = (other, own) if in_suffix else (own, other)
    lengths = (0, 8) if in_suffix else (8, 0)
    appended = Appended(prefix[0], suffix[0], *lengths, in_suffix, 5, rows, table, None, prefix[1], suffix[1])
    qkv = torch.randn(3, 5, 8 * size).to(dtype)
    expected, expected_scales = quantised(qkv.view(3, 5, 8, size)[:, :, 4:6].transpose(1, 2))
    functional.rotate_and_store(qkv, None, None, appended, 4, 2, size, "none")
    assert np.array_equal(codes.array[0, :, :, 3:8], expected.numpy())
    assert np.array_equal(scales.array[0, :, :, 3:8], expected_scales.numpy())
    for array, known in zip((codes.array, scales.array), before, strict=True):
        for columns in (slice(0, 3), slice(8, 9)):
            assert array[:, :, :, columns].tobytes() == known[:, :, :, columns].tobytes()
    codes.check()
    scales.check()


def test_codes_are_as_near_as_they_can_be() -> None:
    x = _states(torch.float32, 2, 9, 2, 64)
    codes, scales = quantised(x)
    is_finite = x.isfinite().all(-1)
    assert torch.equal(scales.isnan(), ~is_finite)
    assert not codes[~is_finite].any()
    most = x.abs().amax(-1)
    error = (codes.double() * scales[..., None].double() - x.double()).abs().amax(-1)
    usual = is_finite & (most > 1e-35)
    assert (error[usual] <= 0.5001 * most.double()[usual] / 127).all()
    assert (codes[usual].abs().amax(-1) == 127).all()
    assert not scales[is_finite & (most == 0)].any()


WRONG: dict[str, dict[str, Any]] = {
    "no scales": {"prefix_scales": None},
    "no scales of the suffix": {"suffix_scales": None},
    "scales of fewer columns": {"prefix_scales": np.ones((2, 2, 2, 3), np.float32)},
    "scales of another type": {"prefix_scales": np.ones((2, 2, 2, 24), np.float64)},
    "strided scales": {"prefix_scales": np.ones((2, 2, 2, 48), np.float32)[..., ::2]},
    "floats with scales": {"prefix": np.zeros((2, 2, 2, 24, 24), np.float32)},
    "codes of another width": {"prefix": np.zeros((2, 2, 2, 24, 23), np.int8)},
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("n_new", (1, 5))
def test_caches_that_do_not_fit(name: str, n_new: int) -> None:
    heads = (4, 2, 24)
    qkv, cache = (
        random_qkv(torch.float32, 2, n_new, heads),
        coded_cache(torch.float32, 2, 2, *heads[1:], (21, 5)),
    )
    broken = cache._replace(n_new=n_new, **WRONG[name])
    for work in (
        lambda: functional.attend(qkv, broken, Mask("causal"), Scoring(0.2), *heads),
        lambda: functional.rotate_and_store(qkv, None, None, broken, *heads, "none"),
    ):
        with pytest.raises(InvalidInput, match=r"appended\.(prefix|suffix)"):
            work()
