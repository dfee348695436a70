"""Attention over the cache, and the forms of mask that it takes."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hfopt.cache.codes import dequantised
from hfopt.cache.row_map import gathered
from hfopt.errors import InvalidInput
from hfopt.kernels.attention import decode, prefill, seen

from .checks import ELEMENTS, address_of, prepare_threads
from .choice import Kernels, takes_torch
from .rotary import check_qkv, held_by
from .scoring import Scoring

if TYPE_CHECKING:
    from hfopt.cache import Appended

_WRONG_ROWS = "appended names rows in prefix_row or table that the cache has not"
_NO_BYTES = np.zeros((0, 0, 0), np.uint8)
_INT32 = np.dtype(np.int32)


class Mask(NamedTuple):
    """Which keys each new token sees: all ("none"), those up to itself ("causal"), or those whose byte is
    not 0 ("bytes").

    "unsupported" stands for a mask that hides nothing but changes scores, or has another form.
    """

    kind: str
    bytes: np.ndarray = _NO_BYTES  # uint8 [n_rows, n_new, n_keys] of kind "bytes"


KINDS = {"none": seen.ALL, "causal": seen.CAUSAL, "bytes": seen.BYTES}


def prepare_mask(attention_mask: object, n_rows: int, n_new: int, n_keys: int) -> Mask:
    """Mask of n_new tokens a row over n_keys keys, of which the new tokens' are the last.

    attention_mask: None (causal), or [1 or n_rows, 1, n_new, >= n_keys], bool (True: seen) or floating
    point (0: seen, the dtype's minimum or -inf: not, but something in the last query of each row). Others are
    "unsupported". Raises `InvalidInput` for a shape that does not fit.
    """
    if attention_mask is None:
        return Mask("none" if n_new == 1 else "causal")
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4 or attention_mask.shape[1] != 1:
        return Mask("unsupported")
    if not attention_mask.is_cpu:
        raise InvalidInput(
            f"attention_mask is on device {attention_mask.device}: only tensors in CPU memory are allowed"
        )
    rows, _, queries, keys = attention_mask.shape
    if rows not in (1, n_rows) or queries != n_new or keys < n_keys:
        raise InvalidInput(
            f"attention_mask has shape {tuple(attention_mask.shape)}: "
            f"[1 or {n_rows}, 1, {n_new}, {n_keys} or more] is needed"
        )
    address_of("attention_mask", attention_mask)
    seen = attention_mask[:, 0, :, :n_keys]
    if seen.dtype is not torch.bool:
        if not seen.is_floating_point():
            return Mask("unsupported")
        scores = seen
        seen = scores == 0
        # masks are added to each other, so a hidden key may have twice the minimum, which is -inf
        if not bool((seen | (scores <= torch.finfo(scores.dtype).min / 2)).all()):
            return Mask("unsupported")
        # equal scores, however low, are equal weights
        if not bool(seen[:, -1].any(dim=-1).all()):
            return Mask("unsupported")
    if bool(seen.all()):
        return Mask("none")
    if n_new > 1:
        causal = torch.ones(n_new, n_keys, dtype=torch.bool, device="cpu").tril_(n_keys - n_new)
        if torch.equal(seen, causal.expand_as(seen)):
            return Mask("causal")
    return Mask("bytes", seen.expand(n_rows, -1, -1).contiguous().view(torch.uint8).numpy())


def attend(
    qkv: Tensor,
    appended: "Appended",
    mask: Mask,
    scoring: Scoring,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    *,
    by: Kernels = "hfopt",
) -> Tensor:
    """softmax(scores) v over the cached keys and values: [n_rows, n_new, n_heads * head_dim]. scoring: how scores come about
    from q k^T.

    qkv: [n_rows, n_new, (n_heads + 2 * n_kv_heads) * head_dim], or of the queries alone, n_heads * head_dim; contiguous,
    float32, bfloat16 or float16 as the cache, unless that holds codes; of it only the queries, its first channels,
    are read: `rotate_and_store` has put the keys and values into the cache. Keys that a mask hides are not
    looked at, whatever they hold; a token that sees no key gets 0. by: "hfopt", "torch", or "auto" (what is
    faster for this many new tokens, see `choice`); one new token a row is always hfopt's, and so are infinite and NaN
    keys and values behind a mask, which torch would spread, and scores that are more than scaled. Raises `InvalidInput`.
    """
    address, record = check_qkv(qkv, appended, n_heads, n_kv_heads, head_dim, stores=False)
    n_rows, n_new, width = qkv.shape
    check_lengths(appended, n_rows)
    _check_skipped(appended)
    hidden = checked_bytes(mask, appended.n_keys, n_rows, n_new)
    numbers = scoring.numbers(n_heads, qkv.dtype)
    out = qkv.new_empty(n_rows, n_new, n_heads * head_dim)
    if not out.numel():
        return out
    by_torch = n_new > 1 and by != "hfopt" and scoring.is_plain(appended.n_keys)
    if by_torch and takes_torch(by, "attention", qkv.dtype, n_new):
        attended = _attend_in_torch(qkv, appended, mask, scoring.scale, n_heads, head_dim)
        if attended is not None:
            return attended
    prepare_threads()
    like, target = (ELEMENTS[qkv.dtype], held_by(appended, qkv.dtype)), out.data_ptr()
    lengths = appended.prefix_len, appended.suffix_len
    cache = (record, *lengths, appended.prefix_row, appended.table, appended.skipped)
    if n_new == 1:
        wrong = decode.attend_decode(
            *like, address, width, n_rows, *cache, hidden, *numbers, n_heads, target, False
        )
    else:
        kind = KINDS[mask.kind]
        sizes = (address, width, n_rows, n_new)
        wrong = prefill.attend_prefill(*like, *sizes, *cache, kind, 0, hidden, *numbers, n_heads, target)
    if wrong:
        raise InvalidInput(_WRONG_ROWS)
    return out


@torch.no_grad()
def _attend_in_torch(
    qkv: Tensor, appended: "Appended", mask: Mask, scale: float, n_heads: int, head_dim: int
) -> Tensor | None:
    """`attend` by `scaled_dot_product_attention`; None if a mask hides something that is not finite."""
    n_rows, n_new, _ = qkv.shape
    keys, values = _gathered(appended, n_rows, qkv.dtype)
    n_keys = keys.shape[2]
    # 0 * NaN is NaN, and torch multiplies by the weights of hidden keys too
    if mask.kind != "none" and not all(
        bool(bound.isfinite()) for part in (keys, values) for bound in part.aminmax()
    ):
        return None
    seen = None
    if mask.kind == "bytes":
        seen = (torch.from_numpy(mask.bytes) != 0)[:, None]
    elif mask.kind == "causal" and n_new < n_keys:
        seen = torch.ones(n_new, n_keys, dtype=torch.bool, device="cpu").tril_(n_keys - n_new)
    heads = F.scaled_dot_product_attention(
        qkv[..., : n_heads * head_dim].unflatten(-1, (n_heads, head_dim)).transpose(1, 2),
        keys,
        values,
        attn_mask=seen,
        is_causal=mask.kind == "causal" and n_new == n_keys,
        scale=scale,
        enable_gqa=True,
    )
    return heads.transpose(1, 2).flatten(2)


def _gathered(appended: "Appended", n_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as the rows read them, [n_rows, n_kv_heads, n_keys, head_dim]; views if they are in order."""
    in_prefix, starts = min(appended.skipped, appended.prefix_len), appended.starts
    in_suffix = appended.skipped - in_prefix
    prefix_row, table = appended.prefix_row[:n_rows], appended.table[:n_rows, in_suffix : appended.suffix_len]
    for rows, stored in ((prefix_row, appended.prefix), (table, appended.suffix)):
        if rows.size and not 0 <= rows.min() <= rows.max() < stored.shape[1]:
            raise InvalidInput(_WRONG_ROWS)

    def read(prefix: np.ndarray, suffix: np.ndarray, of: torch.dtype) -> Tensor:
        columns = torch.from_numpy(prefix)[:, :, in_prefix - starts[0] : appended.prefix_len - starts[0]]
        later = torch.from_numpy(suffix)[:, :, in_suffix - starts[1] :]
        return gathered(columns.view(of), later.view(of), prefix_row, table)

    def floats(which: int) -> Tensor:
        prefix, suffix = appended.prefix[which], appended.suffix[which]
        if appended.prefix_scales is None or appended.suffix_scales is None:
            return read(prefix, suffix, dtype)
        scales = read(appended.prefix_scales[which], appended.suffix_scales[which], torch.float32)
        return dequantised(read(prefix, suffix, torch.int8), scales, dtype)

    return floats(0), floats(1)


def checked_bytes(mask: Mask, n_keys: int, n_rows: int, n_new: int) -> np.ndarray:
    """The bytes of a mask, none for a kind without; raises `InvalidInput` for other kinds and for bytes that do not fit."""
    if mask.kind in ("none", "causal"):
        return _NO_BYTES
    if mask.kind not in KINDS:
        raise InvalidInput(f"mask is of kind {mask.kind!r}: {', '.join(map(repr, KINDS))} are allowed")
    given, shape = mask.bytes, (n_rows, n_new, n_keys)
    if given.shape != shape or given.dtype != np.uint8 or not given.flags.c_contiguous:
        raise InvalidInput(f"mask has bytes {given.dtype} {given.shape}: contiguous uint8 {shape} is needed")
    return given


def check_lengths(appended: "Appended", n_rows: int) -> None:
    """Raises `InvalidInput` unless lengths and rows are those of something stored."""
    starts = appended.starts
    firsts = starts[0], max(starts[1], 0)
    lengths = appended.prefix_len, appended.suffix_len
    ends = starts[0] + appended.prefix.shape[3], starts[1] + appended.suffix.shape[3]
    for name, first, length, end in zip(("prefix_len", "suffix_len"), firsts, lengths, ends, strict=True):
        if not first <= length <= end:
            raise InvalidInput(f"appended.{name} is {length}: from {first} up to {end} is allowed")
    prefix_row, table, n_columns = appended.prefix_row, appended.table, appended.suffix_len
    if prefix_row.ndim != 1 or prefix_row.shape[0] < n_rows or not _is_index(prefix_row):
        given = f"{prefix_row.dtype} {prefix_row.shape}"
        raise InvalidInput(f"appended.prefix_row has {given}: int32 {(n_rows,)} is needed")
    if table.ndim != 2 or table.shape[0] < n_rows or table.shape[1] < n_columns or not _is_index(table):
        given = f"{table.dtype} {table.shape}"
        raise InvalidInput(f"appended.table has {given}: int32 {(n_rows, n_columns)} is needed")


def _check_skipped(appended: "Appended") -> None:
    """Raises `InvalidInput` unless all tokens but those that are not seen are held."""
    in_prefix, starts = min(appended.skipped, appended.prefix_len), appended.starts
    if appended.n_keys < appended.n_new or starts[0] > in_prefix or starts[1] > appended.skipped - in_prefix:
        raise InvalidInput(
            f"appended.skipped is {appended.skipped}: from {starts[0]} + {starts[1]} up to the new tokens is allowed"
        )


def _is_index(array: np.ndarray) -> bool:
    return array.dtype == _INT32 and array.flags.c_contiguous
