"""Attention of packed sequences against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.functional import varlen_attention
from hfopt.modules import VarlenAttention
from tests.pairs import pairs_of
from tests.reference import DTYPES, Guarded, assert_same_on_threads
from tests.sequence_cases import HEADS, SIZES, assert_exact, ends_of, exact

Q_LENGTHS, K_LENGTHS = (1, 8, 65, 0, 20, 1, 1, 8, 8), (4096, 8, 1025, 5, 3, 0, 7, 40, 40)


_GOOD: dict[str, Any] = {
    "query": torch.zeros(5, 4, 24),
    "key": torch.zeros(5, 2, 24),
    "value": torch.zeros(5, 2, 24),
    "out": torch.full((5, 4, 24), 7.0),
    "seqlen_q": torch.tensor([0, 2, 5]),
    "seqlen_k": torch.tensor([0, 2, 5]),
    "alibi_slopes": None,
    "max_seqlen_q": 3,
    "max_seqlen_k": 3,
    "pdropout": 0.0,
    "softmax_scale": 0.2,
    "zero_tensors": False,
    "is_causal": True,
    "return_softmax": False,
    "gen_": None,
}


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_lengths: Any,
    k_lengths: Any,
    scale: float | None,
    **options: Any,
) -> Tensor:
    """`varlen_attention` into a new tensor."""
    left, right = options.pop("window", (-1, -1))
    out = torch.full_like(query, torch.nan)
    given = _GOOD | {
        "query": query,
        "key": key,
        "value": value,
        "out": out,
        "seqlen_q": ends_of(q_lengths),
        "seqlen_k": ends_of(k_lengths, torch.int64),
        "alibi_slopes": options.pop("slopes", None),
        "max_seqlen_q": max(q_lengths),
        "max_seqlen_k": max(k_lengths),
        "softmax_scale": scale,
        "window_size_left": left,
        "window_size_right": right,
        "is_causal": False,
    }
    result = varlen_attention(**given | options)
    assert result is out
    return out


def check(query: Tensor, key: Tensor, value: Tensor, q_lengths: Any, k_lengths: Any, **options: Any) -> None:
    scale = options.pop("scale", 0.8 * query.shape[2] ** -0.5)
    out = attended(query, key, value, q_lengths, k_lengths, scale, **options)
    assert_exact(out, exact(query, key, value, q_lengths, k_lengths, scale, **options))


def packed(
    dtype: torch.dtype, heads: tuple[int, int], size: int, n_q: int, n_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    key, value = torch.randn(2, n_k, heads[1], size).to(dtype)
    return torch.randn(n_q, heads[0], size).to(dtype), key, value


@pytest.mark.parametrize(
    ("dtype", "size", "heads", "is_causal", "window", "softcap", "alibi"),
    pairs_of(
        DTYPES,
        SIZES,
        HEADS,
        (True, False),
        ((-1, -1), (2, 1), (512, -1), (0, 0)),
        (-1.0, 50.0),
        (False, True),
    ),
)
def test_sequences(
    dtype: torch.dtype,
    size: int,
    heads: tuple[int, int],
    is_causal: bool,
    window: tuple[int, int],
    softcap: float,
    alibi: bool,
) -> None:
    parts = packed(dtype, heads, size, sum(Q_LENGTHS), sum(K_LENGTHS))
    slopes = torch.rand(heads[0]) * 0.2 if alibi else None
    options: dict[str, Any] = {"is_causal": is_causal, "window": window, "softcap": softcap, "slopes": slopes}
    check(*parts, Q_LENGTHS, K_LENGTHS, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", (1025, 4096))
@pytest.mark.parametrize("window", (-1, 512))
def test_long_prompts(dtype: torch.dtype, length: int, window: int) -> None:
    parts = packed(dtype, (4, 2), 64, length + 8, length + 8)
    check(*parts, (length, 8), (length, 8), is_causal=True, window=(window, -1))


@pytest.mark.parametrize("n_new", (1, 6))
def test_strided_tensors(n_new: int) -> None:
    """Of one projection, of heads before tokens, of every second channel, and results that are strided or in the way."""
    lengths = (n_new,) * 3
    fused = torch.randn(3 * n_new, 4 + 2 + 2, 24)
    heads_first = [torch.randn(heads, 3 * n_new, 24).transpose(0, 1) for heads in (4, 2, 2)]
    every_second = [torch.randn(3 * n_new, heads, 48)[..., ::2] for heads in (4, 2, 2)]
    for query, key, value in (fused.split((4, 2, 2), 1), heads_first, every_second):
        check(query, key, value, lengths, lengths, is_causal=True)
    query, key, value = fused.split((4, 2, 2), 1)
    expected = exact(query, key, value, lengths, lengths, 0.2, is_causal=True)
    fixed = ends_of(lengths), ends_of(lengths), None, n_new, n_new, 0.0, 0.2, False, True, False, None
    for out in (torch.empty(24, 4, 3 * n_new).permute(2, 1, 0), query):
        VarlenAttention()(query, key, value, out, *fixed)
        assert_exact(out, expected)


def test_slopes_of_each_sequence_and_the_scale_by_default() -> None:
    parts, slopes = packed(torch.float32, (4, 2), 24, 12, 30), torch.rand(3, 4)
    check(*parts, (1, 1, 10), (9, 9, 12), slopes=slopes, is_causal=True)
    out = attended(*parts, (1, 1, 10), (9, 9, 12), None)
    assert torch.equal(out, attended(*parts, (1, 1, 10), (9, 9, 12), 24**-0.5))


def test_what_is_not_a_sequence_s_is_left_alone() -> None:
    """Rows behind the last query, and keys behind the last one, which may hold anything."""
    query, key, value = packed(torch.float32, (2, 1), 24, 9, 12)
    key[10:], value[10:] = torch.nan, torch.inf
    out = Guarded(torch.float32, 9, 2, 24)
    before = out.tensor[6:].clone()
    ends = torch.tensor([2, 3, 6]), torch.tensor([1, 5, 10])
    varlen_attention(query, key, value, out.tensor, *ends, None, 3, 5, 0.0, 0.2, False, True, False, None)
    out.check()
    assert torch.equal(out.tensor[6:].view(torch.int32), before.view(torch.int32))
    expected = exact(query[2:6], key[1:10], value[1:10], (1, 3), (4, 5), 0.2, is_causal=True)
    assert_exact(out.tensor[2:6], expected)
    nothing = torch.empty(0, 2, 24)
    zeros = torch.zeros(1, dtype=torch.int32)
    varlen_attention(
        nothing, key, value, nothing, zeros, zeros, None, 0, 0, 0.0, 0.2, False, True, False, None
    )


def test_the_same_bits_on_each_number_of_threads() -> None:
    parts = packed(torch.float32, (4, 2), 64, 202, 400)
    assert_same_on_threads(lambda: attended(*parts, (1, 1, 200), (90, 110, 200), 0.1, is_causal=True))


_BAD: list[tuple[str, Any]] = [
    ("query", torch.zeros(5, 96)),
    ("query", torch.zeros(5, 4, 24, dtype=torch.float64)),
    ("query", torch.zeros(5, 4, 32)),
    ("query", torch.zeros(5, 3, 24)),
    ("query", torch.zeros(5, 4, 24, device="meta")),
    ("key", torch.zeros(5, 2, 24, dtype=torch.bfloat16)),
    ("key", torch.zeros(5, 48)),
    ("value", torch.zeros(6, 2, 24)),
    ("out", torch.zeros(4, 4, 24)),
    ("out", torch.zeros(5, 4, 24, dtype=torch.float16)),
    ("out", torch.zeros(5, 1, 24).expand(5, 4, 24)),
    ("seqlen_q", torch.tensor([0, 2, 6])),
    ("seqlen_q", torch.tensor([0, 3, 2])),
    ("seqlen_q", torch.tensor([-1, 2, 5])),
    ("seqlen_q", torch.tensor([0.0, 2.0, 5.0])),
    ("seqlen_q", [0, 2, 5]),
    ("seqlen_k", torch.tensor([0, 5])),
    ("seqlen_k", torch.tensor([0, 2, 6])),
    ("seqlen_k", torch.zeros(2, 2, dtype=torch.int32)),
    ("alibi_slopes", torch.zeros(2)),
    ("alibi_slopes", torch.full((4,), torch.nan)),
    ("max_seqlen_q", 2),
    ("max_seqlen_k", 2),
    ("pdropout", 0.1),
    ("softmax_scale", float("nan")),
    ("zero_tensors", True),
    ("return_softmax", True),
    ("gen_", torch.Generator()),
    ("window_size_left", -2),
    ("window_size_right", -5),
    ("softcap", 1e38),
    ("seqlen_q", torch.tensor([0, 2**63 - 1, -(2**63)])),
    ("max_seqlen_q", "x"),
    ("pdropout", torch.zeros(2)),
    ("softmax_scale", 1e300),
    ("softmax_scale", "x"),
    ("is_causal", torch.zeros(2)),
    ("return_softmax", None),
    ("window_size_left", 1.5),
    ("softcap", None),
]


@pytest.mark.parametrize(("name", "wrong"), _BAD)
def test_what_does_not_fit_is_refused(name: str, wrong: Any) -> None:
    given = _GOOD | {"out": _GOOD["out"].clone(), name: wrong}
    with pytest.raises(InvalidInput, match=name):
        varlen_attention(**given)
    assert name == "out" or torch.equal(given["out"], _GOOD["out"])


def test_freed_memory_is_refused() -> None:
    for name in ("query", "key", "value", "out", "seqlen_q", "alibi_slopes"):
        freed = torch.zeros(4) if name == "alibi_slopes" else _GOOD[name].clone()
        freed.untyped_storage().resize_(0)
        with pytest.raises((InvalidInput, RuntimeError)):
            varlen_attention(**_GOOD | {name: freed})
