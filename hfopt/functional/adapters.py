"""Rows that are multiplied by low-rank adapters of their own: what is checked, and the launches."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import lora as kernels

from .checks import ELEMENTS, address_of, check_floats, prepare_threads
from .integers import integers
from .output import apart, check_output, contiguous_output
from .scalars import finite, flag, integer


class Names(NamedTuple):
    """How the arguments are called in messages."""

    rows: str
    weights: str
    output: str


# ---- checks ------------------------------------------------------------------------------------------------------------


def check_indices(name: str, indices: np.ndarray, n_adapters: int) -> None:
    if indices.size and not (indices.min() >= -1 and indices.max() < n_adapters):
        wrong = indices[(indices < -1) | (indices >= n_adapters)][0]
        raise InvalidInput(
            f"{name} has {wrong}: -1 to {n_adapters - 1} is allowed, with {n_adapters} adapters"
        )


def _contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension is not contiguous."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def matrices(name: str, weights: Tensor) -> Tensor:
    """The weights as [adapters, rows, columns], rows contiguous."""
    check_floats(name, weights)
    if weights.ndim == 4 and weights.shape[1] == 1:
        weights = weights.squeeze(1)
    if weights.ndim != 3:
        given = tuple(weights.shape)
        raise InvalidInput(
            f"{name} has shape {given}: [adapters, rows, columns] is needed, or [adapters, 1, rows, columns]"
        )
    address_of(name, weights)
    return _contiguous_rows(weights)


def _check_rows(names: Names, rows: Tensor, width: int, output: Tensor, n_indices: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != width:
        raise InvalidInput(
            f"{names.rows} has shape {tuple(rows.shape)}: [rows, {width}] is needed with these {names.weights}"
        )
    address_of(names.rows, rows)
    if output.ndim != 2 or output.shape[0] != rows.shape[0]:
        raise InvalidInput(
            f"{names.output} has shape {tuple(output.shape)}: {rows.shape[0]} rows are needed, as many as {names.rows} has"
        )
    if n_indices != rows.shape[0]:
        raise InvalidInput(f"there are {n_indices} rows with an adapter: {names.rows} has {rows.shape[0]}")


def of_segments(
    called: Names,
    given_rows: Tensor,
    b_seq_start_loc: Tensor,
    seq_len_tensor: Tensor,
    lora_indices_tensor: Tensor,
    batches: int,
    max_seq_length: int,
    n_adapters: int,
) -> np.ndarray:
    """The adapter of each of the rows: that of the segment where it is, or -1."""
    check_floats(called.rows, given_rows)
    n_rows = given_rows.shape[0] if given_rows.ndim else 0
    names = "b_seq_start_loc", "seq_len_tensor", "lora_indices_tensor"
    given = b_seq_start_loc, seq_len_tensor, lora_indices_tensor
    found = [integers(name, each, (None,)) for name, each in zip(names, given, strict=True)]
    batches, max_seq_length = integer("batches", batches), integer("max_seq_length", max_seq_length)
    shortest = min(map(len, found))
    if not 0 <= batches <= shortest:
        raise InvalidInput(f"batches is {batches}: 0 to {shortest} is allowed with these {', '.join(names)}")
    starts, lengths, indices = (each[:batches] for each in found)
    check_indices(names[2], indices, n_adapters)
    if batches and not 0 <= lengths.min() <= lengths.max() <= max_seq_length:
        raise InvalidInput(
            f"{names[1]} has {lengths.min()} to {lengths.max()}: 0 to max_seq_length, {max_seq_length}, is allowed"
        )
    rows = np.full(n_rows, -1, np.int64)
    end = 0
    for i in np.argsort(starts, kind="stable"):
        start, length = int(starts[i]), int(lengths[i])
        if length == 0:
            continue
        if start < end or start + length > n_rows:
            raise InvalidInput(
                f"{names[0]} has {start} for {length} rows: {end} to {n_rows - length} is allowed, in {n_rows} rows of "
                "which each is in one segment"
            )
        end = start + length
        rows[start:end] = indices[i]
    return rows


# ---- products ----------------------------------------------------------------------------------------------------------


def shrink(
    names: Names, rows: Tensor, weights: Tensor, output: Tensor, indices: np.ndarray, scaling: float
) -> None:
    """See `bgmv_shrink`; weights from `matrices`, indices checked."""
    scaling = finite("scaling", scaling)
    _, rank, size = weights.shape
    check_floats(names.rows, rows, weights.dtype)
    check_output(names.output, output)
    _check_rows(names, rows, size, output, len(indices))
    if output.shape[1] < rank:
        raise InvalidInput(
            f"{names.output} has shape {tuple(output.shape)}: {rank} columns are needed, the rank of {names.weights}"
        )
    if rows.shape[0] == 0 or rank == 0:
        return
    rows, weights = apart(output, _contiguous_rows(rows), weights)
    prepare_threads()
    with contiguous_output(output, 1) as out:
        kernels.shrink_rows(
            ELEMENTS[weights.dtype],
            ELEMENTS[out.dtype],
            rows.data_ptr(),
            rows.stride(0),
            rows.shape[0],
            size,
            weights.data_ptr(),
            weights.stride(0),
            weights.stride(1),
            rank,
            indices,
            scaling,
            out.data_ptr(),
            out.stride(0),
        )


def expand(
    names: Names, rows: Tensor, weights: Tensor, output: Tensor, indices: np.ndarray, add: bool
) -> None:
    """See `bgmv_expand`; weights from `matrices`, indices checked."""
    add = flag("add_inputs", add)
    _, size, rank = weights.shape
    check_floats(names.rows, rows)
    check_output(names.output, output)
    _check_rows(names, rows, rank, output, len(indices))
    size = min(size, output.shape[1])
    if rows.shape[0] == 0 or size == 0:
        return
    rows, weights = apart(output, rows.to(torch.float32).contiguous(), weights)
    prepare_threads()
    with contiguous_output(output, 1) as out:
        kernels.expand_rows(
            ELEMENTS[weights.dtype],
            ELEMENTS[out.dtype],
            rows.data_ptr(),
            rank,
            rows.shape[0],
            size,
            weights.data_ptr(),
            weights.stride(0),
            weights.stride(1),
            rank,
            indices,
            add,
            out.data_ptr(),
            out.stride(0),
        )


def slice_of(names: Names, output: Tensor, weights: Tensor, offset: int, size: int) -> Tensor:
    """Columns of the output for as many outputs as the weights have."""
    size, offset = integer("slice_size", size), integer("slice_offset", offset)
    check_output(names.output, output)
    if output.ndim != 2:
        raise InvalidInput(f"{names.output} has shape {tuple(output.shape)}: [rows, columns] is needed")
    if size != weights.shape[1]:
        raise InvalidInput(
            f"slice_size is {size}: {weights.shape[1]} is needed, the outputs of {names.weights}"
        )
    if not 0 <= offset <= output.shape[1] - size:
        raise InvalidInput(
            f"slice_offset is {offset}: 0 to {output.shape[1] - size} is allowed, for {size} of {output.shape[1]} columns"
        )
    return output[:, offset : offset + size]
