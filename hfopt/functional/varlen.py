"""Attention of sequences of any lengths, packed one behind the other."""

import numpy as np
from torch import Tensor

from hfopt.errors import InvalidInput

from .checks import address_of, check_floats, check_shape
from .gradients import without_gradients
from .scalars import finite, flag
from .sequences import (
    Band,
    KeyBlocks,
    attend_sequences,
    check_queries,
    cumulative,
    manner_of,
    steps_of,
    strided_alike,
)


@without_gradients
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    seqlen_q: Tensor,
    seqlen_k: Tensor,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    pdropout: float,
    softmax_scale: float | None,
    zero_tensors: bool,
    is_causal: bool,
    return_softmax: bool,
    gen_: None,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = -1.0,
) -> Tensor:
    """Write softmax(scores) v of each of several sequences, packed one behind the other, into `out`, and return it.

    The score of key j for query i of a sequence, with p = i + len_k - len_q (the last query stands at the last key):

        softmax_scale * q_i . k_j                  then softcap * tanh(score / softcap), if softcap > 0
                                                   then - slope * |p - j|, of ALiBi

    A query sees the keys with p - window_size_left <= j <= p + window_size_right, where -1 stands for no limit and 0 for p
    itself; `is_causal` is a right window of 0. One that sees nothing, as the first ones do where there are more queries than
    keys, gets 0.

    query, out: [n_q, n_heads, head_size]; key, value: [n_k, n_kv_heads, head_size], where n_kv_heads divides n_heads; all
    float32, bfloat16 or float16. seqlen_q, seqlen_k: int32 or int64 [n + 1], cumulative lengths from 0 on, and max_seqlen_q,
    max_seqlen_k at least the longest; sequences may be empty, and rows behind the last one are left alone. alibi_slopes:
    [n_heads] or [n, n_heads]. softmax_scale: None for 1 / sqrt(head_size). softcap: not positive for none. Strided tensors
    are accepted, and an `out` that is not expanded. There is nothing but pdropout 0, zero_tensors False, return_softmax
    False and gen_ None. Raises `InvalidInput`, a ValueError, before anything is written.

    As `flash_attn_varlen_func` of https://github.com/Dao-AILab/flash-attention, https://arxiv.org/abs/2205.14135.

    >>> import torch
    >>> from hfopt.functional import varlen_attention
    >>> q, k, v = torch.randn(3, 5, 4, 64)  # 5 tokens of 4 heads: sequences of 2 and 3
    >>> ends = torch.tensor([0, 2, 5])
    >>> out = torch.empty_like(q)
    >>> _ = varlen_attention(q, k, v, out, ends, ends, None, 3, 3, 0.0, 0.125, False, True, False, None)
    >>> torch.allclose(out[0], v[0])  # a first token sees itself
    True
    """
    if finite("pdropout", pdropout) != 0:
        raise InvalidInput(f"pdropout is {pdropout}: 0 is needed")
    for name, given in (("zero_tensors", zero_tensors), ("return_softmax", return_softmax)):
        if flag(name, given):
            raise InvalidInput(f"{name} is {given}: False is needed")
    if gen_ is not None:
        raise InvalidInput(f"gen_ is a {type(gen_).__name__}: None is needed")
    check_floats("key", key)
    if key.ndim != 3:
        raise InvalidInput(f"key has shape {tuple(key.shape)}: [n_tokens, n_kv_heads, head_size] is needed")
    n_k, n_kv_heads, size = key.shape
    check_queries(query, out, n_kv_heads, size, "out")
    check_floats("key", key, query.dtype)
    check_floats("value", value, query.dtype)
    check_shape("value", value, tuple(key.shape))
    address_of("key", key)
    address_of("value", value)
    band = Band.of(window_size_left, window_size_right, flag("is_causal", is_causal))
    q_ends = cumulative("seqlen_q", seqlen_q, len(query), max_seqlen_q, "max_seqlen_q")
    k_ends = cumulative("seqlen_k", seqlen_k, n_k, max_seqlen_k, "max_seqlen_k")
    n = len(q_ends) - 1
    if len(k_ends) - 1 != n:
        raise InvalidInput(f"seqlen_k has {len(k_ends)} numbers: as many as seqlen_q, {n + 1}, are needed")
    manner = manner_of(softmax_scale, softcap, alibi_slopes, band, n, query.shape[1], size)
    if not n or not query.numel():
        return out
    key, value = strided_alike(key, value)
    token, head, _ = steps_of(key)
    lengths = np.diff(k_ends)
    # each sequence is one block, which begins with its first token
    sizes = max(n_k, 1), int(max(lengths.max(), 1)), token // size, token // size, head
    keys = KeyBlocks(key, value, np.ascontiguousarray(k_ends[:-1, None]), lengths, *sizes, n_kv_heads)
    attend_sequences(query, q_ends, keys, manner, out)
    return out
