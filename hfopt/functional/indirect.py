"""Attention over a cache that beams share and that is never moved, in the form that users of ipex.llm know."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hfopt.cache import Appended
from hfopt.cache.storage import Layout, bits
from hfopt.errors import InvalidInput

from .attention import Mask, attend, prepare_mask
from .beam_past import (
    LayerPast,
    appended_to,
    check_beam_idx,
    check_floats_4d,
    check_text_max_length,
    first_past,
    gathered,
    joined,
    opened,
    reading_of,
)
from .checks import address_of, check_array, check_shape
from .gradients import without_gradients
from .scalars import finite, flag, integer
from .scoring import Scoring

_CROSS = -1  # as seq_info
_HIDDEN = -5e8  # in a mask of float32 or bfloat16: no score makes up for it (Falcon hides by -1e9)


@without_gradients
def indirect_access_kv_cache_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    scale_attn: float | Tensor,
    layer_past: Sequence[Tensor] | None = None,
    head_mask: None = None,
    attention_mask: Tensor | None = None,
    alibi: Tensor | None = None,
    add_casual_mask: bool = True,
    seq_info: int | Tensor | None = None,
    text_max_length: int = 0,
) -> tuple[Tensor, None, LayerPast]:
    """Store new keys and values, and compute softmax(query key^T / scale_attn + mask) value over all that each row has.

    Rows are the beams of some prompts. A prompt is stored once. A beam that goes on with what another one had is no copy: a
    table says where each row finds its tokens (https://arxiv.org/abs/2401.05391).

    Args:
        query: [n_rows, n_new, n_heads, head_dim], float32, bfloat16 or float16; of a prompt [n_prompts, ...], n_rows a
            multiple of n_prompts, or a prompt for each row. More tokens of a prompt may follow in the same form, until beams
            have tokens of their own.
        key, value: [as query, n_new, n_kv_heads, head_dim], n_heads a multiple of n_kv_heads.
        scale_attn: a *divisor* of products, sqrt(head_dim) usually.
        layer_past: (carrier, key_cache, value_cache, beam_idx), the third result of the call before: it alone is the state.
            carrier: a tensor whose size(-2) is the number of tokens; nothing else of it is read. What is returned as such
            has shape [1, tokens, tokens, 1] and takes the memory of one number. key_cache, value_cache:
            [capacity, n_rows, n_kv_heads, head_dim], views of one buffer; copies of them, or caches of your own, are
            copied into such a buffer by each call that gets them. beam_idx: int64 [capacity + 2, n_rows].
            `beam_idx[tokens - 1] = rows` lets row r go on with what row rows[r] had. Its last two rows begin
            with how many tokens belong to the prompt (tokens count as such until rows part), and with n_prompts.
            The first call allocates: its carrier has size 0, of its beam_idx only size(1), which is n_rows, is read,
            and nothing of its caches. None: one row for each prompt. A carrier with fewer tokens than there were takes back
            those behind it, and what was reordered behind them. Calls write to the caches and to beam_idx in place, as
            long as they fit.
        head_mask: None.
        attention_mask: bool (True: seen), or floating point and added to scores; broadcast to
            [rows, n_heads, n_new, tokens with the new ones]. Keys with -inf, or of weight 0 beside others because of the
            dtype's minimum or -5e8 and less, are not looked at. Real-valued biases, and masks of single heads, go
            through torch on keys and values that were gathered, which is slower.
        alibi: float32 slopes [n_heads], of slope * (place of the key - place of the token); or a bias that is added as the
            mask is, [rows or 1, n_heads or 1, n_new or 1, tokens], or Bloom's [rows * n_heads, n_new or 1, tokens].
        add_casual_mask: whether a new token sees none of those behind it, whatever the mask says.
        seq_info: the number of tokens instead of the carrier's. -1 is cross attention: key and value are not read, the
            caches are [n_rows, tokens, n_kv_heads, head_dim] and stay as they are, and every token is seen; what is
            returned as layer_past has the same content in an order that the next call need not copy.
        text_max_length: a number of tokens beyond which growth does not go before it has to. Room is for twice the prompt at
            first, and doubles, as often as needed; memory is taken as it is filled.

    Returns (result [rows, n_heads, n_new, head_dim], None, layer_past for the next call). A token that sees no key gets 0.
    A cache of float8_e5m2 is not kept: keys and values are stored in their own dtype, whatever that of the first caches is.

    Raises `InvalidInput` for wrong shapes, dtypes and rows before anything is written, and `CacheFull`.

    Example:
        >>> import torch
        >>> from hfopt.functional import indirect_access_kv_cache_attention
        >>> zeros = torch.zeros(1, 1, 1, 1)
        >>> past = (torch.zeros(1, 0, 0, 1), zeros, zeros, torch.zeros(1, 4, dtype=torch.long))  # 4 beams
        >>> x = torch.randn(1, 5, 2, 16)  # one prompt of 5 tokens
        >>> out, _, past = indirect_access_kv_cache_attention(x, x, x, 4.0, past)
        >>> past[3][past[0].size(-2) - 1] = torch.tensor([0, 0, 0, 0])
        >>> x = torch.randn(4, 1, 2, 16)  # a token of each beam
        >>> out, _, past = indirect_access_kv_cache_attention(x, x, x, 4.0, past)
        >>> out.shape, past[0].size(-2)
        (torch.Size([4, 2, 1, 16]), 6)
    """
    if torch.compiler.is_compiling():  # traced memory has no address
        mask, more = (head_mask, attention_mask, alibi), (add_casual_mask, seq_info, text_max_length)
        plain = torch.compiler.disable(indirect_access_kv_cache_attention)
        return plain(query, key, value, scale_attn, layer_past, *mask, *more)
    if head_mask is not None:
        raise InvalidInput(f"head_mask is a {type(head_mask).__name__}: only None is allowed")
    check_text_max_length(text_max_length)
    add_casual_mask = flag("add_casual_mask", add_casual_mask)
    check_floats_4d("query", query)
    scale = _scale_of(scale_attn)
    length = _length_of(seq_info, layer_past)
    if length == _CROSS:
        appended, past = _crossed(query, layer_past)
        scores = _scores_of(attention_mask, alibi, scale, False, query, appended.prefix_len)
        return _attended(query, appended, scores), None, past

    layout, keys, values = _checked_new(query, key, value)
    n_given, n_new = query.shape[:2]
    if length and layer_past is not None:
        now = opened(layer_past, length, layout)
    else:
        now = first_past(_n_rows_of(layer_past, n_given), n_given, n_new, layout, text_max_length)
    reading = reading_of(now, n_given, n_new)
    scores = _scores_of(attention_mask, alibi, scale, add_casual_mask, query, length + n_new)
    past, appended = appended_to(now, reading, keys, values, text_max_length)
    return _attended(query, appended, scores), None, past


class _Scores(NamedTuple):
    """What becomes of products: some keys are hidden, or all have a bias."""

    scoring: Scoring
    mask: Mask
    bias: Tensor | None = None  # float32, for [rows, n_heads, n_new, n_keys]


def _attended(query: Tensor, appended: Appended, scores: _Scores) -> Tensor:
    n_heads, head_dim = query.shape[2:]
    n_kv_heads = appended.prefix.shape[2]
    if scores.bias is not None:
        keys, values = gathered(appended, query.dtype)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys,
            values,
            attn_mask=scores.bias,
            scale=scores.scoring.scale,
            enable_gqa=True,
        )
        return out.masked_fill((scores.bias == -math.inf).all(-1, keepdim=True), 0)
    q = query.detach().contiguous().flatten(2)
    out = attend(q, appended, scores.mask, scores.scoring, n_heads, n_kv_heads, head_dim)
    return out.unflatten(-1, (n_heads, head_dim)).transpose(1, 2)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _scale_of(scale_attn: float | Tensor) -> float:
    divisor = finite("scale_attn", scale_attn)
    if divisor == 0 or not math.isfinite(1 / divisor):
        raise InvalidInput(f"scale_attn is {divisor}: a finite number other than 0 is needed")
    return 1 / divisor


def _length_of(seq_info: int | Tensor | None, layer_past: Sequence[Tensor] | None) -> int:
    """Tokens of the past, or `_CROSS`."""
    if layer_past is not None:
        if not isinstance(layer_past, tuple | list) or len(layer_past) != 4:
            raise InvalidInput(
                "layer_past is no (carrier, key_cache, value_cache, beam_idx): such is needed, or None"
            )
        if not isinstance(layer_past[0], Tensor) or layer_past[0].ndim < 2:
            raise InvalidInput(
                "layer_past[0] is no tensor whose size(-2) is a number of tokens: one is needed"
            )
    length = 0 if layer_past is None else layer_past[0].size(-2)
    if seq_info is not None:
        length = integer("seq_info", seq_info)
    if length < _CROSS or (layer_past is None and length > 0):
        raise InvalidInput(
            f"seq_info is {length}: the tokens of layer_past are needed, or -1 for cross attention"
        )
    return length


def _checked_new(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Layout, Tensor, Tensor]:
    """What is needed of the cache of new tokens, and their keys and values. Raises `InvalidInput`."""
    if key is None or value is None:
        raise InvalidInput("key or value is None: both are needed, but for cross attention")
    for name, each in (("key", key), ("value", value)):
        check_floats_4d(name, each, query.dtype)
    n_rows, n_new, n_heads, head_dim = query.shape
    n_kv_heads = key.shape[2]
    if n_heads % n_kv_heads:
        raise InvalidInput(f"key has {n_kv_heads} heads: a divisor of the {n_heads} of query is needed")
    for name, each in (("key", key), ("value", value)):
        check_shape(name, each, (n_rows, n_new, n_kv_heads, head_dim))
    return (n_kv_heads, head_dim, query.dtype), key, value


def _n_rows_of(layer_past: Sequence[Tensor] | None, n_prompts: int) -> int:
    """Rows of a first call."""
    if layer_past is None:
        return n_prompts
    check_beam_idx(layer_past[3])
    n_rows = layer_past[3].shape[1]
    if n_rows % n_prompts:
        raise InvalidInput(
            f"query has {n_prompts} rows: a divisor of the {n_rows} columns of beam_idx is needed"
        )
    return n_rows


def _crossed(query: Tensor, layer_past: Sequence[Tensor] | None) -> tuple[Appended, LayerPast]:
    """What cross attention is over. Raises `InvalidInput`."""
    if layer_past is None:
        raise InvalidInput("layer_past is None: cross attention reads its caches")
    carrier, key_cache, value_cache, beam_idx = layer_past
    n_rows, n_new, n_heads, head_dim = query.shape
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_floats_4d(name, cache, query.dtype)
        check_shape(name, cache, (n_rows, *key_cache.shape[1:3], head_dim))
    shape = key_cache.shape
    if n_heads % shape[2]:
        raise InvalidInput(f"key_cache has {shape[2]} heads: a divisor of the {n_heads} of query is needed")
    buffer = joined(key_cache.transpose(1, 2), value_cache.transpose(1, 2))
    rows, array = np.arange(n_rows, dtype=np.int32), bits(buffer)
    appended = Appended(array, array, shape[1], 0, False, n_new, rows, np.empty((n_rows, 0), np.int32))
    keys, values = (half.transpose(1, 2) for half in buffer)
    return appended, (carrier, keys, values, beam_idx)


# ---- masks -----------------------------------------------------------------------------------------------------------


def _scores_of(
    attention_mask: Tensor | None,
    alibi: Tensor | None,
    scale: float,
    causal: bool,
    query: Tensor,
    n_keys: int,
) -> _Scores:
    """What masks and alibi make of scores. Raises `InvalidInput`."""
    n_rows, n_new, n_heads, _ = query.shape
    shape = n_rows, n_heads, n_new, n_keys
    slopes, bias, mask = None, None, None
    if attention_mask is not None:
        mask = _fitting("attention_mask", attention_mask, shape)
    if alibi is not None and isinstance(alibi, Tensor) and alibi.ndim == 1:
        slopes = alibi.contiguous() if alibi.is_cpu else alibi
        check_array("alibi", slopes, (n_heads,), torch.float32)
    elif alibi is not None:
        bias = _fitting("alibi", _in_four(alibi, n_rows, n_heads), shape)
    scoring = Scoring(scale, slopes=slopes)
    seen = None if mask is None else _seen_by(mask)
    order = None
    if causal and n_new > 1:
        order = torch.ones(n_new, n_keys, dtype=torch.bool, device="cpu").tril_(n_keys - n_new)
    # attention of ours is over the new tokens too
    if bias is None and (mask is None or seen is not None) and n_new <= n_keys:
        if seen is None:
            return _Scores(scoring, Mask("none" if order is None else "causal"))
        seen = seen.expand(-1, -1, n_new, n_keys)
        seen = seen if order is None else seen & order
        return _Scores(scoring, prepare_mask(seen, n_rows, n_new, n_keys))

    total = torch.zeros(1, 1, n_new, n_keys, device="cpu")
    for each in (mask, bias):
        if each is not None:
            total = total.masked_fill(~each, -math.inf) if each.dtype is torch.bool else total + each.float()
    if slopes is not None:
        away = (
            torch.arange(n_keys, device="cpu") - torch.arange(n_keys - n_new, n_keys, device="cpu")[:, None]
        )
        total = total + slopes[:, None, None] * away
    return _Scores(scoring, Mask("none"), total if order is None else total.masked_fill_(~order, -math.inf))


def _fitting(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask or bias over the keys; raises `InvalidInput` unless it is one for such scores."""
    if not isinstance(tensor, Tensor) or not tensor.is_cpu or tensor.layout is not torch.strided:
        raise InvalidInput(f"{name} is {type(tensor).__name__}: a dense tensor in CPU memory is needed")
    if tensor.dtype is not torch.bool and not tensor.is_floating_point():
        raise InvalidInput(f"{name} has dtype {tensor.dtype}: torch.bool or a floating point one is allowed")
    fits = tensor.ndim == 4 and all(
        given in (1, needed) for given, needed in zip(tensor.shape[:3], shape, strict=False)
    )
    if not fits or not (tensor.shape[3] == 1 or tensor.shape[3] >= shape[3]):
        raise InvalidInput(f"{name} has shape {tuple(tensor.shape)}: what broadcasts to {shape} is needed")
    address_of(name, tensor)
    return tensor.detach()[..., : shape[3]]


def _in_four(alibi: Tensor, n_rows: int, n_heads: int) -> Tensor:
    """A bias in four dimensions, of Bloom's three."""
    if isinstance(alibi, Tensor) and alibi.ndim == 3 and alibi.shape[0] in (n_heads, n_rows * n_heads):
        return alibi.unflatten(0, (-1, n_heads))
    return alibi


def _seen_by(mask: Tensor) -> Tensor | None:
    """Which keys are not hidden, [rows, 1, queries, keys], if a mask does nothing else; None if it is a bias."""
    if mask.shape[1] > 1 and mask.stride(1) == 0:
        mask = mask[:, :1]
    if mask.shape[1] > 1:
        return None
    if mask.dtype is torch.bool:
        return mask
    seen = mask == 0
    lowest = torch.finfo(mask.dtype).min / 2
    hidden = mask <= max(_HIDDEN, lowest)
    # beside others: equal scores, however low, are equal weights
    sure = seen[:, :, -1:].any(-1, keepdim=True) | (mask[:, :, -1:] == -math.inf).all(-1, keepdim=True)
    return seen if bool((seen | hidden).all()) and bool(sure.all()) else None
