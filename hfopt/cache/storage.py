"""Memory of keys and values: made, grown and written to, as floats or as codes with scales."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from hfopt.cache.codes import quantised
from hfopt.cache.row_map import rounded
from hfopt.errors import CacheFull
from hfopt.machine.memory import advise_huge_pages, available_memory

Layout: TypeAlias = tuple[int, int, torch.dtype]  # (n_kv_heads, head_dim, dtype)
# elements [2, n_rows, n_kv_heads, columns, head_dim], keys then values; of codes their scales, float32 without head_dim
Segment: TypeAlias = tuple[Tensor, Tensor | None]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # those with a numpy view
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
_UNCHECKED_BYTES = 1 << 26  # growth that is too small to ask the system about


def layout_of(keys: Tensor, values: Tensor) -> Layout | None:
    """The layout of keys and values that a segment can hold, else None."""
    if (
        keys.shape != values.shape
        or keys.dtype != values.dtype
        or keys.dtype not in DTYPES
        or keys.device.type != "cpu"
        or values.device.type != "cpu"
        or type(keys) is not Tensor
        or type(values) is not Tensor
    ):
        return None
    return keys.shape[1], keys.shape[3], keys.dtype


def no_columns(n_rows: int, layout: Layout, kv_cache: str | None) -> Segment:
    """A segment without columns."""
    n_kv_heads, head_dim, dtype = layout
    shape = 2, n_rows, n_kv_heads, 0
    if kv_cache is None:
        return empty((*shape, head_dim), dtype), None
    return empty((*shape, head_dim), torch.int8), empty(shape, torch.float32)


def grown(elements: Tensor, scales: Tensor | None, n_rows: int, length: int, n_following: int) -> Segment:
    """A segment with more rows or columns and the same content. n_following: layers that will grow by as much.

    Raises `CacheFull` if they need more memory than there is.
    """
    old_columns = elements.shape[3]
    least = max(rounded(length), old_columns)
    wanted = max(least, rounded(old_columns * 3 // 2)) if length > old_columns else old_columns
    return moved(elements, scales, n_rows, slice(old_columns), (least, wanted), n_following)


def moved(
    elements: Tensor,
    scales: Tensor | None,
    n_rows: int,
    kept: slice,
    n_columns: tuple[int, int],
    n_following: int,
) -> Segment:
    """A segment that begins with the columns `kept` of another, and has as many rows, or more.

    n_columns: at least, and if there is memory. Raises as `grown`. What was read of the other stays as it is.
    """
    _, old_rows, n_kv_heads, _, head_dim = elements.shape
    n_rows = max(n_rows, old_rows)
    least, most = n_columns
    vector_bytes = head_dim * elements.element_size() + (0 if scales is None else scales.element_size())
    column_bytes = 2 * n_rows * n_kv_heads * vector_bytes
    old_bytes = elements.nbytes + (0 if scales is None else scales.nbytes)

    def needed(n_columns: int) -> int:
        added = n_columns * column_bytes - old_bytes
        return n_columns * column_bytes + n_following * added

    columns = most
    if needed(columns) > _UNCHECKED_BYTES and needed(columns) > (available := available_memory()):
        columns = least
        if needed(columns) > available:
            raise CacheFull(
                f"keys and values of {least:,} tokens in {n_rows:,} rows need "
                f"{needed(columns):,} bytes more; {available:,} bytes are available"
            )

    def copied(part: Tensor) -> Tensor:
        target, source = (
            empty((2, n_rows, n_kv_heads, columns, *part.shape[4:]), part.dtype),
            part[:, :, :, kept],
        )
        target[:, :old_rows, :, : source.shape[3]] = source
        return target

    return copied(elements), None if scales is None else copied(scales)


def write(elements: Tensor, scales: Tensor | None, n_rows: int, first: int, stored: Tensor) -> None:
    """Put keys and values [2, n_rows, n_kv_heads, n_new, head_dim] into the columns from `first` on."""
    columns = slice(first, first + stored.shape[3])
    if scales is None:
        elements[:, :n_rows, :, columns] = stored
    else:
        elements[:, :n_rows, :, columns], scales[:, :n_rows, :, columns] = quantised(stored)


def bits_of(tensor: Tensor) -> Tensor:
    """The same memory, bfloat16 as uint16 and float16 as int16: as kernels know them."""
    kind = _BITS.get(tensor.dtype)
    return tensor if kind is None else tensor.view(kind)


def bits(part: Tensor | None) -> Any:
    """The part as numpy sees it, in the form of `bits_of`."""
    return None if part is None else bits_of(part).numpy()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for keys and values, which may be written to at any time."""
    # An inference tensor could not be written to any more after the caller has left `torch.inference_mode`.
    with torch.inference_mode(False):
        buffer = torch.empty(shape, dtype=dtype, device="cpu")
    if not torch.compiler.is_compiling():  # a traced buffer has no address yet
        advise_huge_pages(buffer.data_ptr(), buffer.nbytes)
    return buffer
