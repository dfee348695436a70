"""The cases of `hfopt bench --kernels` of packed sequences, and of caches in blocks."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hfopt.functional import varlen_attention
from hfopt.modules import PagedAttention
from hfopt.words import DTYPES, dtype_name

from .kernel_case import PEAK, STREAM, Call, Case, Sizes, Target, each, peak, random, rounds_up, stream

_BLOCK = 16  # tokens
_ROWS = 4  # sequences that decode together

Heads = tuple[int, int, int]  # of queries, of keys and values, channels of one


class _Cache(NamedTuple):
    """A cache of sequences of one length, whose blocks are in any order."""

    key_cache: Tensor
    value_cache: Tensor
    tables: Tensor
    n_tokens: int  # of a sequence


def _cache(
    dtype: torch.dtype, n_rows: int, n_tokens: int, heads: Heads, held: torch.dtype | None = None
) -> _Cache:
    n_blocks = rounds_up(n_tokens, _BLOCK)
    shape = n_rows * n_blocks, heads[1], _BLOCK, heads[2]
    key_cache, value_cache = (random(dtype, *shape).to(held or dtype) for _ in range(2))
    tables = torch.randperm(shape[0], dtype=torch.int32).view(n_rows, n_blocks)
    return _Cache(key_cache, value_cache, tables, n_tokens)


def _gathered(cache: _Cache, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [n_rows, n_kv_heads, n_tokens, head_dim] in order."""
    key, value = (
        part[cache.tables.long()].transpose(1, 2).flatten(2, 3)[:, :, : cache.n_tokens].to(dtype)
        for part in (cache.key_cache, cache.value_cache)
    )
    return key, value


def _decode(
    sizes: Sizes, dtype: torch.dtype, heads: Heads, held: torch.dtype | None = None
) -> dict[str, Call]:
    n_heads, n_kv_heads, size = heads
    one = _ROWS * 2 * sizes.keys * n_kv_heads * size * (held or dtype).itemsize
    layers = [
        _cache(dtype, _ROWS, sizes.keys, heads, held) for _ in range(rounds_up(sizes.streamed // 2, one))
    ]
    query = random(dtype, _ROWS, n_heads, size)
    out, lengths = torch.empty_like(query), torch.full((_ROWS,), sizes.keys)
    mapping = torch.arange(n_heads) // (n_heads // n_kv_heads)

    def ours(layer: _Cache) -> Tensor:
        return PagedAttention.single_query_cached_kv_attention(
            out, query, *layer[:2], mapping, size**-0.5, layer.tables, lengths, _BLOCK, sizes.keys, None
        )

    def torchs(layer: _Cache) -> Tensor:
        key, value = _gathered(layer, dtype)
        return F.scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True)[:, :, 0]

    # torch reads all of it three times or more: one layer tells enough
    calls = stream([part for layer in layers for part in layer[:2]]) if held is None else {}
    calls["hfopt"] = Call(each(ours, layers), len(layers), one, 4 * _ROWS * n_heads * size * sizes.keys)
    return calls | {"torch": Call(each(torchs, layers[:1]), n_bytes=one)}


def _padded(parts: tuple[Tensor, Tensor, Tensor], lengths: list[int], out: Tensor) -> Tensor:
    """Causal attention as ipex.llm has it: sequences padded to the longest, heads of keys repeated."""
    n, most = len(lengths), max(lengths)
    seen = torch.arange(most) < torch.tensor(lengths)[:, None]
    group = parts[0].shape[1] // parts[1].shape[1]
    padded = []
    for part, repeats in zip(parts, (1, group, group), strict=True):
        room = part.new_zeros(n, most, *part.shape[1:])
        room[seen] = part
        padded.append(room.repeat_interleave(repeats, 2).transpose(1, 2))
    query, key, value = padded
    return out.copy_(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)[seen])


def _prompts(dtype: torch.dtype, heads: Heads, longest: int) -> dict[str, Call]:
    """Prompts of four lengths, packed; the same in a cache in blocks."""
    n_heads, n_kv_heads, size = heads
    lengths = [longest, longest // 2, longest // 4, longest // 4]
    total = sum(lengths)
    query = random(dtype, total, n_heads, size)
    key, value = (random(dtype, total, n_kv_heads, size) for _ in range(2))
    (out, other), ends = (torch.empty_like(query) for _ in range(2)), torch.tensor([0, *accumulate(lengths)])
    cache = _cache(dtype, len(lengths), longest, heads)
    fixed: tuple[float, bool, bool, bool, None] = size**-0.5, False, True, False, None

    def packed() -> Tensor:
        return varlen_attention(query, key, value, out, ends, ends, None, longest, longest, 0.0, *fixed)

    def paged() -> Tensor:
        return PagedAttention.flash_attn_varlen_func(
            out, query, *cache[:2], ends, ends, longest, longest, size**-0.5, True, cache.tables, None
        )

    def paged_by_torch() -> Tensor:
        parts = (part.transpose(1, 2) for part in _gathered(cache, dtype))
        k, v = (torch.cat([row[:n] for row, n in zip(part, lengths, strict=True)]) for part in parts)
        return _padded((query, k, v), lengths, other)

    runs: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: _padded((query, key, value), lengths, other),
        "hfopt": packed,
        "torch, paged": paged_by_torch,
        "hfopt, paged": paged,
    }
    operations = sum(2 * n_heads * size * n * (n + 1) for n in lengths)
    return {name: Call(run, n_operations=operations) for name, run in runs.items()} | peak(dtype)


def _store(dtype: torch.dtype, heads: Heads, n_tokens: int) -> dict[str, Call]:
    _, n_kv_heads, size = heads
    key_cache, value_cache, *_ = _cache(dtype, 1, n_tokens, heads)
    caches = {"torch": (key_cache, value_cache), "hfopt": (key_cache.clone(), value_cache.clone())}
    key, value = (random(dtype, n_tokens, n_kv_heads, size) for _ in range(2))
    slots = torch.randperm(n_tokens)

    def replaced() -> Tensor:
        block, place = slots // _BLOCK, slots % _BLOCK
        for part, held in zip((key, value), caches["torch"], strict=True):
            held[block, :, place] = part
        return caches["torch"][1].flatten(0, 1)

    def ours() -> Tensor:
        PagedAttention.reshape_and_cache(key, value, *caches["hfopt"], slots)
        return caches["hfopt"][1].flatten(0, 1)

    n_bytes = 2 * (key.nbytes + value.nbytes)
    return {"torch": Call(replaced, n_bytes=n_bytes), "hfopt": Call(ours, n_bytes=n_bytes)}


def sequence_cases(sizes: Sizes) -> Iterator[Case]:
    """Steps over caches in blocks, bound by memory; packed prompts, bound by arithmetic; what is written to blocks."""
    for dtype in DTYPES:
        for heads in sizes.heads:
            text = f"{dtype_name(dtype)} {heads[0]}/{heads[1]}×{heads[2]}"
            yield Case(
                f"{text}, {_ROWS} rows of {sizes.keys} keys",
                partial(_decode, sizes, dtype, heads),
                (
                    Target("paged attention, decode", "hfopt", "share", 0.85, limits=STREAM),
                    Target("paged attention, decode", "hfopt", "faster", 1.0, "torch", STREAM),
                ),
            )
        heads = sizes.heads[0]
        text = f"{dtype_name(dtype)} {heads[0]}/{heads[1]}×{heads[2]}"
        longest = sizes.prompts[0]
        yield Case(
            f"{text}, 4 prompts up to {longest} tokens",
            partial(_prompts, dtype, heads, longest),
            (
                Target("varlen attention, causal", "hfopt", "faster", 1.0, "torch", PEAK),
                Target("paged attention, causal", "hfopt, paged", "faster", 1.0, "torch, paged", PEAK),
            ),
        )
        yield Case(
            f"{text}, {sizes.norm_rows} tokens",
            partial(_store, dtype, heads, sizes.norm_rows),
            (Target("reshape_and_cache", "hfopt", "faster", 1.0, "torch", ("torch",)),),
        )
    heads = sizes.heads[0]
    for held in (torch.float8_e5m2, torch.float8_e4m3fn):
        yield Case(
            f"{dtype_name(held)} {heads[0]}/{heads[1]}×{heads[2]}, {_ROWS} rows of {sizes.keys} keys",
            partial(_decode, sizes, torch.bfloat16, heads, held),
            (Target("paged attention, decode", "hfopt", "faster", 1.0, "torch", ("torch",)),),
        )
