"""Attention of sequences that lie one behind the other, over keys that lie anywhere: packed, or in blocks of a cache."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels.attention import decode, prefill
from hfopt.kernels.attention.block_table import list_keys
from hfopt.kernels.attention.cache_record import record_of_keys
from hfopt.kernels.attention.elements import BLOCK
from hfopt.kernels.attention.scoring import APART, SIGNED
from hfopt.kernels.attention.seen import ALL, CAUSAL

from .checks import ELEMENTS, FLOAT8, address_of, check_floats, check_shape, prepare_threads
from .integers import integers
from .scalars import finite, integer
from .scoring import Scoring

_NO_MASK = np.zeros((0, 0, 0), np.uint8)
_MOST_KEYS = 2**31 - 1  # that a table can name
_FAR = 2**31  # keys; a window of more is none


class Band(NamedTuple):
    """Which keys around its own a token sees, where the last token of a sequence stands at its last key.

    left, right: so many before and behind it at most; -1: all.
    """

    left: int = -1
    right: int = -1

    @classmethod
    def of(cls, left: int, right: int, is_causal: bool) -> "Band":
        """Raises `InvalidInput` for less than -1, and for what is no integer."""
        left, right = integer("window_size_left", left), integer("window_size_right", right)
        for name, size in (("window_size_left", left), ("window_size_right", right)):
            if size < -1:
                raise InvalidInput(f"{name} is {size}: -1, for no window, or more is allowed")
        return cls(min(left, _FAR), 0 if is_causal else min(right, _FAR))


class Manner(NamedTuple):
    """How scores come about, and which keys are seen."""

    scale: float
    softcap: float | None
    slopes: Tensor | None  # float32 [n_heads], or [n_sequences, n_heads]
    band: Band

    def numbers(
        self, sequence: int, n_heads: int, dtype: torch.dtype
    ) -> tuple[tuple[float, ...], Tensor | None]:
        """Scale, softcap and addresses as kernels get them, and the slopes of a sequence, which have to be kept alive."""
        slopes = self.slopes
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[sequence]
        return Scoring(self.scale, self.softcap, slopes).numbers(n_heads, dtype)[:4], slopes


class KeyBlocks(NamedTuple):
    """Keys and values of sequences, in blocks that they name. Steps are in keys, `head` in elements."""

    keys: Tensor
    values: Tensor  # strided alike
    blocks: np.ndarray  # int64 [n_sequences, most blocks of one]; those of the tokens of a sequence exist
    lengths: np.ndarray  # int64 [n_sequences], of keys
    n_blocks: int
    block_size: int
    block_step: int
    token_step: int
    head: int
    n_kv_heads: int

    def record(self, n: int) -> np.ndarray:
        """The record for tables of n columns."""
        size, item = self.keys.shape[-1], self.keys.element_size()
        keys, values = address_of("key", self.keys), address_of("value", self.values)
        n_rows = (self.n_blocks - 1) * self.block_step + (self.block_size - 1) * self.token_step + n + 1
        if n_rows > _MOST_KEYS:
            raise InvalidInput(
                f"key has shape {tuple(self.keys.shape)}: room for {_MOST_KEYS:,} keys is allowed"
            )
        sizes = self.head, (values - keys) // item, self.n_kv_heads, size
        return record_of_keys(keys - n * size * item, n_rows, *sizes)

    def table(
        self, first: int, end: int, seen_from: np.ndarray, columns: np.ndarray, n: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(table, mask) of sequences from first to end, whose key `seen_from` is in column `columns`; without a mask if they
        see what is in each of the n columns."""
        lengths = self.lengths[first:end]
        hides = bool((columns > 0).any() or (columns + lengths - seen_from < n).any())
        mask = np.empty((end - first, 1, n), np.uint8) if hides else _NO_MASK
        rows = np.empty((end - first, n), np.int32)
        sizes = self.block_size, self.block_step, self.token_step
        list_keys(self.blocks[first:end], *sizes, lengths, seen_from, columns, rows, mask)
        return rows, mask


def attend_sequences(q: Tensor, q_ends: np.ndarray, keys: KeyBlocks, manner: Manner, out: Tensor) -> None:
    """out = softmax(scores) v of each sequence: queries from q_ends[i] up to q_ends[i + 1] over the keys of sequence i; 0
    for those that see none. q, out [n_tokens, n_heads, head_dim]; q_ends int64.

    One launch for neighbours that have one query each, and one for those of as many queries and keys. Raises `InvalidInput`.
    """
    n_heads, size = q.shape[1:]
    q = q if is_dense(q) else q.contiguous()
    q_at, q_row = address_of("query", q), q.stride(0) if len(q) > 1 else n_heads * size
    is_direct = out.is_contiguous() and not any(
        shares_memory(out, each) for each in (q, keys.keys, keys.values)
    )
    target = out if is_direct else torch.empty_like(out, memory_format=torch.contiguous_format)
    target_at = address_of("out", target)
    held = FLOAT8.get(keys.keys.dtype, ELEMENTS.get(keys.keys.dtype))
    like = ELEMENTS[q.dtype], held
    prepare_threads()
    for first, end in _runs(
        np.diff(q_ends), keys.lengths, manner.slopes is not None and manner.slopes.ndim == 2
    ):
        start, stop = int(q_ends[first]), int(q_ends[end])
        if not keys.lengths[first:end].any():
            target[start:stop] = 0
            continue
        n_new = (stop - start) // (end - first)
        numbers, slopes = manner.numbers(first, n_heads, q.dtype)
        at = q_at + start * q_row * q.element_size(), q_row, end - first
        target_row = target_at + start * n_heads * size * q.element_size()
        prefix_row = np.zeros(end - first, np.int32)
        if n_new == 1:
            n, table, mask = _aligned(keys, first, end, manner.band.left)
            cache = keys.record(n), 0, n, prefix_row, table, 0
            wrong = decode.attend_decode(
                *like, *at, *cache, mask, *numbers, 0, SIGNED, n_heads, target_row, False
            )
        else:
            n, zeros = int(keys.lengths[first]), np.zeros(end - first, np.int64)
            table, _ = keys.table(first, end, zeros, zeros, n)
            cache = keys.record(n), 0, n, prefix_row, table, 0
            left, right = manner.band
            kind, ahead = (ALL, 0) if right < 0 else (CAUSAL, right)
            window, bias = left + 1 + ahead if left >= 0 else 0, SIGNED if right == 0 else APART
            seen = kind, ahead, _NO_MASK
            numbers = *numbers, window, bias
            wrong = prefill.attend_prefill(*like, *at, n_new, *cache, *seen, *numbers, n_heads, target_row)
        assert wrong == 0, "a table that names keys of its own"
        del slopes
    if not is_direct:
        rows = slice(int(q_ends[0]), int(q_ends[-1]))
        out[rows] = target[rows]


def _runs(q_lengths: np.ndarray, k_lengths: np.ndarray, alone: bool) -> Iterator[tuple[int, int]]:
    """(first, end) of sequences that are attended to in one launch; alone: one each."""
    n, first = len(q_lengths), 0
    while first < n:
        length, end = q_lengths[first], first + 1
        while (
            end < n
            and not alone
            and q_lengths[end] == length
            and (length <= 1 or k_lengths[end] == k_lengths[first])
        ):
            end += 1
        if length > 0:
            yield first, end
        first = end


def _aligned(keys: KeyBlocks, first: int, end: int, left: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(columns, table, mask) of one query for each of the sequences: whole blocks of a tile stay whole, and the last key of
    each sequence is in one of the last columns, as scores of ALiBi may be off by a constant but not by a large one.
    """
    lengths = keys.lengths[first:end]
    seen_from = np.maximum(lengths - 1 - left, 0) if left >= 0 else np.zeros_like(lengths)
    within = seen_from % BLOCK
    spans = lengths - seen_from + within
    n = int(spans.max())
    columns = (n - spans) // BLOCK * BLOCK + within
    return n, *keys.table(first, end, seen_from, columns, n)


# ---- what is asked of tensors ----------------------------------------------------------------------------------------


def is_dense(q: Tensor) -> bool:
    """Whether the heads of a token [n_tokens, n_heads, size] are one vector."""
    _, n_heads, size = q.shape
    return (size == 1 or q.stride(2) == 1) and (n_heads == 1 or q.stride(1) == size)


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def steps_of(tensor: Tensor) -> list[int]:
    """Strides, 0 of dimensions that have no second place."""
    return [step if n > 1 else 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)]


def strided_alike(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, both copied unless each key is one vector, whole ones apart but for its head, and each value as far
    from its key."""
    steps, size = steps_of(keys), keys.shape[-1]
    apart = values.data_ptr() - keys.data_ptr()
    fits = (
        steps == steps_of(values)
        and steps[-1] in (0, 1)
        and not any(step % size for place, step in enumerate(steps[:-1]) if place != 1)
        and apart % keys.element_size() == 0
    )
    return (keys, values) if fits else (keys.contiguous(), values.contiguous())


def check_queries(query: Tensor, out: Tensor, n_kv_heads: int, size: int, out_name: str) -> None:
    """Raises `InvalidInput` unless both are [n_tokens, n_heads, size], of heads that share those of keys, and out can be
    written."""
    check_floats("query", query)
    if query.ndim != 3:
        raise InvalidInput(f"query has shape {tuple(query.shape)}: [n_tokens, n_heads, head_size] is needed")
    if query.shape[2] != size or size < 1:
        raise InvalidInput(
            f"query has heads of {query.shape[2]} channels: those of the keys, {size}, are needed"
        )
    if n_kv_heads < 1 or query.shape[1] < 1 or query.shape[1] % n_kv_heads:
        raise InvalidInput(
            f"query has {query.shape[1]} heads: a multiple of the {n_kv_heads} of the keys is needed"
        )
    check_floats(out_name, out, query.dtype)
    check_shape(out_name, out, tuple(query.shape))
    check_writable(out_name, out)
    address_of("query", query)
    address_of(out_name, out)


def check_writable(name: str, tensor: Tensor) -> None:
    """Raises `InvalidInput` for memory that has several places at once."""
    if any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
        given = f"has strides {tensor.stride()} with shape {tuple(tensor.shape)}"
        raise InvalidInput(f"{name} {given}: expanded memory cannot be written")


def cumulative(name: str, tensor: object, most: int | None, longest: int, longest_name: str) -> np.ndarray:
    """Cumulative lengths [n + 1] as int64; raises `InvalidInput` unless they grow from 0 or more, up to `most` if there is
    such, by no more than `longest`."""
    ends = integers(name, tensor, (None,))
    # differences of large numbers may be none
    falls = bool((ends[1:] < ends[:-1]).any())
    if len(ends) < 1 or ends[0] < 0 or falls or (most is not None and ends[-1] > most):
        limit = "" if most is None else f" up to the {most} tokens"
        raise InvalidInput(f"{name} is {ends.tolist()}: cumulative lengths from 0{limit} are needed")
    check_longest(longest_name, longest, np.diff(ends))
    return ends


def check_longest(name: str, longest: int, lengths: np.ndarray) -> None:
    """Raises `InvalidInput` for less than the largest of the lengths."""
    if integer(name, longest) < lengths.max(initial=0):
        raise InvalidInput(f"{name} is {longest}: at least the longest sequence, {lengths.max()}, is needed")


def manner_of(
    scale: float | None,
    softcap: float,
    slopes: Tensor | None,
    band: Band,
    n_sequences: int,
    n_heads: int,
    size: int,
) -> Manner:
    """How to attend; raises `InvalidInput`. scale: None for 1 / sqrt(size); softcap: none if it is not positive."""
    scale, softcap = (
        size**-0.5 if scale is None else finite("softmax_scale", scale),
        finite("softcap", softcap),
    )
    if slopes is not None:
        check_floats("alibi_slopes", slopes)
        if tuple(slopes.shape) not in ((n_heads,), (n_sequences, n_heads)):
            allowed = f"[{n_heads}] or [{n_sequences}, {n_heads}]"
            raise InvalidInput(f"alibi_slopes has shape {tuple(slopes.shape)}: {allowed} is needed")
        address_of("alibi_slopes", slopes)
        slopes = slopes.to(torch.float32).contiguous()
        if not bool(slopes.isfinite().all()):
            raise InvalidInput(f"alibi_slopes is {slopes.tolist()}: finite numbers are needed")
    manner = Manner(scale, softcap if softcap > 0 else None, slopes, band)
    Scoring(manner.scale, manner.softcap)  # raises for a softcap that is none
    return manner
