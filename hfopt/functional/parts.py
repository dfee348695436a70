"""Attention of one new token a row over keys of which others have the rest: a part of its softmax, and all parts joined."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels.attention import decode
from hfopt.kernels.attention.plan import part_floats

from .attention import _NO_BYTES, _WRONG_ROWS, check_lengths
from .checks import ELEMENTS, check_array, prepare_threads
from .rotary import check_qkv, held_by
from .scoring import Scoring

if TYPE_CHECKING:
    from hfopt.cache import Appended


def attend_part(
    qkv: Tensor, appended: "Appended", scoring: Scoring, n_heads: int, n_kv_heads: int, head_dim: int
) -> Tensor:
    """The unfinished softmax of each query over the cached keys: float32 [n_rows * n_heads, 1, size].

    What `attend` does for one new token a row without a mask, up to its last step: the largest score, the sum of
    exponentials, and the values weighted by them (https://arxiv.org/abs/2311.01282). Those of other keys go beside it for
    `join_parts`. scoring: without slopes and windows, which ask where a key is. Raises `InvalidInput`.
    """
    address, record = check_qkv(qkv, appended, n_heads, n_kv_heads, head_dim, stores=False)
    n_rows, n_new, width = qkv.shape
    check_lengths(appended, n_rows)
    if n_new != 1 or appended.skipped or scoring.slopes is not None or scoring.window is not None:
        given = f"qkv has {n_new} new tokens a row, appended.skipped is {appended.skipped}"
        raise InvalidInput(f"{given}: parts are of one new token, without skipped ones, slopes and windows")
    parts = torch.empty(n_rows * n_heads, 1, _size(head_dim, qkv.dtype), device="cpu")
    if not parts.numel():
        return parts
    prepare_threads()
    like = ELEMENTS[qkv.dtype], held_by(appended, qkv.dtype)
    cache = record, appended.prefix_len, appended.suffix_len, appended.prefix_row, appended.table, 0
    numbers = scoring.numbers(n_heads, qkv.dtype)
    queries = address, width, n_rows
    out = n_heads, parts.data_ptr(), True
    if decode.attend_decode(*like, *queries, *cache, _NO_BYTES, *numbers, *out):
        raise InvalidInput(_WRONG_ROWS)
    return parts


def join_parts(parts: Tensor, scoring: Scoring, n_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """What `attend` gives over the keys of all parts: [n_rows, 1, n_heads * head_dim] of this dtype.

    parts: float32 [n_rows * n_heads, n, size], the n parts of each query in an order that is part of the result; they are
    overwritten. scoring: as for `attend_part`. Raises `InvalidInput`.
    """
    n_queries, n_parts = parts.shape[:2] if parts.dim() == 3 else (0, 0)
    size = _size(head_dim, dtype) if dtype in ELEMENTS else 0
    address = check_array("parts", parts, (n_queries, n_parts, size), torch.float32)
    if n_queries % n_heads:
        raise InvalidInput(f"parts are of {n_queries} queries: a multiple of {n_heads} heads is needed")
    sinks = scoring.numbers(n_heads, dtype)[3]
    out = torch.empty(n_queries // n_heads, 1, n_heads * head_dim, dtype=dtype, device="cpu")
    prepare_threads()
    sizes = n_parts, n_queries, n_heads, head_dim
    decode.join_parts(ELEMENTS[dtype], address, *sizes, sinks, out.data_ptr())
    return out


def _size(head_dim: int, dtype: torch.dtype) -> int:
    """float32 numbers of a part of queries of this dtype."""
    return part_floats(head_dim, 2 if dtype is torch.bfloat16 else 4)  # float16 is widened to float32
