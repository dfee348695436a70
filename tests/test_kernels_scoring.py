"""Softcaps, slopes, sinks and windows of attention, against float64 and against torch, and which of them are refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hfopt import functional
from hfopt.cache import Appended
from hfopt.errors import InvalidInput
from hfopt.functional import Mask, Scoring
from tests.attention_cases import (
    CACHES,
    MakeCache,
    by_bytes,
    causal_mask,
    check_attend,
    random_cache,
    random_qkv,
)
from tests.pairs import pairs_of
from tests.reference import DTYPES, assert_same_on_threads

# (query heads, key heads, head_dim)
HEADS = (4, 2, 24), (8, 2, 64), (8, 1, 80), (6, 3, 128), (2, 2, 7), (2, 1, 256)
# rows, rows of the prefix, new tokens, lengths
ROWS = (
    (1, 1, 1, (300, 0)),
    (8, 2, 1, (41, 270)),
    (2, 2, 150, (150, 0)),
    (2, 2, 13, (141, 0)),
    (4, 2, 70, (3, 71)),
    (4, 2, 3, (70, 9)),
)
Rows = tuple[int, int, int, tuple[int, int]]
Heads = tuple[int, int, int]


def scoring_of(
    heads: Heads,
    dtype: torch.dtype,
    *,
    slopes: bool = False,
    sinks: bool = False,
    factor: float = 1.0,
    **options: Any,
) -> Scoring:
    """A scoring for such heads; slopes are those of ALiBi, factor: of the scale."""
    n_heads, _, size = heads
    return Scoring(
        factor * size**-0.5,
        slopes=2.0 ** (-8 * torch.arange(1, n_heads + 1) / n_heads) if slopes else None,
        sinks=torch.randn(n_heads).to(dtype) if sinks else None,
        **options,
    )


OPTIONS: tuple[dict[str, Any], ...] = (
    {"softcap": 1.5},
    {"softcap": 30.0, "factor": -4.0},
    {"slopes": True},
    {"sinks": True},
    {"window": 1},
    {"window": 2},
    {"window": 17},
    {"window": 10**6},
    {"softcap": 0.7, "slopes": True},
    {"softcap": 2.0, "sinks": True, "window": 17},
    {"slopes": True, "sinks": True, "factor": -1.0},
    {"softcap": 5.0, "slopes": True, "sinks": True, "window": 33, "factor": 3.0},
    {"softcap": 5.0, "slopes": True, "sinks": True, "window": 64, "factor": 0.0},
    {"slopes": True, "ranked": True, "factor": 2.0},
    {"softcap": 5.0, "slopes": True, "sinks": True, "ranked": True, "factor": -1.0},
)


@pytest.mark.parametrize(
    ("make", "dtype", "heads", "rows", "options"), pairs_of(CACHES, DTYPES, HEADS, ROWS, OPTIONS)
)
@pytest.mark.thinned(3)
def test_scores(
    make: MakeCache, dtype: torch.dtype, heads: Heads, rows: Rows, options: dict[str, Any]
) -> None:
    n_rows, n_prefix_rows, n_new, lengths = rows
    n_keys = sum(lengths)
    qkv = random_qkv(dtype, n_rows, n_new, heads)
    cache = make(dtype, n_rows, n_prefix_rows, *heads[1:], lengths)
    scoring = scoring_of(heads, dtype, **options)
    causal = causal_mask(n_rows, n_new, n_keys)
    out = check_attend(qkv, cache, Mask("causal" if n_new > 1 else "none"), causal, heads, scoring)
    masked = functional.attend(qkv, cache._replace(n_new=n_new), by_bytes(causal), scoring, *heads)
    assert torch.equal(masked, out)
    check_attend(qkv, cache, Mask("none"), torch.ones_like(causal), heads, scoring)
    padded = causal.clone()
    padded[0, :, : n_keys - n_new // 2] = False  # left padding, and with it queries that see nothing
    for seen in (padded, causal & (torch.rand(causal.shape) < 0.6)):
        out = check_attend(qkv, cache, by_bytes(seen), seen, heads, scoring)
        assert not out[~seen.any(-1)].any()


# blocks of 16, 32 and 64 keys, chunks of 64 and more
@pytest.mark.parametrize(
    ("dtype", "n_keys", "window"),
    pairs_of(DTYPES, (31, 32, 33, 63, 64, 65, 127, 128, 129, 200), (15, 16, 17, 31, 32, 33, 63, 64, 65, 128)),
)
def test_windows_around_blocks(dtype: torch.dtype, n_keys: int, window: int) -> None:
    heads = (6, 2, 32)
    for n_suffix in (0, 5):
        cache = random_cache(dtype, 2, 2, 2, 32, (n_keys - n_suffix, n_suffix))
        for n_new in (1, 2, 25):
            qkv, seen = random_qkv(dtype, 2, n_new, heads), causal_mask(2, n_new, n_keys)
            mask = Mask("causal" if n_new > 1 else "none")
            check_attend(qkv, cache, mask, seen, heads, Scoring(0.2, window=window))


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_new", (2, 5, 50, 333))
def test_bits_of_a_token_do_not_depend_on_the_others(make: MakeCache, dtype: torch.dtype, n_new: int) -> None:
    heads = (6, 3, 64)
    qkv = random_qkv(dtype, 1, 400, heads)
    cache = make(dtype, 1, 1, 3, 64, (500, 0))
    scoring = scoring_of(heads, dtype, softcap=2.0, slopes=True, sinks=True, window=77)
    together = functional.attend(qkv, cache._replace(n_new=400), Mask("causal"), scoring, *heads)
    last = qkv[:, -n_new:].contiguous()
    alone = functional.attend(last, cache._replace(n_new=n_new), Mask("causal"), scoring, *heads)
    assert torch.equal(together[:, -n_new:], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_row_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    """Four query heads fill a tile; rows of one prompt share their pass over its keys."""
    heads = (8, 2, 32)
    qkv = random_qkv(dtype, 5, 1, heads)
    cache = random_cache(dtype, 5, 1, 2, 32, (190, 3))
    scoring = scoring_of(heads, dtype, softcap=2.0, slopes=True, sinks=True, window=150)
    together = functional.attend(qkv, cache, Mask("none"), scoring, *heads)
    alone = cache._replace(prefix_row=cache.prefix_row[2:], table=cache.table[2:])
    assert torch.equal(
        functional.attend(qkv[2:].contiguous(), alone, Mask("none"), scoring, *heads), together[2:]
    )


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_new", "lengths"), ((1, (2000, 40)), (300, (700, 0)), (40, (2100, 70))))
def test_bits_do_not_depend_on_threads(
    make: MakeCache, dtype: torch.dtype, n_new: int, lengths: tuple[int, int]
) -> None:
    heads = (8, 4, 64)
    qkv = random_qkv(dtype, 3, n_new, heads)
    cache = make(dtype, 3, 2, *heads[1:], lengths)._replace(n_new=n_new)
    scoring = scoring_of(heads, dtype, softcap=2.0, slopes=True, sinks=True, window=600)
    mask = Mask("causal" if n_new > 1 else "none")
    assert_same_on_threads(lambda: functional.attend(qkv, cache, mask, scoring, *heads))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_new", (1, 9, 70))
@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_what_a_window_or_a_mask_hides_does_not_leak(dtype: torch.dtype, n_new: int, value: float) -> None:
    heads = (4, 2, 24)
    qkv, cache = random_qkv(dtype, 2, n_new, heads), random_cache(dtype, 2, 2, 2, 24, (140, 31))
    cache = cache._replace(n_new=n_new)
    scoring = scoring_of(heads, dtype, softcap=2.0, slopes=True, sinks=True, window=30)
    seen = causal_mask(2, n_new, 171)
    seen[:, :, 160] = False
    expected = functional.attend(qkv, cache, by_bytes(seen), scoring, *heads)
    assert expected.isfinite().all()
    torch.from_numpy(cache.prefix).view(dtype)[:, :, :, : 171 - n_new - 30] = value
    torch.from_numpy(cache.suffix).view(dtype)[:, :, :, 20] = value
    assert torch.equal(functional.attend(qkv, cache, by_bytes(seen), scoring, *heads), expected)


@pytest.mark.parametrize(("make", "dtype", "n_new"), pairs_of(CACHES, DTYPES, (1, 5, 60)))
def test_ranks_are_those_of_each_row(make: MakeCache, dtype: torch.dtype, n_new: int) -> None:
    """Rows of one prompt share their pass over its keys, however many of them each has in front of its first one."""
    heads, n_keys = (4, 2, 24), 700
    qkv = random_qkv(dtype, 6, n_new, heads)
    cache = make(dtype, 6, 1, *heads[1:], (660, 40))
    scoring, seen = scoring_of(heads, dtype, slopes=True, ranked=True), causal_mask(6, n_new, n_keys)
    for row, n_padded in enumerate((0, 1, 1, 15, 16, 333)):
        seen[row, :, :n_padded] = False
    out = check_attend(qkv, cache, by_bytes(seen), seen, heads, scoring)
    for row in (2, 5):
        alone = cache._replace(n_new=n_new, prefix_row=cache.prefix_row[row:], table=cache.table[row:])
        given = qkv[row:].contiguous(), alone, by_bytes(seen[row:])
        assert torch.equal(functional.attend(*given, scoring, *heads), out[row:])


@pytest.mark.parametrize("n_new", (1, 9))
def test_sinks_alone(n_new: int) -> None:
    """A high one takes all weight, one of -inf none, and one that has become NaN is no secret."""
    heads = (4, 2, 24)
    qkv = random_qkv(torch.float32, 1, n_new, heads)
    cache = random_cache(torch.float32, 1, 1, 2, 24, (60, 0))._replace(n_new=n_new)
    mask = Mask("causal" if n_new > 1 else "none")

    def attended(scoring: Scoring) -> Tensor:
        return functional.attend(qkv, cache, mask, scoring, *heads).unflatten(-1, (4, 24))

    plain, sinks = attended(Scoring(0.2)), torch.tensor([-torch.inf, 200.0, 0.0, -torch.inf])
    out = attended(Scoring(0.2, sinks=sinks))
    assert torch.equal(out[:, :, [0, 3]], plain[:, :, [0, 3]])
    assert not out[:, :, 1].any() and (out[:, :, 2] != plain[:, :, 2]).any()
    scoring = Scoring(0.2, sinks=sinks)
    sinks[1] = torch.nan
    assert attended(scoring)[:, :, 1].isnan().all()


def test_a_softcap_of_large_scores() -> None:
    """tanh is 1 there, and no more than that."""
    heads = (1, 1, 24)
    cache = random_cache(torch.float32, 1, 1, 1, 24, (60, 0))
    for n_new in (1, 5):
        qkv = 1e6 * random_qkv(torch.float32, 1, n_new, heads)
        seen = causal_mask(1, n_new, 60)
        check_attend(qkv, cache, by_bytes(seen), seen, heads, Scoring(1.0, 3.0))


# ---- the way by torch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ("torch", "auto", "hfopt"))
@pytest.mark.parametrize("options", OPTIONS)
def test_torch_is_asked_for_plain_scores_only(
    by: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    file: Any = __import__("hfopt.functional.attention", fromlist=["attention"])
    monkeypatch.setattr(file, "takes_torch", lambda *arguments: asked.append(arguments))
    heads = (4, 2, 24)
    cache = random_cache(torch.float32, 1, 1, 2, 24, (60, 0))._replace(n_new=9)
    qkv, scoring = random_qkv(torch.float32, 1, 9, heads), scoring_of(heads, torch.float32, **options)
    functional.attend(qkv, cache, Mask("causal"), scoring, *heads, by=by)
    assert bool(asked) == (by != "hfopt" and options == {"window": 10**6})


# ---- what is refused -------------------------------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "softcap is 0": {"softcap": 0.0},
    "softcap is -1": {"softcap": -1.0},
    "softcap is inf": {"softcap": torch.inf},
    "softcap is nan": {"softcap": torch.nan},
    "softcap is 1e-40": {"softcap": 1e-40},
    "window is 0": {"window": 0},
    "window is -3": {"window": -3},
    "window is 2.0": {"window": 2.0},
    "window is 9223372036854775808": {"window": 2**63},
    "ranked is True: slopes, and no window,": {"ranked": True},
    "ranked is True: slopes": {"ranked": True, "slopes": torch.ones(4), "window": 5},
    "slopes has nan": {"slopes": torch.tensor([0.1, torch.nan])},
    "slopes has -inf": {"slopes": torch.tensor([0.1, -torch.inf])},
    "slopes has dtype torch.int64": {"slopes": torch.ones(4, dtype=torch.int64)},
    "slopes is a list": {"slopes": [1.0]},
    "sinks has nan": {"sinks": torch.tensor([0.1, torch.nan])},
    "sinks has inf": {"sinks": torch.tensor([0.1, torch.inf])},
    "sinks is on device meta": {"sinks": torch.ones(4, device="meta")},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_scorings_that_are_wrong(wrong: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{wrong}"):
        Scoring(0.2, **WRONG[wrong])


WRONG_HERE: dict[str, Callable[[], Scoring]] = {
    "slopes has dtype torch.bfloat16": lambda: Scoring(0.2, slopes=torch.ones(4, dtype=torch.bfloat16)),
    r"slopes has shape \(3,\)": lambda: Scoring(0.2, slopes=torch.ones(3)),
    r"slopes has strides \(2,\)": lambda: Scoring(0.2, slopes=torch.ones(8)[::2]),
    r"sinks has shape \(1, 4\)": lambda: Scoring(0.2, sinks=torch.ones(1, 4)),
    "sinks has dtype torch.bfloat16": lambda: Scoring(0.2, sinks=torch.ones(4, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("wrong", WRONG_HERE)
@pytest.mark.parametrize("n_new", (1, 5))
def test_scorings_that_do_not_fit(wrong: str, n_new: int) -> None:
    heads = (4, 2, 24)
    cache: Appended = random_cache(torch.float32, 1, 1, 2, 24, (60, 0))._replace(n_new=n_new)
    qkv = random_qkv(torch.float32, 1, n_new, heads)
    with pytest.raises(InvalidInput, match=f"^{wrong}"):
        functional.attend(qkv, cache, Mask("causal"), WRONG_HERE[wrong](), *heads)


def test_tensors_that_are_freed() -> None:
    for name in ("slopes", "sinks"):
        tensor = torch.ones(4)
        scoring = Scoring(0.2, **{name: tensor})  # type: ignore[arg-type]
        tensor.untyped_storage().resize_(0)
        with pytest.raises(InvalidInput, match=f"{name} of shape .* has no memory"):
            scoring.numbers(4, torch.float32)


def test_numbers_of_a_plain_scoring() -> None:
    assert Scoring(np.float32(0.5)).numbers(4, torch.float32) == (0.5, 0.0, 0, 0, 0, 0)  # type: ignore[arg-type]
