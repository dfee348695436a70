"""Attention over the cache, decode and prefill, against float64 and against torch."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hfopt import functional
from hfopt.cache import Appended, IndirectCache
from hfopt.errors import InvalidInput
from hfopt.functional import Mask, Scoring
from hfopt.kernels.attention import cache_record
from hfopt.kernels.attention import decode as attention
from hfopt.kernels.attention import prefill as attention_prefill
from hfopt.kernels.attention import scoring as scores
from hfopt.kernels.attention.cache_view import open_cache
from hfopt.kernels.attention.plan import scratch_bytes
from hfopt.kernels.attention.seen import CAUSAL
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.simd.pointer import address_as, pointer
from tests import reference
from tests.attention_cases import (
    CACHES,
    MakeCache,
    by_bytes,
    causal_mask,
    check_attend,
    coded_cache,
    flat,
    queries_of,
    random_cache,
    random_qkv,
)
from tests.pairs import pairs_of
from tests.reference import DTYPES, Guarded, assert_same_on_threads, bits

# (query heads, key heads, head_dim)
HEADS = (
    (4, 2, 24),
    (4, 4, 64),
    (8, 2, 64),
    (8, 1, 80),
    (7, 1, 40),
    (2, 2, 7),
    (6, 3, 128),
    (4, 4, 16),
    (8, 2, 16),
    (2, 1, 256),
    (18, 2, 32),
)


@pytest.mark.parametrize(
    ("make", "dtype", "heads", "rows"),
    # rows, rows of the prefix, lengths
    pairs_of(CACHES, DTYPES, HEADS, ((1, 1, (1, 0)), (3, 3, (300, 0)), (8, 2, (41, 270)))),
)
def test_decode(
    make: MakeCache,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    rows: tuple[int, int, tuple[int, int]],
) -> None:
    n_rows, n_prefix_rows, lengths = rows
    qkv = random_qkv(dtype, n_rows, 1, heads)
    cache = make(dtype, n_rows, n_prefix_rows, heads[1], heads[2], lengths)
    everything = torch.ones(n_rows, 1, sum(lengths), dtype=torch.bool)
    out = check_attend(qkv, cache, Mask("none"), everything, heads)
    assert torch.equal(
        functional.attend(qkv, cache, by_bytes(everything), Scoring(heads[2] ** -0.5), *heads), out
    )

    seen = torch.rand(n_rows, 1, sum(lengths)) < 0.7
    seen[0] = False
    out = check_attend(qkv, cache, by_bytes(seen), seen, heads)
    assert not out[0].any()


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", (0.0, -0.3, 30.0))
@pytest.mark.parametrize("group", (1, 3))
def test_decode_with_any_scale(make: MakeCache, dtype: torch.dtype, scale: float, group: int) -> None:
    heads = (2 * group, 2, 24)
    qkv = random_qkv(dtype, 1, 1, heads)
    cache = make(dtype, 1, 1, 2, 24, (90, 0))
    check_attend(qkv, cache, Mask("none"), torch.ones(1, 1, 90, dtype=torch.bool), heads, Scoring(scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (31, 32, 33, 64, 65, 127, 128, 129, 160))
def test_decode_of_every_width(dtype: torch.dtype, size: int) -> None:
    heads = (3, 1, size)
    cache = random_cache(dtype, 2, 1, 1, size, (70, 3))
    check_attend(
        random_qkv(dtype, 2, 1, heads), cache, Mask("none"), torch.ones(2, 1, 73, dtype=torch.bool), heads
    )


# a few heads and rows have chunks of 64 keys, 128 of them chunks of 256
_SMALL = (random_cache, 1, (8, 4, 32)), (coded_cache, 1, (2, 2, 32)), (coded_cache, 1, (6, 2, 32))
_WIDE = ((random_cache, 4, (128, 64, 32)),)
_WIDER = (coded_cache, 1, (128, 128, 32)), (coded_cache, 1, (384, 128, 32))


@pytest.mark.parametrize(
    ("dtype", "of", "length"),
    [
        *pairs_of(DTYPES, _SMALL, (15, 16, 17, 63, 64, 65)),
        *pairs_of(DTYPES, _WIDE, (255, 256, 257)),
        *pairs_of(DTYPES, _WIDER, (1023, 1024, 1025)),
    ],
)
@pytest.mark.thinned(3)
def test_decode_around_blocks_and_chunks(
    dtype: torch.dtype, of: tuple[MakeCache, int, tuple[int, int, int]], length: int
) -> None:
    make, n_rows, heads = of
    cache = make(dtype, n_rows, n_rows, heads[1], 32, (length, 0))
    everything = torch.ones(n_rows, 1, length, dtype=torch.bool)
    qkv = random_qkv(dtype, n_rows, 1, heads)
    check_attend(qkv, cache, Mask("none"), everything, heads)
    for first in (1, length // 16 * 16, length - 1):  # left padding
        seen = everything.clone()
        seen[0, :, :first] = False
        check_attend(qkv, cache, by_bytes(seen), seen, heads)


def _padded(n_rows: int, n_keys: int, chunk: int) -> Iterator[Tensor]:
    """What rows see whose chunks are hidden: the first ones, one in between, the last one, all, others for each row."""
    everything = torch.ones(n_rows, 1, n_keys, dtype=torch.bool)
    chunks = torch.arange(n_keys) // chunk
    for hidden in (chunks == 0, chunks <= 1, chunks == 1, chunks == chunks[-1], chunks >= 0):
        seen = everything.clone()
        seen[0, :, hidden] = False
        yield seen
    yield everything & ((chunks + torch.arange(n_rows)[:, None]) % 2 == 1)[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_rows", "heads", "lengths", "chunk"),
    # 128 streams and more have one span each, and a key head alone has 128
    [(2, (128, 64, 24), (length, 0), 256) for length in (511, 512, 513, 769)]
    + [(2, (3, 1, 24), (length, 70), 64) for length in (127 * 64, 128 * 64, 128 * 64 + 1, 260 * 64 + 5)]
    + [(128, (1, 1, 24), (3, length), 64) for length in (64, 65, 129)],
)
@pytest.mark.thinned(3)
def test_decode_around_spans(
    dtype: torch.dtype, n_rows: int, heads: tuple[int, int, int], lengths: tuple[int, int], chunk: int
) -> None:
    qkv = random_qkv(dtype, n_rows, 1, heads)
    cache = random_cache(dtype, n_rows, 2 if n_rows == 2 else 1, *heads[1:], lengths)
    check_attend(qkv, cache, Mask("none"), torch.ones(n_rows, 1, sum(lengths), dtype=torch.bool), heads)
    for seen in _padded(n_rows, sum(lengths), chunk):
        out = check_attend(qkv, cache, by_bytes(seen), seen, heads)
        assert not out[~seen.any(-1)].any()


@pytest.mark.parametrize(
    ("dtype", "value", "place", "token"),
    pairs_of(DTYPES, (torch.nan, torch.inf, -torch.inf), ("keys", "values"), (7, 300, 769)),
)
def test_decode_of_a_span_that_is_not_finite(
    dtype: torch.dtype, value: float, place: str, token: int
) -> None:
    """In the first, a middle and the last chunk of a span; whole keys, so that all scores of the chunk are -inf or NaN."""
    heads = (64, 64, 24)
    qkv = random_qkv(dtype, 2, 1, heads).abs()
    cache = random_cache(dtype, 2, 2, *heads[1:], (770, 0))
    first = token // 256 * 256
    stored = torch.from_numpy(cache.prefix).view(dtype)[0 if place == "keys" else 1, 0]
    stored[:, first : first + 256] = value
    seen = torch.ones(2, 1, 770, dtype=torch.bool)
    for shown in (seen, seen & (torch.arange(770) < first + 256), seen & (torch.arange(770) >= first)):
        out = functional.attend(qkv, cache, by_bytes(shown), Scoring(0.2), *heads)
        keys, values = reference.gathered(cache, dtype)
        hidden = ~shown.any(1)[:, None, :, None]
        keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
        theirs = flat(reference.attention(queries_of(qkv, heads), keys, values, shown, Scoring(0.2)))
        assert torch.equal(out.isnan(), theirs.isnan())
        assert torch.equal(out.isinf(), theirs.isinf())


@launch
def _attend_within(
    like, qkv, n_rows, record, prefix_len, suffix_len, prefix_row, table, n_heads, threads, scratch, out
):
    q, out = address_as(qkv, pointer(like)), address_as(out, pointer(like))
    rows = pointer(prefix_row), pointer(table), table.shape[1]
    cache = open_cache(q, pointer(record), prefix_len, suffix_len, *rows, 0)
    q_row = (n_heads + 2 * cache.n_kv_heads) * cache.size
    scoring = scores.Scoring(np.float32(0.1), np.float32(0.0), 0, 0, 0, 0)
    queries = q, q_row, 0, n_rows, 1, n_heads
    target = out, n_heads * cache.size, 0
    attention.attend_rows(cache, *queries, 0, 0, scoring, scratch, threads, *target, False)


@pytest.mark.parametrize("heads", ((32, 8, 64), (12, 12, 64), (16, 1, 128)))
@pytest.mark.parametrize("n_rows", (1, 4, 64))
@pytest.mark.parametrize("suffix_len", (0, 150))
def test_scratch_does_not_grow_with_the_context(
    heads: tuple[int, int, int], n_rows: int, suffix_len: int
) -> None:
    n_heads, n_kv_heads, size = heads
    threads, guard = torch.get_num_threads(), 4096
    n_bytes = scratch_bytes(n_rows, *heads, 2, threads)
    memory = np.full(n_bytes + 2 * guard, 0xA5, np.uint8)
    first = -(-(memory.ctypes.data + guard) // 64) * 64 - memory.ctypes.data
    qkv, out = random_qkv(torch.bfloat16, n_rows, 1, heads), torch.empty(n_rows, n_heads * size)
    for n_prefix_rows in {1, min(n_rows, 4)}:
        prefix = np.zeros((2, n_prefix_rows, n_kv_heads, 100_000 if n_rows < 64 else 20_000, size), np.uint16)
        suffix = np.zeros((2, n_rows, n_kv_heads, suffix_len, size), np.uint16)
        rows = np.arange(n_rows, dtype=np.int32) % n_prefix_rows
        table = np.zeros((n_rows, suffix_len), np.int32)
        for n_keys in (1000, prefix.shape[3]):
            parts = cache_record.record_of(prefix, suffix), n_keys, suffix_len, rows, table
            room = threads, memory.ctypes.data + first, out.data_ptr()
            _attend_within(bits(qkv)[0, 0, :0], qkv.data_ptr(), n_rows, *parts, n_heads, *room)
            assert (memory[:first] == 0xA5).all() and (memory[first + n_bytes :] == 0xA5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", (1, 2, 4, 5, 8, 9))
def test_rows_of_one_prompt(dtype: torch.dtype, n_rows: int) -> None:
    """A row whose query heads fill a tile gets the same bits whether others share its pass over the keys or not."""
    for group in (1, 4):
        heads = (2 * group, 2, 32)
        qkv = random_qkv(dtype, n_rows, 1, heads)
        cache = random_cache(dtype, n_rows, 1, 2, 32, (90, 3))
        everything = torch.ones(n_rows, 1, 93, dtype=torch.bool)
        out = check_attend(qkv, cache, Mask("none"), everything, heads)
        alike, one_differs = everything.clone(), everything.clone()
        alike[:, :, :21] = False
        one_differs[-1, :, :21] = False
        together = check_attend(qkv, cache, by_bytes(alike), alike, heads)
        apart = check_attend(qkv, cache, by_bytes(one_differs), one_differs, heads)
        if group == 4:
            assert torch.equal(apart[:-1], out[:-1])
            assert torch.equal(apart[-1], together[-1])


# rows, rows of the prefix, new tokens, lengths
_PROMPTS = (
    (1, 1, 5, (5, 0)),
    (2, 2, 150, (150, 0)),
    (2, 2, 13, (141, 0)),
    (4, 2, 3, (70, 9)),
    (4, 2, 70, (3, 71)),
)


@pytest.mark.parametrize(("make", "dtype", "heads", "rows"), pairs_of(CACHES, DTYPES, HEADS, _PROMPTS))
def test_prefill(
    make: MakeCache,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    rows: tuple[int, int, int, tuple[int, int]],
) -> None:
    n_rows, n_prefix_rows, n_new, lengths = rows
    qkv = random_qkv(dtype, n_rows, n_new, heads)
    cache = make(dtype, n_rows, n_prefix_rows, heads[1], heads[2], lengths)
    causal = causal_mask(n_rows, n_new, sum(lengths))
    out = check_attend(qkv, cache, Mask("causal"), causal, heads)
    masked = functional.attend(
        qkv, cache._replace(n_new=n_new), by_bytes(causal), Scoring(heads[2] ** -0.5), *heads
    )
    assert torch.equal(masked, out)

    padded = causal.clone()
    padded[0, :, : sum(lengths) // 2] = False  # left padding, and with it queries that see nothing
    holes = causal & (torch.rand(causal.shape) < 0.6)
    for seen in (padded, holes):
        out = check_attend(qkv, cache, by_bytes(seen), seen, heads)
        assert not out[~seen.any(-1)].any()
    check_attend(qkv, cache, Mask("none"), torch.ones_like(causal), heads)


def _check_prefill(dtype: torch.dtype, n_new: int, heads: tuple[int, int, int], cache: Appended) -> None:
    """Causal, the same by bytes, and with holes."""
    n_rows, n_keys = len(cache.prefix_row), cache.prefix_len + cache.suffix_len
    qkv = random_qkv(dtype, n_rows, n_new, heads)
    causal = causal_mask(n_rows, n_new, n_keys)
    out = check_attend(qkv, cache, Mask("causal"), causal, heads)
    masked = functional.attend(
        qkv, cache._replace(n_new=n_new), by_bytes(causal), Scoring(heads[2] ** -0.5), *heads
    )
    assert torch.equal(masked, out)
    holes = causal & (torch.rand(causal.shape) < 0.6)
    check_attend(qkv, cache, by_bytes(holes), holes, heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_new", (15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 145))
def test_prefill_around_the_width_of_a_tile(dtype: torch.dtype, n_new: int) -> None:
    _check_prefill(dtype, n_new, (8, 8, 24), random_cache(dtype, 4, 2, 8, 24, (n_new, 0)))


@pytest.mark.parametrize(
    ("dtype", "n_keys", "spare"),
    pairs_of(DTYPES, (7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129), (0, 8)),
)
def test_prefill_around_the_size_of_a_block(dtype: torch.dtype, n_keys: int, spare: int) -> None:
    for n_suffix in (0, 1, 5):
        cache = random_cache(dtype, 4, 2, 3, 24, (n_keys - n_suffix, n_suffix), spare)
        _check_prefill(dtype, min(n_keys, 29), (12, 3, 24), cache)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (1, 2, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 127, 128, 129, 257))
def test_prefill_of_any_head_dim(dtype: torch.dtype, size: int) -> None:
    _check_prefill(dtype, 21, (6, 2, size), random_cache(dtype, 4, 2, 2, size, (40, 0), 0))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("n_new", (1, 2, 50))
def test_a_score_of_any_size_may_be_the_largest(dtype: torch.dtype, n_new: int) -> None:
    """A key with a score far above the others has all the weight, in the first block or in a later one."""
    heads = (3, 1, 64)
    for power, token in zip(range(3, 36), (7, 160) * 17, strict=False):
        qkv, cache = random_qkv(dtype, 1, n_new, heads), random_cache(dtype, 1, 1, *heads[1:], (200, 0))
        stored = torch.from_numpy(cache.prefix).view(dtype)[:, 0, 0]
        query = queries_of(qkv, heads)[0, 1, -1].float()
        stored[0, token] = (query / query.square().sum() * 10.0**power).to(dtype)
        mask = Mask("none" if n_new == 1 else "causal")
        out = functional.attend(qkv, cache._replace(n_new=n_new), mask, Scoring(0.125), *heads)
        torch.testing.assert_close(out[0, -1, 64:128], stored[1, token], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_new", (2, 5, 50, 333))
def test_bits_of_a_token_do_not_depend_on_the_others(make: MakeCache, dtype: torch.dtype, n_new: int) -> None:
    heads = (6, 3, 64)
    qkv = random_qkv(dtype, 1, 400, heads)
    cache = make(dtype, 1, 1, 3, 64, (500, 0))
    together = functional.attend(qkv, cache._replace(n_new=400), Mask("causal"), Scoring(0.125), *heads)
    last = qkv[:, -n_new:].contiguous()
    alone = functional.attend(last, cache._replace(n_new=n_new), Mask("causal"), Scoring(0.125), *heads)
    assert torch.equal(together[:, -n_new:], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", (0.0, -0.3, 30.0))
def test_prefill_with_any_scale(dtype: torch.dtype, scale: float) -> None:
    heads = (4, 2, 24)
    qkv = random_qkv(dtype, 1, 40, heads)
    cache = random_cache(dtype, 1, 1, 2, 24, (90, 0))
    check_attend(qkv, cache, Mask("causal"), causal_mask(1, 40, 90), heads, Scoring(scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_where_no_key_has_a_weight(dtype: torch.dtype) -> None:
    heads = (1, 1, 24)
    qkv = random_qkv(dtype, 1, 3, heads).abs()
    cache = random_cache(dtype, 1, 1, 1, 24, (5, 0))
    torch.from_numpy(cache.prefix).view(dtype)[0, ..., :5, :] = -torch.inf
    for mask in (Mask("causal"), by_bytes(causal_mask(1, 3, 5))):
        assert functional.attend(qkv, cache._replace(n_new=3), mask, Scoring(0.2), *heads).isnan().all()


@pytest.mark.parametrize(
    ("dtype", "size", "n_new", "value"),
    pairs_of(DTYPES, (24, 64), (1, 9), (torch.nan, torch.inf, -torch.inf)),
)
def test_hidden_keys_and_values_do_not_leak(dtype: torch.dtype, size: int, n_new: int, value: float) -> None:
    heads = (4, 2, size)
    qkv = random_qkv(dtype, 2, n_new, heads)
    cache = random_cache(dtype, 2, 2, 2, size, (40, 31))
    seen = causal_mask(2, n_new, 71)
    seen[:, :, :5] = False
    seen[:, :, 50] = False
    expected = functional.attend(qkv, cache._replace(n_new=n_new), by_bytes(seen), Scoring(0.2), *heads)
    torch.from_numpy(cache.prefix).view(dtype)[:, :, :, :5] = value
    torch.from_numpy(cache.suffix).view(dtype)[:, :, :, 10] = value
    assert torch.equal(
        functional.attend(qkv, cache._replace(n_new=n_new), by_bytes(seen), Scoring(0.2), *heads), expected
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_later_values_do_not_leak_into_earlier_tokens(dtype: torch.dtype) -> None:
    heads = (4, 2, 24)
    qkv = random_qkv(dtype, 1, 70, heads)
    cache = random_cache(dtype, 1, 1, 2, 24, (70, 0))
    expected = functional.attend(qkv, cache._replace(n_new=70), Mask("causal"), Scoring(0.2), *heads)
    torch.from_numpy(cache.prefix).view(dtype)[:, 0, :, 33] = torch.nan
    out = functional.attend(qkv, cache._replace(n_new=70), Mask("causal"), Scoring(0.2), *heads)
    assert torch.equal(out[:, :33], expected[:, :33])
    assert out[:, 33:].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "size", "n_new", "value", "place"),
    pairs_of(DTYPES, (24, 64), (1, 3), (torch.nan, torch.inf, -torch.inf), ("keys", "values")),
)
def test_values_that_are_seen_and_not_finite(
    dtype: torch.dtype, size: int, n_new: int, value: float, place: str
) -> None:
    heads = (4, 2, size)
    qkv = random_qkv(dtype, 2, n_new, heads)
    cache = random_cache(dtype, 2, 2, 2, size, (300, 0))
    torch.from_numpy(cache.prefix).view(dtype)[0 if place == "keys" else 1, 0, 0, 7, 3] = value
    seen = causal_mask(2, n_new, 300)
    out = functional.attend(
        qkv, cache._replace(n_new=n_new), Mask("causal" if n_new > 1 else "none"), Scoring(0.2), *heads
    )
    keys, values = reference.gathered(cache, dtype)
    theirs = flat(reference.attention(queries_of(qkv, heads), keys, values, seen, Scoring(0.2)))
    assert torch.equal(out.isnan(), theirs.isnan())
    assert torch.equal(out.isinf(), theirs.isinf())


@pytest.mark.parametrize("dtype", DTYPES)
def test_beams_over_many_steps_and_growth(dtype: torch.dtype) -> None:
    heads = (4, 2, 24)
    cache = IndirectCache(copies=3)

    def step(n_rows: int, n_new: int) -> None:
        qkv = random_qkv(dtype, n_rows, n_new, heads)
        appended = cache.append(0, n_rows, n_new, 2, 24, dtype)
        functional.rotate_and_store(qkv, None, None, appended, *heads, "none")
        seen = causal_mask(n_rows, n_new, appended.prefix_len + appended.suffix_len)
        check_attend(qkv, appended, functional.prepare_mask(None, n_rows, n_new, seen.shape[2]), seen, heads)
        keys, values = reference.gathered(appended, dtype)
        assert torch.equal(cache.layers[0].keys, keys)
        assert torch.equal(cache.layers[0].values, values)

    step(2, 9)
    for _ in range(50):
        step(6, 1)
        beams = torch.randint(3, (6,)) + torch.tensor([0, 0, 0, 3, 3, 3])
        cache.reorder_cache(beams)
    step(6, 7)
    step(6, 1)


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_rows", "heads", "n_new", "lengths"),
    [(2, (6, 3, 64), *case) for case in ((1, (2000, 40)), (130, (700, 0)), (700, (700, 0)))]
    + [(3, (n_heads, 4, 64), n_new, (2100, 70)) for n_heads in (4, 16) for n_new in (1, 40)],
)
def test_bits_do_not_depend_on_threads(
    make: MakeCache,
    dtype: torch.dtype,
    n_rows: int,
    heads: tuple[int, int, int],
    n_new: int,
    lengths: tuple[int, int],
) -> None:
    qkv = random_qkv(dtype, n_rows, n_new, heads)
    cache = make(dtype, n_rows, 2, *heads[1:], lengths)._replace(n_new=n_new)
    mask = Mask("causal" if n_new > 1 else "none")
    assert_same_on_threads(lambda: functional.attend(qkv, cache, mask, Scoring(0.125), *heads))


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS[:6])
@pytest.mark.parametrize("n_new", (1, 5))
def test_nothing_is_written_outside(
    make: MakeCache, dtype: torch.dtype, heads: tuple[int, int, int], n_new: int
) -> None:
    n_heads, n_kv_heads, size = heads
    qkv = random_qkv(dtype, 2, n_new, heads)
    cache = make(dtype, 2, 2, n_kv_heads, size, (21, 5))
    before = [part.tobytes() for part in (cache.prefix, cache.suffix)]
    record = cache_record.record_of(cache.prefix, cache.suffix, cache.prefix_scales, cache.suffix_scales)
    parts = (record, 21, 5, cache.prefix_row, cache.table, 0)
    out = Guarded(dtype, 2 * n_new, n_heads * size)
    kinds, no_mask = (bits(qkv)[0, 0, :0], cache.prefix.ravel()[:0]), np.zeros((0, 0, 0), np.uint8)
    given, numbers = (*kinds, qkv.data_ptr(), qkv.shape[-1], 2), Scoring(0.2).numbers(n_heads, dtype)
    if n_new == 1:
        attention.attend_decode(*given, *parts, no_mask, *numbers, n_heads, out.array.ctypes.data, False)
    else:
        mask = CAUSAL, 0, no_mask
        attention_prefill.attend_prefill(
            *given, n_new, *parts, *mask, *numbers, n_heads, out.array.ctypes.data
        )
    out.check()
    assert [part.tobytes() for part in (cache.prefix, cache.suffix)] == before
    expected = functional.attend(
        qkv, cache._replace(n_new=n_new), Mask("causal" if n_new > 1 else "none"), Scoring(0.2), *heads
    )
    assert torch.equal(out.tensor.view_as(expected), expected)


@pytest.mark.parametrize("n_new", (1, 5))
@pytest.mark.parametrize("wrong", (-1, 2, 2**30))
def test_rows_that_the_cache_has_not(n_new: int, wrong: int) -> None:
    heads = (4, 2, 24)
    qkv = random_qkv(torch.float32, 2, n_new, heads)
    cache = random_cache(torch.float32, 2, 2, 2, 24, (21, 5))._replace(n_new=n_new)
    for name in ("prefix_row", "table"):
        broken = getattr(cache, name).copy()
        broken.flat[1] = wrong
        with pytest.raises(InvalidInput, match="prefix_row or table"):
            functional.attend(qkv, cache._replace(**{name: broken}), Mask("causal"), Scoring(0.2), *heads)


# ---- masks -------------------------------------------------------------------------------------------------


def test_prepare_mask_recognises_what_needs_no_bytes() -> None:
    assert functional.prepare_mask(None, 2, 1, 9).kind == "none"
    assert functional.prepare_mask(None, 2, 4, 9).kind == "causal"
    assert functional.prepare_mask(torch.ones(2, 1, 1, 9, dtype=torch.bool), 2, 1, 9).kind == "none"
    causal = causal_mask(2, 4, 9)[:, None]
    assert functional.prepare_mask(causal, 2, 4, 9).kind == "causal"
    assert functional.prepare_mask(causal[:1], 2, 4, 9).kind == "causal"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_prepare_mask_reads_additive_masks(dtype: torch.dtype) -> None:
    seen = causal_mask(2, 4, 9)
    seen[1, :, :3] = False
    lowest = torch.finfo(dtype).min
    for hidden in (lowest, -torch.inf):
        additive = torch.zeros(2, 1, 4, 9, dtype=dtype).masked_fill(~seen[:, None], hidden)
        for given in (additive, seen[:, None]):
            mask = functional.prepare_mask(given, 2, 4, 9)
            assert mask.kind == "bytes"
            assert (mask.bytes == seen.numpy()).all()
    # one mask for all rows, and longer than the keys are
    mask = functional.prepare_mask(seen[1:, None], 3, 4, 7)
    assert (mask.bytes == seen[1:, :, :7].expand(3, -1, -1).numpy()).all()


@pytest.mark.parametrize(
    "mask",
    (
        torch.full((1, 1, 4, 9), 0.5),  # a bias
        torch.full((1, 1, 4, 9), torch.nan),
        torch.ones(1, 4, 4, 9, dtype=torch.bool),  # one mask a head
        torch.ones(1, 9, dtype=torch.bool),
        torch.ones(1, 1, 4, 9, dtype=torch.int64),
        "a block mask",
    ),
)
def test_prepare_mask_leaves_other_forms_alone(mask: object) -> None:
    assert functional.prepare_mask(mask, 1, 4, 9).kind == "unsupported"


@pytest.mark.parametrize("shape", ((3, 1, 4, 9), (2, 1, 5, 9), (2, 1, 4, 8)))
def test_prepare_mask_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="attention_mask has shape"):
        functional.prepare_mask(torch.ones(shape, dtype=torch.bool), 2, 4, 9)
