"""Caches in blocks: what is written to them, and attention over them, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.modules import PagedAttention
from tests.pairs import pairs_of
from tests.reference import DTYPES, assert_same_on_threads
from tests.sequence_cases import HEADS, SIZES, Paged, assert_exact, ends_of, exact

LENGTHS = (1, 8, 1025, 4096, 0, 31)
Q_LENGTHS = (1, 8, 65, 1, 3, 40)
FLOAT8 = (torch.float8_e5m2, torch.float8_e4m3fn)
_DTYPES = (torch.float32, torch.bfloat16)


def one_each(cache: Paged, query: Tensor, lengths: Any, window: int = -1, **options: Any) -> Tensor:
    """`single_query_cached_kv_attention` into a new tensor."""
    _, n_kv_heads, block_size, size = cache.key_cache.shape
    out = torch.full_like(query, torch.nan)
    mapping = torch.arange(query.shape[1], dtype=torch.int32) // (query.shape[1] // n_kv_heads)
    result = PagedAttention.single_query_cached_kv_attention(
        out,
        query,
        cache.key_cache,
        cache.value_cache,
        mapping,
        0.8 * size**-0.5,
        cache.tables,
        torch.tensor(lengths, dtype=cache.tables.dtype),
        block_size,
        max(lengths),
        options.get("slopes"),
        window,
        *cache.scales,
        options.get("softcap", -1.0),
    )
    assert result is out
    return out


def several(
    cache: Paged, query: Tensor, q_lengths: Any, k_lengths: Any, is_causal: bool, **options: Any
) -> Tensor:
    """`flash_attn_varlen_func` into a new tensor."""
    out = torch.full_like(query, torch.nan)
    PagedAttention.flash_attn_varlen_func(
        out,
        query,
        cache.key_cache,
        cache.value_cache,
        ends_of(q_lengths),
        ends_of(k_lengths),
        max(q_lengths),
        max(k_lengths),
        0.8 * query.shape[2] ** -0.5,
        is_cusal=is_causal,
        block_tables=cache.tables,
        alibi_slopes=options.get("slopes"),
        window_size_left=options.get("window", (-1, -1))[0],
        window_size_right=options.get("window", (-1, -1))[1],
        k_scale=cache.scales[0],
        v_scale=torch.tensor(cache.scales[1]),
        softcap=options.get("softcap", -1.0),
    )
    return out


@pytest.mark.parametrize(
    ("dtype", "size", "heads", "block_size", "window", "softcap", "alibi"),
    pairs_of(DTYPES, SIZES, HEADS, (16, 32, 5), (-1, 2, 512), (-1.0, 50.0), (False, True)),
)
def test_one_query_each(
    dtype: torch.dtype,
    size: int,
    heads: tuple[int, int],
    block_size: int,
    window: int,
    softcap: float,
    alibi: bool,
) -> None:
    cache = Paged(dtype, LENGTHS, heads[1], size, block_size)
    query = torch.randn(len(LENGTHS), heads[0], size).to(dtype)
    slopes = torch.rand(heads[0]) * 0.2 if alibi else None
    out = one_each(cache, query, LENGTHS, window, softcap=softcap, slopes=slopes)
    manner: dict[str, Any] = {
        "window": (window - 1 if window > 0 else -1, -1),
        "softcap": softcap,
        "slopes": slopes,
    }
    ones = [1] * len(LENGTHS)
    assert_exact(out, exact(query, cache.key, cache.value, ones, LENGTHS, 0.8 * size**-0.5, **manner))


@pytest.mark.parametrize(
    ("dtype", "size", "heads", "block_size", "is_causal", "window", "softcap", "alibi"),
    pairs_of(
        DTYPES,
        SIZES,
        HEADS,
        (16, 32),
        (True, False),
        ((-1, -1), (2, -1), (512, 3)),
        (-1.0, 50.0),
        (False, True),
    ),
)
def test_several_queries_each(
    dtype: torch.dtype,
    size: int,
    heads: tuple[int, int],
    block_size: int,
    is_causal: bool,
    window: tuple[int, int],
    softcap: float,
    alibi: bool,
) -> None:
    cache = Paged(dtype, LENGTHS, heads[1], size, block_size, index=torch.int64)
    query = torch.randn(sum(Q_LENGTHS), heads[0], size).to(dtype)
    manner: dict[str, Any] = {
        "window": window,
        "softcap": softcap,
        "slopes": torch.rand(heads[0]) * 0.2 if alibi else None,
    }
    out = several(cache, query, Q_LENGTHS, LENGTHS, is_causal, **manner)
    options: dict[str, Any] = {"is_causal": is_causal} | manner
    assert_exact(out, exact(query, cache.key, cache.value, Q_LENGTHS, LENGTHS, 0.8 * size**-0.5, **options))


_QUICK_FLOAT8 = ((torch.bfloat16, torch.float8_e4m3fn, 1), (torch.float32, torch.float8_e5m2, 5))


@pytest.mark.parametrize("block_size", (16, 5))
@pytest.mark.parametrize("heads", HEADS[1:3])
@pytest.mark.parametrize(
    ("dtype", "held", "n_new"),
    [
        pytest.param(*each, marks=() if each in _QUICK_FLOAT8 else pytest.mark.slow)
        for dtype in DTYPES
        for held in FLOAT8
        for n_new in (1, 5)
        if (each := (dtype, held, n_new))
    ],
)
def test_float8(
    dtype: torch.dtype, held: torch.dtype, n_new: int, heads: tuple[int, int], block_size: int
) -> None:
    """Of which all codes are read as what they are, and scaled."""
    lengths = (100, 5, 257)
    for size in (64, 70):
        cache = Paged(dtype, lengths, heads[1], size, block_size, held=held, scales=(0.25, 0.3))
        query = torch.randn(3 * n_new, heads[0], size).to(dtype)
        if n_new == 1:
            out = one_each(cache, query, lengths)
        else:
            out = several(cache, query, (n_new,) * 3, lengths, True)
        expected = exact(
            query, cache.key, cache.value, (n_new,) * 3, lengths, 0.8 * size**-0.5, is_causal=True
        )
        assert_exact(out, expected)


@pytest.mark.parametrize("held", FLOAT8)
def test_each_code_of_float8(held: torch.dtype) -> None:
    """A sequence of one token is its value, whatever the code; NaN and infinity are read as such."""
    codes = torch.arange(256, dtype=torch.uint8).view(held).view(4, 1, 1, 64)
    values = codes.reshape(4, 1, 64).float()
    dtype = torch.bfloat16 if held is torch.float8_e4m3fn else torch.float32  # what other tests compile
    out = torch.empty(4, 1, 64, dtype=dtype)
    mapping, tables, lengths = (
        torch.zeros(1, dtype=torch.int32),
        torch.arange(4)[:, None],
        torch.ones(4, dtype=torch.int32),
    )
    if dtype is torch.float32:
        keys = torch.zeros(4, 1, 1, 64).to(held)
        ends, query = ends_of((2,) * 4), torch.zeros(8, 1, 64)
        out = torch.empty(8, 1, 64)
        PagedAttention.flash_attn_varlen_func(
            out,
            query,
            keys,
            codes,
            ends,
            ends_of((1,) * 4),
            2,
            1,
            0.1,
            False,
            tables,
            None,
            kv_cache_dtype="fp8",
        )
        out = out[::2]
    else:
        keys, query = torch.zeros(4, 1, 1, 64).to(held), torch.zeros(4, 1, 64, dtype=dtype)
        PagedAttention.single_query_cached_kv_attention(
            out, query, keys, codes, mapping, 0.1, tables, lengths, 1, 1, None
        )
    assert torch.equal(out.isnan(), values.isnan())
    finite = values.isfinite()
    assert torch.equal(out.float()[finite], values[finite])


def test_cache_that_is_strided_or_of_one_tensor() -> None:
    lengths = (20, 33)
    query = torch.randn(2, 4, 24)
    cache = Paged(torch.float32, lengths, 2, 24, 16)
    expected = one_each(cache, query, lengths)
    kinds = {
        "of one tensor": torch.stack([cache.key_cache, cache.value_cache]).unbind(0),
        "tokens before heads": [
            part.transpose(1, 2).contiguous().transpose(1, 2) for part in (cache.key_cache, cache.value_cache)
        ],
        "strided apart": [cache.key_cache, cache.value_cache.transpose(1, 2).contiguous().transpose(1, 2)],
        "channels apart": [
            part.transpose(2, 3).contiguous().transpose(2, 3) for part in (cache.key_cache, cache.value_cache)
        ],
    }
    for kind, (cache.key_cache, cache.value_cache) in kinds.items():
        torch.testing.assert_close(one_each(cache, query, lengths), expected, rtol=1e-6, atol=1e-6, msg=kind)


def test_head_mapping() -> None:
    """Query heads of a head of keys may be anywhere."""
    cache = Paged(torch.float32, (20, 33), 2, 24, 16)
    query, slopes = torch.randn(2, 4, 24), torch.rand(4)
    order = torch.tensor([2, 0, 3, 1])
    expected = torch.empty_like(query)
    given = {
        "key_cache": cache.key_cache,
        "value_cache": cache.value_cache,
        "block_tables": cache.tables,
        "context_lens": torch.tensor([20, 33]),
        "max_context_len": 33,
    }
    attend = PagedAttention.single_query_cached_kv_attention
    blocked = {"query": query[:, order], "output": expected, "alibi_slopes": slopes[order]}
    attend(**_SINGLE | given | blocked)
    out = torch.empty_like(query)
    mixed = {
        "query": query,
        "output": out,
        "alibi_slopes": slopes,
        "head_mapping": torch.tensor([0, 1, 0, 1]),
    }
    attend(**_SINGLE | given | mixed)
    assert torch.equal(out[:, order], expected)


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", (None, *FLOAT8))
@pytest.mark.parametrize("store", ("reshape_and_cache", "reshape_and_cache_flash"))
def test_what_is_stored(held: torch.dtype | None, store: str) -> None:
    """In the slots that are named and nowhere else; the last one of several for a slot, none for a negative one."""
    key, value = torch.randn(2, 6, 3, 24).bfloat16()
    kind = held or torch.bfloat16
    caches = [torch.zeros(4, 3, 16, 24, dtype=kind) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    slots = torch.tensor([5, -1, 63, 5, 40, -7], dtype=torch.int32)
    scales: dict[str, Any] = {"k_scale": 1.0, "v_scale": 1.0}
    if held is not None:
        scales = {"k_scale": 0.3, "v_scale": torch.tensor([2.5])}
    for part, cache, scale in zip((key, value), expected, scales.values(), strict=True):
        for token, slot in ((2, 63), (3, 5), (4, 40)):
            cache[slot // 16, :, slot % 16] = (part[token].float() / scale).to(kind)
    for strided in (False, True):
        targets = [
            cache.transpose(2, 3).contiguous().transpose(2, 3) if strided else cache for cache in caches
        ]
        getattr(PagedAttention, store)(key, value, *targets, slots, **scales)
        for target, wanted in zip(targets, expected, strict=True):
            assert torch.equal(target.float(), wanted.float())


def test_tokens_of_the_cache_itself_are_stored_as_they_were() -> None:
    caches = torch.randn(2, 4, 3, 16, 24)
    before = caches.clone()
    key, value = (cache[0].transpose(0, 1)[:3] for cache in caches)
    PagedAttention.reshape_and_cache(key, value, caches[0], caches[1], torch.tensor([1, 2, 3]))
    assert torch.equal(caches[:, 0, :, 1:4], before[:, 0, :, :3])


def test_many_tokens_are_stored_on_several_threads() -> None:
    def work() -> Tensor:
        torch.manual_seed(0)
        cache = Paged(torch.float32, (4096,), 4, 64, 16)
        assert torch.equal(cache.key_cache.transpose(1, 2).reshape(-1, 4, 64)[cache.slots], cache.key)
        assert torch.equal(cache.value_cache.transpose(1, 2).reshape(-1, 4, 64)[cache.slots], cache.value)
        return one_each(cache, torch.randn(1, 8, 64), (4096,))

    assert_same_on_threads(work)


# ---- what is refused -------------------------------------------------------------------------------------------------

_CACHE = torch.zeros(3, 2, 16, 24)
_SLOTS: dict[str, Any] = {
    "key": torch.ones(2, 2, 24),
    "value": torch.ones(2, 2, 24),
    "key_cache": _CACHE,
    "value_cache": _CACHE.clone(),
    "slot_mapping": torch.tensor([0, 17]),
}
_SINGLE: dict[str, Any] = {
    "output": torch.full((2, 4, 24), 7.0),
    "query": torch.zeros(2, 4, 24),
    "key_cache": _CACHE,
    "value_cache": _CACHE.clone(),
    "head_mapping": torch.tensor([0, 0, 1, 1]),
    "scale": 0.2,
    "block_tables": torch.tensor([[0, 1], [2, 99]]),
    "context_lens": torch.tensor([20, 16]),
    "block_size": 16,
    "max_context_len": 20,
    "alibi_slopes": None,
}
_SEVERAL: dict[str, Any] = {
    name: _SINGLE[name] for name in ("query", "key_cache", "value_cache", "scale", "output")
} | {
    "cu_seqlens_q": torch.tensor([0, 1, 2]),
    "cu_seqlens_kv": torch.tensor([0, 20, 36]),
    "max_seqlen_q": 1,
    "max_seqlen_kv": 20,
    "is_cusal": True,
    "block_tables": _SINGLE["block_tables"],
    "alibi_slopes": None,
}
_BAD_CACHES: list[tuple[str, Any]] = [
    ("key_cache", torch.zeros(3, 2, 16, 32)),
    ("key_cache", torch.zeros(3, 2, 384)),
    ("key_cache", torch.zeros(3, 2, 16, 24, dtype=torch.int8)),
    ("key_cache", torch.zeros(3, 2, 16, 24, dtype=torch.float64)),
    ("value_cache", torch.zeros(3, 2, 16, 25)),
    ("value_cache", torch.zeros(3, 2, 16, 24, dtype=torch.bfloat16)),
    ("k_scale", 0.5),
    ("v_scale", float("nan")),
    ("k_scale", torch.ones(2)),
]
_BAD: list[tuple[str, dict[str, Any], str, Any]] = [
    *(
        (function, given, name, wrong)
        for function, given in (
            ("reshape_and_cache", _SLOTS),
            ("single_query_cached_kv_attention", _SINGLE),
            ("flash_attn_varlen_func", _SEVERAL),
        )
        for name, wrong in _BAD_CACHES
    ),
    *(
        ("reshape_and_cache", _SLOTS, name, wrong)
        for name, wrong in (
            ("key", torch.zeros(2, 48)),
            ("value", torch.zeros(2, 2, 25)),
            ("slot_mapping", torch.tensor([0, 48])),
            ("slot_mapping", torch.tensor([0])),
            ("slot_mapping", torch.tensor([0.0, 1.0])),
            ("key_cache", torch.zeros(1, 2, 16, 24).expand(3, 2, 16, 24)),
            ("kv_cache_dtype", "fp8"),
            ("kv_cache_dtype", "int4"),
        )
    ),
    *(
        ("single_query_cached_kv_attention", _SINGLE, name, wrong)
        for name, wrong in (
            ("query", torch.zeros(2, 3, 24)),
            ("output", torch.zeros(2, 4, 25)),
            ("head_mapping", torch.tensor([0, 0, 0, 1])),
            ("head_mapping", torch.tensor([0, 0, 2, 2])),
            ("head_mapping", torch.tensor([0, 1])),
            ("scale", float("inf")),
            ("block_tables", torch.tensor([[0, 3], [2, 99]])),
            ("block_tables", torch.tensor([[-1, 1], [2, 99]])),
            ("block_tables", torch.tensor([[0], [2]])),
            ("block_tables", torch.tensor([[0, 1]])),
            ("context_lens", torch.tensor([20])),
            ("context_lens", torch.tensor([20, -1])),
            ("block_size", 32),
            ("max_context_len", 19),
            ("alibi_slopes", torch.zeros(3)),
            ("window_size", 0),
            ("window_size", -2),
        )
    ),
    *(
        ("flash_attn_varlen_func", _SEVERAL, name, wrong)
        for name, wrong in (
            ("cu_seqlens_q", torch.tensor([0, 1, 3])),
            ("cu_seqlens_kv", torch.tensor([0, 20])),
            ("max_seqlen_kv", 5),
            ("block_tables", torch.tensor([[0, 3], [2, 99]])),
            ("block_tables", torch.tensor([[0], [2]])),
            ("window_size_left", -2),
            ("kv_cache_dtype", "fp8_e4m3"),
        )
    ),
]


@pytest.mark.parametrize(("function", "given", "name", "wrong"), _BAD)
def test_what_does_not_fit_is_refused(function: str, given: dict[str, Any], name: str, wrong: Any) -> None:
    """And nothing is written."""
    given = {key: value.clone() if isinstance(value, Tensor) else value for key, value in given.items()}
    written = {key: value for key, value in given.items() if key in ("output", "key_cache", "value_cache")}
    before = {key: value.clone() for key, value in written.items()}
    with pytest.raises(InvalidInput, match=name):
        getattr(PagedAttention, function)(**given | {name: wrong})
    assert all(torch.equal(value, before[key]) for key, value in written.items())
