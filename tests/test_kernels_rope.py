"""Rotation of queries and keys, and what is written to the cache."""

import numpy as np
import pytest
import torch

from hfopt import functional
from hfopt.cache import Appended, IndirectCache
from tests import reference
from tests.reference import DTYPES, Guarded, assert_as_exact_as_torch, assert_same_on_threads

ROWS, NEW, HEADS, KV_HEADS = 3, 5, 4, 2


def _appended(dtype: torch.dtype, size: int, in_suffix: bool, capacity: int = 9) -> tuple[Appended, Guarded]:
    """A cache with room for NEW tokens in its last but one columns."""
    cache = Guarded(dtype, 2, ROWS, KV_HEADS, capacity, size)
    other = np.zeros((2, 1, KV_HEADS, 0, size), cache.array.dtype)
    prefix, suffix = (other, cache.array) if in_suffix else (cache.array, other)
    length = capacity - 1
    rows = np.zeros(ROWS, np.int32) if in_suffix else np.arange(ROWS, dtype=np.int32)
    table = np.repeat(np.arange(ROWS, dtype=np.int32)[:, None], capacity, 1)
    lengths = (0, length) if in_suffix else (length, 0)
    return Appended(prefix, suffix, *lengths, in_suffix, NEW, rows, table), cache


def _qkv(dtype: torch.dtype, size: int) -> torch.Tensor:
    return torch.randn(ROWS, NEW, (HEADS + 2 * KV_HEADS) * size).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_suffix", (False, True))
@pytest.mark.parametrize("kind", ("half", "interleaved"))
@pytest.mark.parametrize(
    ("size", "n_rotary", "batch"),
    ((24, 24, 1), (24, 14, 3), (64, 64, 3), (80, 32, 1), (7, 6, 1), (128, 2, 3)),
)
def test_rotate_and_store(
    dtype: torch.dtype, in_suffix: bool, kind: str, size: int, n_rotary: int, batch: int
) -> None:
    angles = n_rotary if kind == "half" else n_rotary // 2
    # both halves of cos and sin are read, so they differ here
    cos, sin = torch.randn(batch, NEW, angles).to(dtype), torch.randn(batch, NEW, angles).to(dtype)
    qkv = _qkv(dtype, size)
    appended, cache = _appended(dtype, size, in_suffix)
    before = cache.array.copy()
    rotated = qkv.clone()
    functional.rotate_and_store(rotated, cos, sin, appended, HEADS, KV_HEADS, size, kind)

    heads = qkv.view(ROWS, NEW, -1, size)
    theirs = reference.rotate(heads, cos, sin, kind)
    exact = reference.rotate(heads.double(), cos.double(), sin.double(), kind)
    queries = rotated.view(ROWS, NEW, -1, size)[:, :, :HEADS]
    assert_as_exact_as_torch(queries, theirs[:, :, :HEADS], exact[:, :, :HEADS])
    assert torch.equal(rotated[..., HEADS * size :], qkv[..., HEADS * size :])

    keys, values = cache.tensor[:, :, :, 3:8].transpose(2, 3)
    key_heads = slice(HEADS, HEADS + KV_HEADS)
    assert_as_exact_as_torch(keys, theirs[:, :, key_heads], exact[:, :, key_heads])
    assert torch.equal(values, heads[:, :, HEADS + KV_HEADS :])
    assert torch.equal(queries[..., n_rotary:], heads[:, :, :HEADS, n_rotary:])
    for columns in (slice(0, 3), slice(8, 9)):
        assert (cache.array[:, :, :, columns] == before[:, :, :, columns]).all()
    cache.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_rotation_tokens_are_only_stored(dtype: torch.dtype) -> None:
    qkv = _qkv(dtype, 24)
    appended, cache = _appended(dtype, 24, in_suffix=False)
    given = qkv.clone()
    functional.rotate_and_store(given, None, None, appended, HEADS, KV_HEADS, 24, "none")
    assert torch.equal(given, qkv)
    stored = cache.tensor[:, :, :, 3:8].permute(1, 3, 0, 2, 4).reshape(ROWS, NEW, -1)
    assert torch.equal(stored, qkv[..., HEADS * 24 :])
    cache.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_angles_in_the_other_dtype_or_strided(dtype: torch.dtype) -> None:
    cos, sin = torch.randn(1, NEW, 24).bfloat16(), torch.randn(1, NEW, 48)[..., ::2].bfloat16()
    qkv = _qkv(dtype, 24)
    results = []
    for c, s in ((cos, sin), (cos.float(), sin.float().contiguous())):
        appended, _ = _appended(dtype, 24, in_suffix=False)
        rotated = qkv.clone()
        functional.rotate_and_store(rotated, c, s, appended, HEADS, KV_HEADS, 24, "half")
        results.append(rotated)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 70, (HEADS + 2 * KV_HEADS) * 64).to(dtype)
    cos, sin = torch.randn(1, 70, 64), torch.randn(1, 70, 64)

    def work() -> torch.Tensor:
        cache, rotated = IndirectCache(), qkv.clone()
        appended = cache.append(0, 2, 70, KV_HEADS, 64, dtype)
        functional.rotate_and_store(rotated, cos, sin, appended, HEADS, KV_HEADS, 64, "half")
        keys, values = cache.layers[0].keys, cache.layers[0].values
        return torch.cat([t.flatten() for t in (rotated, keys, values)])

    assert_same_on_threads(work)
