"""The `layer_past` that users of `indirect_access_kv_cache_attention` thread through their model, and the memory behind it.

Keys and values lie as all caches here do, [2, n_rows, n_kv_heads, capacity, head_dim]; users see its two halves as
[capacity, n_rows, n_kv_heads, head_dim], from whose addresses and strides the whole is found again.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hfopt.cache import Appended
from hfopt.cache.row_map import rounded
from hfopt.cache.storage import Layout, bits, moved, no_columns
from hfopt.errors import InvalidInput
from hfopt.kernels.attention.history import trace_rows

from .checks import address_of, array_of, check_floats, check_shape

LayerPast: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]

_ZERO = torch.zeros((), dtype=torch.int64, device="cpu")
_TRAILER = 2  # rows of beam_idx behind those of tokens: tokens of the prompt, and rows that it has


class Past(NamedTuple):
    """What a `layer_past` says.

    The first `prompt_len` tokens of a row lie in the first of the rows that share them; each later one in the row that it
    was given for, from where `beam_idx` leads to it.
    """

    buffer: Tensor  # [2, n_rows, n_kv_heads, capacity, head_dim]
    beam_idx: Tensor  # int64 [capacity + 2, n_rows]
    length: int
    prompt_len: int
    n_prompts: int

    @property
    def n_rows(self) -> int:
        """Rows of the batch, beams of all prompts."""
        return self.beam_idx.shape[1]

    @property
    def share(self) -> int:
        """Rows of each prompt."""
        return self.n_rows // self.n_prompts


class Reading(NamedTuple):
    """Where the rows of a call find their tokens, and where its new ones go."""

    in_prompt: bool  # whether the new tokens extend the prompt
    prefix_row: np.ndarray
    table: np.ndarray


def first_past(n_rows: int, n_prompts: int, n_new: int, layout: Layout, text_max_length: int) -> Past:
    """An empty one with room for twice as many tokens; raises `CacheFull`."""
    room = _capacity(n_new, rounded(2 * n_new), text_max_length)
    buffer, _ = moved(*no_columns(n_rows, layout, None), n_rows, slice(0), (rounded(n_new), room), 0)
    return Past(buffer, _first_beam_idx(buffer, n_prompts), 0, 0, n_prompts)


def opened(layer_past: Sequence[Tensor], length: int, layout: Layout) -> Past:
    """What is in a `layer_past` of `length` tokens; keys and values that are not of one buffer are copied into one.

    Raises `InvalidInput`.
    """
    _, key_cache, value_cache, beam_idx = layer_past
    n_kv_heads, head_dim, dtype = layout
    check_floats_4d("key_cache", key_cache, dtype)
    capacity, n_rows = key_cache.shape[:2]
    shape = capacity, n_rows, n_kv_heads, head_dim
    check_floats_4d("value_cache", value_cache, dtype)
    check_shape("key_cache", key_cache, shape)
    check_shape("value_cache", value_cache, shape)
    check_beam_idx(beam_idx)
    if beam_idx.shape != (capacity + _TRAILER, n_rows):
        raise InvalidInput(
            f"beam_idx has shape {tuple(beam_idx.shape)}: {(capacity + _TRAILER, n_rows)} is needed, that of a "
            f"table that was returned with a key_cache of shape {tuple(key_cache.shape)}"
        )
    if not 0 < length <= capacity:
        raise InvalidInput(f"layer_past has {length} tokens: its caches hold from 1 to {capacity}")
    beam_idx = beam_idx.contiguous()
    prompt_len, n_prompts = (int(each) for each in beam_idx[capacity:, 0].tolist())
    if prompt_len < 0 or n_prompts < 1 or n_rows % n_prompts:
        raise InvalidInput(
            f"beam_idx ends with {prompt_len} tokens of {n_prompts} prompts: not what was written there for {n_rows} rows"
        )
    buffer = joined(key_cache.permute(1, 2, 0, 3), value_cache.permute(1, 2, 0, 3))
    return Past(buffer, beam_idx, length, min(prompt_len, length), n_prompts)


def check_text_max_length(text_max_length: object) -> None:
    """Raises `InvalidInput` unless it is a number of tokens."""
    if type(text_max_length) is not int or text_max_length < 0:
        raise InvalidInput(f"text_max_length is {text_max_length!r}: an integer from 0 on is allowed")


def check_beam_idx(beam_idx: object) -> None:
    """Raises `InvalidInput` unless it is a table of rows."""
    if not isinstance(beam_idx, Tensor) or beam_idx.dtype != torch.int64 or not beam_idx.is_cpu:
        given = f"{beam_idx.dtype} on {beam_idx.device}" if isinstance(beam_idx, Tensor) else f"{beam_idx!r}"
        raise InvalidInput(f"beam_idx is {given}: a torch.int64 tensor in CPU memory is needed")
    if beam_idx.ndim != 2 or beam_idx.shape[1] < 1 or beam_idx.layout is not torch.strided:
        raise InvalidInput(f"beam_idx has shape {tuple(beam_idx.shape)}: [positions, rows] is needed")
    address_of("beam_idx", beam_idx)


def check_floats_4d(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises `InvalidInput` unless it has four dimensions, one of the dtypes of caches, or this one, and its memory."""
    check_floats(name, tensor, dtype)
    if tensor.ndim != 4 or not tensor.numel():
        given = tuple(tensor.shape)
        raise InvalidInput(f"{name} has shape {given}: four dimensions are needed, none of which is 0")
    address_of(name, tensor)


def joined(keys: Tensor, values: Tensor) -> Tensor:
    """[2, rows, n_kv_heads, columns, head_dim] of two such halves: where they lie, if they do so one behind the other."""
    keys, values = keys.detach(), values.detach()
    n_kv_heads, columns, head_dim = keys.shape[1:]
    strides = n_kv_heads * columns * head_dim, columns * head_dim, head_dim, 1
    if (
        keys.stride() == values.stride() == strides
        and keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
        and values.storage_offset() - keys.storage_offset() == keys.numel()
    ):
        return keys.as_strided((2, *keys.shape), (keys.numel(), *strides))
    return torch.stack((keys, values))


def reading_of(past: Past, n_given: int, n_new: int) -> Reading:
    """Which rows are read by n_given rows with n_new tokens each. Raises `InvalidInput`."""
    n_rows, share, later = past.n_rows, past.share, past.length - past.prompt_len
    if n_given not in (n_rows, past.n_prompts):
        raise InvalidInput(f"query has {n_given} rows: {past.n_prompts} prompts or {n_rows} beams are needed")
    prefix_row, table = np.empty(n_rows, np.int32), np.empty((n_rows, later + n_new), np.int32)
    if trace_rows(past.beam_idx.numpy(), past.prompt_len, past.length, share, prefix_row, table):
        raise InvalidInput(f"beam_idx has rows that are not there: those from 0 to {n_rows - 1} are allowed")
    if n_given == past.n_prompts and later == 0:
        own = np.arange(0, n_rows, share, dtype=np.int32)
        if np.array_equal(prefix_row, own.repeat(share)):
            return Reading(True, own, np.empty((n_given, 0), np.int32))
    if n_given != n_rows:
        raise InvalidInput(f"query has {n_given} rows, as prompts: they have become {n_rows} beams")
    return Reading(False, prefix_row, table)


def appended_to(
    past: Past, reading: Reading, keys: Tensor, values: Tensor, text_max_length: int
) -> tuple[LayerPast, Appended]:
    """Store [rows, n_new, n_kv_heads, head_dim]: the `layer_past` of what follows, and what attention is over.

    Raises `CacheFull` before anything is changed.
    """
    n_new, length = keys.shape[1], past.length + keys.shape[1]
    if length > past.buffer.shape[3]:
        past = _grown(past, length, text_max_length)
    buffer, beam_idx, prompt_len = (
        past.buffer,
        past.beam_idx,
        length if reading.in_prompt else past.prompt_len,
    )
    step = past.share if reading.in_prompt else 1
    # by numpy, which is faster at few tokens, and may write to tensors of `torch.inference_mode` wherever it is called
    stored, numbers = bits(buffer), beam_idx.numpy()
    for half, new in enumerate((keys, values)):
        stored[half, ::step, :, past.length : length] = array_of(new).transpose(0, 2, 1, 3)
    numbers[past.length : length] = np.arange(past.n_rows)
    numbers[-_TRAILER] = prompt_len
    numbers[-_TRAILER + 1] = past.n_prompts
    key_cache, value_cache = buffer.permute(0, 3, 1, 2, 4).unbind()
    return (length_carrier(length), key_cache, value_cache, beam_idx), Appended(
        stored,
        stored,
        prompt_len,
        length - prompt_len,
        not reading.in_prompt,
        n_new,
        reading.prefix_row,
        reading.table,
        starts=(0, -prompt_len),
    )


def gathered(appended: Appended, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as rows read them, [rows, n_kv_heads, n_keys, head_dim]; views if all read their own prefix."""
    buffer = torch.from_numpy(appended.prefix).view(dtype)
    n_rows, n_kv_heads, columns, head_dim = buffer.shape[1:]
    prefix_row, n_keys = appended.prefix_row, appended.n_keys
    if not appended.suffix_len and np.array_equal(prefix_row, np.arange(n_rows)):
        return buffer[0, :, :, :n_keys], buffer[1, :, :, :n_keys]
    # prefix and suffix are one array: vectors of channels are copied once, each from its place
    in_prefix = np.broadcast_to(prefix_row[:, None], (len(prefix_row), appended.prefix_len))
    rows = np.concatenate((in_prefix, appended.table), 1).astype(np.int64)
    places = (rows[:, None] * n_kv_heads + np.arange(n_kv_heads)[:, None]) * columns + np.arange(n_keys)
    index, shape = torch.from_numpy(places.ravel()), (-1, n_kv_heads, n_keys, head_dim)
    # one after the other: memory of half the size more often comes from what was freed before
    keys, values = (half.view(-1, head_dim).index_select(0, index).view(shape) for half in buffer)
    return keys, values


def length_carrier(length: int) -> Tensor:
    """[1, length, length, 1] of zeros, in the memory of one number."""
    return _ZERO.expand(1, length, length, 1)


def _capacity(needed: int, before: int, text_max_length: int) -> int:
    """Columns for so many tokens: twice as many as before, and again, but not beyond text_max_length if that is enough."""
    room = max(before, rounded(1))
    while room < needed:
        room *= 2
    return text_max_length if needed <= text_max_length < room else room


def _grown(past: Past, length: int, text_max_length: int) -> Past:
    buffer, kept = past.buffer, past.prompt_len
    room = _capacity(length, buffer.shape[3], text_max_length)
    target, _ = moved(buffer, None, past.n_rows, slice(0), (length, room), 0)
    target[:, :: past.share, :, :kept] = buffer[:, :: past.share, :, :kept]
    target[:, :, :, kept : past.length] = buffer[:, :, :, kept : past.length]
    beam_idx = _first_beam_idx(target, past.n_prompts)
    beam_idx[: past.length] = past.beam_idx[: past.length]
    return past._replace(buffer=target, beam_idx=beam_idx)


def _first_beam_idx(buffer: Tensor, n_prompts: int) -> Tensor:
    """Rows that go on with themselves."""
    # users write to it, where inference tensors could not be any more
    with torch.inference_mode(False):
        return torch.arange(buffer.shape[1], device=buffer.device).repeat(buffer.shape[3] + _TRAILER, 1)
