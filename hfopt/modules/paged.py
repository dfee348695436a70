"""Attention over a cache in blocks, as classmethods."""

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.functional.gradients import without_gradients
from hfopt.functional.integers import integers
from hfopt.functional.paged import attend_blocks, check_attention, scales_of, store_in_slots
from hfopt.functional.scalars import flag, integer
from hfopt.functional.sequences import Band, check_longest, cumulative, manner_of


class PagedAttention:
    """Attention over keys and values that lie in blocks of a cache (https://arxiv.org/abs/2309.06180).

    `key_cache` and `value_cache` are [n_blocks, n_kv_heads, block_size, head_size], of the dtype of the queries (float32,
    bfloat16 or float16), or float8_e5m2 or float8_e4m3fn. Token t of sequence b is in block
    `block_tables[b, t // block_size]`, at place `t % block_size` of it; a *slot* is `block * block_size + place`. What is
    behind the length of a sequence in its row of the table is not looked at.

    Of a float8 cache, `k_scale` and `v_scale` are one number each for all keys and all values: what is stored is
    key / k_scale rounded as torch rounds (e4m3 has no infinity, and becomes NaN beyond its largest number), and what is read
    is code * k_scale. `kv_cache_dtype` is "auto" for what the cache is of, or "fp8", "fp8_e5m2" or "fp8_e4m3", which it is
    checked against. Other caches have scales of 1.0.

    Whatever does not fit raises `InvalidInput`, a ValueError, before anything is written.

    >>> import torch
    >>> from hfopt.modules import PagedAttention
    >>> key_cache, value_cache = torch.zeros(2, 3, 2, 16, 64)  # 3 blocks of 16 tokens
    >>> key, value = torch.randn(2, 1, 2, 64)
    >>> PagedAttention.reshape_and_cache(key, value, key_cache, value_cache, torch.tensor([2 * 16]))
    >>> tables, lengths = torch.tensor([[2]]), torch.tensor([1])  # one sequence, whose only token is in block 2
    >>> query, output = torch.randn(2, 1, 4, 64)
    >>> mapping = torch.tensor([0, 0, 1, 1])
    >>> _ = PagedAttention.single_query_cached_kv_attention(
    ...     output, query, key_cache, value_cache, mapping, 0.125, tables, lengths, 16, 1, None
    ... )
    >>> torch.allclose(output[0], value[0].repeat_interleave(2, 0))
    True
    """

    @classmethod
    @without_gradients
    def reshape_and_cache(
        cls,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str = "auto",
        k_scale: float | Tensor = 1.0,
        v_scale: float | Tensor = 1.0,
    ) -> None:
        """Write keys and values [n_tokens, n_kv_heads, head_size] into the slots of the cache that `slot_mapping` [n_tokens]
        names, int32 or int64.

        Tokens of negative slots go nowhere; of several of one slot the last one stays.
        """
        store_in_slots(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale)

    reshape_and_cache_flash = reshape_and_cache

    @classmethod
    @without_gradients
    def single_query_cached_kv_attention(
        cls,
        output: Tensor,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        head_mapping: Tensor,
        scale: float,
        block_tables: Tensor,
        context_lens: Tensor,
        block_size: int,
        max_context_len: int,
        alibi_slopes: Tensor | None,
        window_size: int = -1,
        k_scale: float | Tensor = 1.0,
        v_scale: float | Tensor = 1.0,
        softcap: float = -1.0,
    ) -> Tensor:
        """Write softmax(scores) v of one query for each sequence into `output`, and return it; 0 for an empty sequence.

        The score of key j of n is scale * q . k_j, then softcap * tanh(score / softcap) if softcap > 0, then
        + slope * (j + 1 - n), of ALiBi.

        query, output: [n_sequences, n_heads, head_size]. head_mapping: [n_heads], the head of keys of each query head, each
        one of as many. block_tables: [n_sequences, most blocks of one]; context_lens: [n_sequences], and max_context_len
        at least the longest. alibi_slopes: [n_heads] or [n_sequences, n_heads]. window_size: the last keys that are seen, -1
        for all.
        """
        n_kv_heads, size = check_attention(query, output, key_cache, value_cache)
        if integer("block_size", block_size) != key_cache.shape[2]:
            raise InvalidInput(
                f"block_size is {block_size}: that of key_cache, {key_cache.shape[2]}, is needed"
            )
        if integer("window_size", window_size) != -1 and window_size < 1:
            raise InvalidInput(f"window_size is {window_size}: -1, for no window, or more than 0 is allowed")
        n, n_heads, _ = query.shape
        lengths = integers("context_lens", context_lens, (n,))
        if (lengths < 0).any():
            raise InvalidInput(f"context_lens has {lengths.min()}: 0 or more is needed")
        check_longest("max_context_len", max_context_len, lengths)
        band = Band.of(window_size if window_size < 0 else window_size - 1, -1, is_causal=True)
        manner = manner_of(scale, softcap, alibi_slopes, band, n, n_heads, size)
        order = _order_of(head_mapping, n_heads, n_kv_heads)
        scales = scales_of(key_cache, k_scale, v_scale)
        read = key_cache, value_cache, block_tables, lengths
        if order is None:
            attend_blocks(query, np.arange(n + 1), *read, manner, scales, output)
        else:
            if manner.slopes is not None:
                manner = manner._replace(slopes=manner.slopes[..., order].contiguous())
            ordered = torch.empty_like(output, memory_format=torch.contiguous_format)
            attend_blocks(query[:, order], np.arange(n + 1), *read, manner, scales, ordered)
            output[:, order] = ordered
        return output

    @classmethod
    @without_gradients
    def flash_attn_varlen_func(
        cls,
        output: Tensor,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        scale: float,
        is_cusal: bool,
        block_tables: Tensor,
        alibi_slopes: Tensor | None,
        window_size_left: int = -1,
        window_size_right: int = -1,
        kv_cache_dtype: str = "auto",
        k_scale: float | Tensor = 1.0,
        v_scale: float | Tensor = 1.0,
        softcap: float = -1.0,
    ) -> Tensor:
        """Write softmax(scores) v of the queries of several sequences, packed one behind the other, into `output`, and
        return it.

        As `hfopt.functional.varlen_attention`, which says how scores come about and what a window is, with the keys in a
        cache: the queries of a sequence are its last tokens, which the cache holds too. query, output: [n_tokens, n_heads,
        head_size]; cu_seqlens_q, cu_seqlens_kv: cumulative lengths [n_sequences + 1]; block_tables: [n_sequences, most
        blocks of one]; is_cusal: whether tokens see no later one (named so in ipex.llm).
        """
        _, size = check_attention(query, output, key_cache, value_cache, kv_cache_dtype)
        band = Band.of(window_size_left, window_size_right, flag("is_cusal", is_cusal))
        q_ends = cumulative("cu_seqlens_q", cu_seqlens_q, len(query), max_seqlen_q, "max_seqlen_q")
        k_ends = cumulative("cu_seqlens_kv", cu_seqlens_kv, None, max_seqlen_kv, "max_seqlen_kv")
        n = len(q_ends) - 1
        if len(k_ends) - 1 != n:
            raise InvalidInput(
                f"cu_seqlens_kv has {len(k_ends)} numbers: as many as cu_seqlens_q, {n + 1}, are needed"
            )
        manner = manner_of(scale, softcap, alibi_slopes, band, n, query.shape[1], size)
        scales = scales_of(key_cache, k_scale, v_scale)
        attend_blocks(
            query, q_ends, key_cache, value_cache, block_tables, np.diff(k_ends), manner, scales, output
        )
        return output


def _order_of(head_mapping: Tensor, n_heads: int, n_kv_heads: int) -> np.ndarray | None:
    """Query heads in the order of the heads of keys that they are mapped to; None if they are. Raises `InvalidInput`."""
    mapping = integers("head_mapping", head_mapping, (n_heads,))
    group = n_heads // n_kv_heads
    order = np.argsort(mapping, kind="stable")
    if not np.array_equal(mapping[order], np.arange(n_heads) // group):
        raise InvalidInput(
            f"head_mapping is {mapping.tolist()}: each of {n_kv_heads} heads of keys, {group} times, is needed"
        )
    return None if (order == np.arange(n_heads)).all() else order
