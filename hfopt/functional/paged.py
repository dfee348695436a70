"""Caches of keys and values in blocks (https://arxiv.org/abs/2309.06180): writes to them, and attention over them."""

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels.attention.block_table import store_tokens

from .checks import FLOAT8, address_of, check_floats, check_shape, prepare_threads
from .integers import integers
from .scalars import finite
from .sequences import (
    KeyBlocks,
    Manner,
    attend_sequences,
    check_queries,
    check_writable,
    shares_memory,
    steps_of,
    strided_alike,
)

# names of a kv_cache_dtype, and what a cache of it may hold; "auto" leaves it to the cache
_FLOAT8_NAMES = {
    "fp8": tuple(FLOAT8),
    "fp8_e5m2": (torch.float8_e5m2,),
    "fp8_e4m3": (torch.float8_e4m3fn,),
}


def store_in_slots(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: float | Tensor,
    v_scale: float | Tensor,
) -> None:
    """`modules.PagedAttention.reshape_and_cache`."""
    check_floats("key", key)
    if key.ndim != 3:
        raise InvalidInput(f"key has shape {tuple(key.shape)}: [n_tokens, n_kv_heads, head_size] is needed")
    check_floats("value", value, key.dtype)
    check_shape("value", value, tuple(key.shape))
    n_tokens, n_kv_heads, size = key.shape
    check_cache(key_cache, value_cache, n_kv_heads, size, key.dtype, kv_cache_dtype)
    scales = scales_of(key_cache, k_scale, v_scale)
    n_blocks, _, block_size, _ = key_cache.shape
    slots = integers("slot_mapping", slot_mapping, (n_tokens,))
    if (slots >= n_blocks * block_size).any():
        raise InvalidInput(
            f"slot_mapping has {slots.max()}: less than {n_blocks} blocks of {block_size} is allowed"
        )
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    for name, cache in caches.items():
        check_writable(name, cache)
    if not key.numel():
        return
    stored = []
    for name, part, scale in (("key", key, scales[0]), ("value", value, scales[1])):
        address_of(name, part)
        if key_cache.dtype is not part.dtype:
            part = (part.float() / scale).to(key_cache.dtype)
        is_own = (size == 1 or part.stride(2) == 1) and not any(
            shares_memory(part, each) for each in caches.values()
        )
        stored.append(part if is_own else part.clone(memory_format=torch.contiguous_format))
    # channels of a head that are not neighbours are written to a copy
    targets = [
        cache if size == 1 or cache.stride(3) == 1 else cache.contiguous() for cache in caches.values()
    ]
    item = key_cache.element_size()
    source = [(part.data_ptr(), *(item * step for step in part.stride()[:2])) for part in stored]
    target = [(cache.data_ptr(), *(item * cache.stride(place) for place in (0, 1, 2))) for cache in targets]
    prepare_threads()
    sizes = n_kv_heads, block_size, size * item
    store_tokens(slots, *sizes, np.array(source, np.int64), np.array(target, np.int64))
    for cache, written in zip(caches.values(), targets, strict=True):
        if written is not cache:
            cache.copy_(written)


def attend_blocks(
    query: Tensor,
    q_ends: np.ndarray,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lengths: np.ndarray,
    manner: Manner,
    scales: tuple[float, float],
    output: Tensor,
) -> None:
    """`attend_sequences` over a cache; lengths int64, of keys. Raises `InvalidInput`."""
    blocks = integers("block_tables", block_tables, (len(lengths), None))
    n_blocks, n_kv_heads, block_size, size = key_cache.shape
    most = int(lengths.max(initial=0))
    if most > blocks.shape[1] * block_size:
        given = f"{blocks.shape[1]} blocks of {block_size} a sequence"
        raise InvalidInput(f"block_tables has room for {given}: its longest one has {most} tokens")
    used = blocks[np.arange(blocks.shape[1]) * block_size < lengths[:, None]]
    wrong = used[(used < 0) | (used >= n_blocks)]
    if wrong.size:
        raise InvalidInput(
            f"block_tables names block {wrong[0]} for a token: {n_blocks} blocks, from 0 on, are there"
        )
    if not query.numel():
        return
    keys, values = strided_alike(key_cache, value_cache)
    block, head, token, _ = steps_of(keys)
    sizes = n_blocks, block_size, block // size, token // size, head, n_kv_heads
    stored = KeyBlocks(keys, values, blocks, lengths, *sizes)
    k_scale, v_scale = scales
    attend_sequences(query, q_ends, stored, manner._replace(scale=manner.scale * k_scale), output)
    if v_scale != 1.0:
        output[int(q_ends[0]) : int(q_ends[-1])] *= v_scale


# ---- what is asked of a cache ----------------------------------------------------------------------------------------


def check_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    n_kv_heads: int | None,
    size: int,
    dtype: torch.dtype,
    kv_cache_dtype: str = "auto",
) -> None:
    """Raises `InvalidInput` unless both are [n_blocks, n_kv_heads, block_size, size] of this dtype or of float8, as their
    name says; n_kv_heads: None for any number."""
    if kv_cache_dtype != "auto" and kv_cache_dtype not in _FLOAT8_NAMES:
        names = ", ".join(map(repr, ("auto", *_FLOAT8_NAMES)))
        raise InvalidInput(f"kv_cache_dtype is {kv_cache_dtype!r}: {names} are allowed")
    allowed = _FLOAT8_NAMES.get(kv_cache_dtype, (dtype, *FLOAT8))
    if isinstance(key_cache, Tensor) and key_cache.dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise InvalidInput(
            f"key_cache has dtype {key_cache.dtype}: {names} is needed for kv_cache_dtype {kv_cache_dtype!r}"
        )
    check_floats("key_cache", key_cache, getattr(key_cache, "dtype", dtype))
    check_floats("value_cache", value_cache, key_cache.dtype)
    shape = tuple(key_cache.shape)
    if key_cache.ndim != 4 or shape[3] != size or shape[2] < 1 or n_kv_heads not in (None, shape[1]):
        heads = "n_kv_heads" if n_kv_heads is None else n_kv_heads
        raise InvalidInput(f"key_cache has shape {shape}: [n_blocks, {heads}, block_size, {size}] is needed")
    check_shape("value_cache", value_cache, shape)
    address_of("key_cache", key_cache)
    address_of("value_cache", value_cache)


def check_attention(
    query: Tensor, output: Tensor, key_cache: Tensor, value_cache: Tensor, kv_cache_dtype: str = "auto"
) -> tuple[int, int]:
    """Number of heads of keys, and channels of one; raises `InvalidInput` unless all fit."""
    check_floats("query", query)
    size = query.shape[-1] if query.ndim else 0
    check_cache(key_cache, value_cache, None, size, query.dtype, kv_cache_dtype)
    check_queries(query, output, key_cache.shape[1], size, "output")
    return key_cache.shape[1], size


def scales_of(cache: Tensor, k_scale: float | Tensor, v_scale: float | Tensor) -> tuple[float, float]:
    """Those of keys and values as numbers; raises `InvalidInput` unless they are positive, and 1 for a cache of other
    dtypes than float8."""
    found = []
    for name, given in (("k_scale", k_scale), ("v_scale", v_scale)):
        scale = finite(name, given)
        if scale <= 0:
            raise InvalidInput(f"{name} is {scale}: a number above 0 is needed")
        if scale != 1.0 and cache.dtype not in FLOAT8:
            raise InvalidInput(f"{name} is {scale}: 1.0 is needed for a cache of {cache.dtype}")
        found.append(scale)
    return found[0], found[1]
