"""The cases of `hfopt bench --kernels` that attend."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional as F
from transformers import MistralConfig

from hfopt.cache import Appended, IndirectCache
from hfopt.functional import Scoring, attend, indirect_access_kv_cache_attention, prepare_mask
from hfopt.words import DTYPES, dtype_name

from .kernel_case import (
    PEAK,
    STREAM,
    Call,
    Case,
    Sizes,
    Target,
    each,
    peak,
    random,
    rounds_up,
    stream,
)

_GENERATED = 16  # tokens that beams have of their own
_WINDOWS = 16  # in the context of layers that have one

Heads = tuple[int, int, int]  # of queries, of keys and values, channels of one


def filled(dtype: torch.dtype, n_tokens: int, n_kv_heads: int, head_dim: int) -> Appended:
    """A new layer of one row after `n_tokens` random keys and values were written to it."""
    appended = IndirectCache().append(0, 1, n_tokens, n_kv_heads, head_dim, dtype)
    _fill(appended, dtype)
    return appended


def _fill(appended: Appended, dtype: torch.dtype) -> None:
    prefix = torch.from_numpy(appended.prefix).view(dtype)
    prefix.copy_(random(dtype, *prefix.shape))


def _beams(dtype: torch.dtype, n_beams: int, n_prompt: int, n_kv_heads: int, head_dim: int) -> Appended:
    """A layer whose rows share a prompt and continue each other's tokens."""
    cache = IndirectCache(copies=n_beams)
    appended = cache.append(0, 1, n_prompt, n_kv_heads, head_dim, dtype)
    _fill(appended, dtype)
    cache.fork()
    for _ in range(_GENERATED):
        appended = cache.append(0, n_beams, 1, n_kv_heads, head_dim, dtype)
        appended.suffix[:] = 0
        if n_beams > 1:
            cache.reorder_cache(torch.arange(n_beams).flip(0))
    return appended


def _step(layers: list[Appended], dtype: torch.dtype, heads: Heads) -> Call:
    """A decode step over each of the layers."""
    n_heads, n_kv_heads, head_dim = heads
    n_rows, n_prompt = len(layers[0].prefix_row), layers[0].prefix_len
    qkv = random(dtype, n_rows, 1, (n_heads + 2 * n_kv_heads) * head_dim)
    mask = prepare_mask(None, n_rows, 1, n_prompt + layers[0].suffix_len)
    run = each(lambda layer: attend(qkv, layer, mask, Scoring(head_dim**-0.5), *heads), layers)
    n_bytes = 2 * n_prompt * n_kv_heads * head_dim * dtype.itemsize
    return Call(run, len(layers), n_bytes, n_operations=4 * n_rows * n_heads * head_dim * n_prompt)


def _stream(layers: list[Appended]) -> dict[str, Call]:
    return stream([torch.from_numpy(layer.prefix) for layer in layers])


def _n_layers(sizes: Sizes, dtype: torch.dtype, n_keys: int, heads: Heads) -> int:
    """So many that keys and values come from memory."""
    return rounds_up(sizes.streamed // 2, 2 * n_keys * heads[1] * heads[2] * dtype.itemsize)


def _decode(sizes: Sizes, dtype: torch.dtype, heads: Heads) -> dict[str, Call]:
    layers = [
        filled(dtype, sizes.keys, *heads[1:])._replace(n_new=1)
        for _ in range(_n_layers(sizes, dtype, sizes.keys, heads))
    ]
    return _stream(layers) | {"hfopt": _step(layers, dtype, heads)}


def _shared(sizes: Sizes, dtype: torch.dtype, heads: Heads) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for name, n_beams in (("1 beam", 1), ("4 beams", 4)):
        layers = [
            _beams(dtype, n_beams, sizes.shared_keys, *heads[1:])
            for _ in range(_n_layers(sizes, dtype, sizes.shared_keys, heads))
        ]
        calls[name] = _step(layers, dtype, heads)
    return _stream(layers) | calls | peak(dtype)


def _window(sizes: Sizes, dtype: torch.dtype, heads: Heads) -> dict[str, Call]:
    """A token more in layers of a window behind a long text, and in layers without one behind a text as long as the window:
    with room for its keys and values, which is what leaving others behind costs.
    """
    window, head_dim = sizes.keys // _WINDOWS, heads[2]
    config = MistralConfig(num_hidden_layers=1, sliding_window=window)
    qkv = random(dtype, 1, 1, (heads[0] + 2 * heads[1]) * head_dim)
    mask, scoring = prepare_mask(None, 1, 1, window), Scoring(head_dim**-0.5)

    def step(cache: IndirectCache) -> None:
        if not cache.layers[0].is_sliding:
            cache.crop(-1)
        attend(qkv, cache.append(0, 1, 1, *heads[1:], dtype), mask, scoring, *heads)

    calls: dict[str, Call] = {}
    n_layers = _n_layers(sizes, dtype, window, heads)
    for name, n_tokens, max_length in (("short", window, window), ("window", sizes.keys, None)):
        caches = [IndirectCache(config, max_length=max_length) for _ in range(n_layers)]
        for cache in caches:
            _fill(cache.append(0, 1, n_tokens, *heads[1:], dtype), dtype)
        if not calls:
            calls = stream([cache.layers[0].prefix for cache in caches])
        calls[name] = Call(each(step, caches), n_layers, 2 * window * heads[1] * head_dim * dtype.itemsize)
    return calls


def _prefill(dtype: torch.dtype, heads: Heads, n_tokens: int) -> dict[str, Call]:
    n_heads, n_kv_heads, head_dim = heads
    layer = filled(dtype, n_tokens, n_kv_heads, head_dim)
    qkv = random(dtype, 1, n_tokens, (n_heads + 2 * n_kv_heads) * head_dim)
    mask = prepare_mask(None, 1, n_tokens, n_tokens)
    q = qkv[:, :, : n_heads * head_dim].view(1, n_tokens, n_heads, head_dim).transpose(1, 2)
    k, v = torch.from_numpy(layer.prefix).view(dtype)[:, :, :, :n_tokens]
    group = n_heads // n_kv_heads
    runs = {
        # as transformers calls it; keys repeated beforehand are no faster here
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1),
        "hfopt": lambda: attend(qkv, layer, mask, Scoring(head_dim**-0.5), *heads),
    }
    operations = 2 * n_heads * head_dim * n_tokens * (n_tokens + 1)
    return {
        name: Call(run, n_operations=operations, result_bytes=q.nbytes) for name, run in runs.items()
    } | peak(dtype)


def _reordered(dtype: torch.dtype, heads: Heads, n_prompt: int, biased: bool) -> dict[str, Call]:
    """A step of 4 beams that go on with each other: through a table of rows, and over caches that are copied."""
    n_heads, n_kv_heads, head_dim = heads
    rows, scale = torch.tensor([1, 0, 3, 3]), head_dim**0.5
    dummy = torch.zeros(1, 1, 1, 1)
    past = torch.zeros(1, 0, 0, 1), dummy, dummy, torch.zeros(1, len(rows), dtype=torch.long)
    x = random(dtype, 1, n_prompt, n_heads + 2 * n_kv_heads, head_dim)
    q, k, v = x.split((n_heads, n_kv_heads, n_kv_heads), 2)
    _, _, past = indirect_access_kv_cache_attention(q, k, v, scale, past)
    keys, values = (each.transpose(1, 2).repeat(len(rows), 1, 1, 1) for each in (k, v))
    x = torch.randn(len(rows), 1, n_heads + 2 * n_kv_heads, head_dim).to(dtype)
    q, k, v = x.split((n_heads, n_kv_heads, n_kv_heads), 2)
    bias = torch.randn(1, n_heads, 1, n_prompt + _GENERATED + 1).to(dtype) if biased else None
    for _ in range(_GENERATED):
        past[3][past[0].size(-2) - 1] = rows
        _, _, past = indirect_access_kv_cache_attention(q, k, v, scale, past)
        new_keys, new_values = (each.transpose(1, 2) for each in (k, v))
        keys = torch.cat((keys.index_select(0, rows), new_keys), 2)
        values = torch.cat((values.index_select(0, rows), new_values), 2)
    past[3][past[0].size(-2) - 1] = rows

    def theirs() -> torch.Tensor:
        # as `DynamicCache` and transformers' sdpa_attention_forward
        all_keys, all_values = (
            torch.cat((stored.index_select(0, rows), new.transpose(1, 2)), 2)
            for stored, new in ((keys, k), (values, v))
        )
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), all_keys, all_values, attn_mask=bias, enable_gqa=n_heads > n_kv_heads
        )

    def ours() -> torch.Tensor:
        # the token is stored in the same place again
        out, _, _ = indirect_access_kv_cache_attention(q, k, v, scale, past, attention_mask=bias)
        return out.transpose(1, 2).flatten(2)

    operations = 4 * len(rows) * n_heads * head_dim * keys.shape[2]
    runs = {"torch": theirs, "hfopt": ours}
    return {name: Call(run, n_operations=operations) for name, run in runs.items()} | peak(dtype)


def _scorings(dtype: torch.dtype, heads: Heads, n_keys: int) -> dict[str, Scoring]:
    """Plain scores and what else they may go through; the window is an eighth of the keys."""
    n_heads, scale = heads[0], heads[2] ** -0.5
    return {
        "plain": Scoring(scale),
        "softcap": Scoring(scale, 50.0),
        "slopes": Scoring(scale, slopes=2.0 ** (-8 * torch.arange(1, n_heads + 1) / n_heads)),
        "sinks": Scoring(scale, sinks=torch.zeros(n_heads, dtype=dtype)),
        "window": Scoring(scale, window=n_keys // 8),
    }


def _scored(dtype: torch.dtype, heads: Heads, n_keys: int, n_new: int) -> dict[str, Call]:
    """One layer, whose keys and values stay in the caches if they can, scored in each way."""
    layer = filled(dtype, n_keys, *heads[1:])._replace(n_new=n_new)
    qkv = random(dtype, 1, n_new, (heads[0] + 2 * heads[1]) * heads[2])
    mask = prepare_mask(None, 1, n_new, n_keys)
    calls: dict[str, Call] = {}
    for name, scoring in _scorings(dtype, heads, n_keys).items():
        n_seen = sum(min(scoring.window or n_keys, 1 + place) for place in range(n_keys - n_new, n_keys))
        run = partial(attend, qkv, layer, mask, scoring, *heads)
        calls[name] = Call(run, n_operations=4 * heads[0] * heads[2] * n_seen)
    return calls | peak(dtype)


_SCORED = (
    ("softcap", 1.1),
    ("slopes", 1.1),
    ("sinks", 1.1),
    ("window", 0.5),
)  # at most so many times as long


def attention_cases(sizes: Sizes) -> Iterator[Case]:
    """Steps over a long context and over a prompt that beams share, bound by memory; prompts, bound by arithmetic."""
    limits = STREAM + PEAK
    for dtype in DTYPES:
        for heads in sizes.heads:
            text = f"{dtype_name(dtype)} {heads[0]}/{heads[1]}×{heads[2]}"
            yield Case(
                f"{text}, {sizes.keys} keys",
                partial(_decode, sizes, dtype, heads),
                (Target("decode attention", "hfopt", "share", 0.85, limits=STREAM),),
            )
            if heads == sizes.heads[0]:
                yield Case(
                    f"{text}, {sizes.shared_keys} shared keys",
                    partial(_shared, sizes, dtype, heads),
                    (Target("decode attention, 4 beams", "4 beams", "slower", 1.25, "1 beam", limits),),
                )
                for title, biased in (("beams through a table", False), ("beams, biases of heads", True)):
                    yield Case(
                        f"{text}, {sizes.shared_keys} shared keys",
                        partial(_reordered, dtype, heads, sizes.shared_keys, biased),
                        (Target(title, "hfopt", "faster", 1.0, "torch", PEAK),),
                    )
                yield Case(
                    f"{text}, window of {sizes.keys // _WINDOWS} of {sizes.keys} keys",
                    partial(_window, sizes, dtype, heads),
                    (Target("decode attention, window", "window", "slower", 1.05, "short", STREAM),),
                )
            for n_tokens in sizes.prompts if heads == sizes.heads[0] else sizes.prompts[:1]:
                yield Case(
                    f"{text}, {n_tokens} tokens",
                    partial(_prefill, dtype, heads, n_tokens),
                    (Target("prefill attention, causal", "hfopt", "faster", 1.2, "SDPA", PEAK),),
                )
        heads = sizes.heads[-1]
        text = f"{dtype_name(dtype)} {heads[0]}/{heads[1]}×{heads[2]}"
        for title, n_keys, n_new in (
            ("decode", sizes.keys, 1),
            ("prefill", sizes.prompts[0], sizes.prompts[0]),
        ):
            yield Case(
                f"{text}, {n_keys} keys",
                partial(_scored, dtype, heads, n_keys, n_new),
                tuple(
                    Target(f"{title} attention, {name}", name, "slower", wanted, "plain", PEAK)
                    for name, wanted in _SCORED
                ),
            )
