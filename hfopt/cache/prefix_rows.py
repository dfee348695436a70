"""Columns of a cache as pieces of text: written into new rows, and read off them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfopt.cache.layer import IndirectLayer
from hfopt.cache.prefix_tree import Part, Parts
from hfopt.cache.storage import Segment, bits_of

if TYPE_CHECKING:
    from hfopt.cache.indirect import IndirectCache


_MANY_BYTES = 1 << 20  # that one thread copies more slowly than several


def _place(layer: IndirectLayer, row: int, column: int) -> tuple[Tensor, Tensor | None, int]:
    """Elements and scales of a row from which a column is read, and where in them it is."""
    n_prefix = layer.prefix_len
    if column < n_prefix:
        buffer, scales, row = layer.prefix, layer.prefix_scales, int(layer.rows.prefix_row[row])
        column -= layer.starts[0]
    else:
        column -= n_prefix
        buffer, scales, row = layer.suffix, layer.suffix_scales, int(layer.rows.table[row, column])
        column -= layer.starts[1]
    assert buffer is not None
    return buffer[:, row], None if scales is None else scales[:, row], column


def held(cache: IndirectCache, row: int, first: int, end: int) -> Parts:
    """Keys and values that a row has in the columns [first, end), as they are stored; no copy.

    All of prefix or of suffix, in a row that has kept to itself since, and not left behind by a window.
    """
    parts: Parts = []
    for layer in cache.layers:
        elements, scales, place = _place(layer, row, first)
        columns = slice(place, place + end - first)
        parts.append((elements[:, :, columns], None if scales is None else scales[:, :, columns]))
    return parts


def put(cache: IndirectCache, row: int, first: int, parts: Parts) -> None:
    """Write what `held` has given, of the same layout, into the columns of a row from `first` on."""
    for layer, given in zip(cache.layers, parts, strict=True):
        elements, scales, place = _place(layer, row, first)
        columns = slice(place, place + given[0].shape[2])
        if given[0].nbytes < _MANY_BYTES:
            # by numpy: torch would wake its threads for each of many small pieces
            bits_of(elements[:, :, columns]).numpy()[...] = bits_of(given[0]).numpy()
        else:
            elements[:, :, columns] = given[0]
        if scales is not None and given[1] is not None:
            scales[:, :, columns] = given[1]


def buffers_of(parts: Parts) -> list[Segment] | None:
    """The buffers of one row, in place, whose first columns these tokens are, and those of scales; None unless all are."""
    buffers: list[Segment] = []
    for part in parts:
        elements, scales = (None if each is None else _buffer_of(each) for each in part)
        if elements is None or (
            part[1] is not None and (scales is None or scales.shape != elements.shape[:4])
        ):
            return None
        buffers.append((elements, scales))
    return buffers


def _buffer_of(part: Tensor) -> Tensor | None:
    """Contiguous [2, 1, n_kv_heads, columns, ...] that begins as [2, n_kv_heads, n_tokens, ...] does, in the same memory."""
    n_heads, n_tokens, *channels = part.shape[1:]
    head = part.stride(1)
    columns = head // math.prod(channels)
    strides = n_heads * head, head, *channels, 1
    held = part.untyped_storage().nbytes() // part.element_size() - part.storage_offset()
    is_whole = n_tokens <= columns and 2 * n_heads * columns * math.prod(channels) <= held
    if not is_whole or part.stride() != strides or columns * math.prod(channels) != head:
        return None
    return part.as_strided((2, 1, n_heads, columns, *channels), (strides[0], *strides))


def blank(cache: IndirectCache, row: int, first: int, end: int) -> None:
    """Write zeros into the columns [first, end) of a row, which no token is to see."""
    for elements, scales in held(cache, row, first, end):
        bits_of(elements).numpy()[...] = 0
        if scales is not None:
            scales.numpy()[...] = 0


def layouts_of(parts: Parts, dtype: torch.dtype) -> list[tuple[int, int, torch.dtype]]:
    """What `IndirectCache.append_everywhere` calls the layouts of layers with these parts; dtype: of floats."""

    def layout(part: Part) -> tuple[int, int, torch.dtype]:
        return part[0].shape[1], part[0].shape[3], dtype

    return [layout(part) for part in parts]
