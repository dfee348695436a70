"""What low-rank adapters add to linear layers: which matrices each row has, as tables that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import deltas as kernels
from hfopt.kernels import gated as gated_kernels
from hfopt.kernels.simd.types import LANES

from .activation import CODES
from .checks import (
    ELEMENTS,
    address_of,
    check_array,
    check_contiguous,
    check_floats,
    check_rows,
    prepare_threads,
)
from .linear import Rows, width_of

_NO_RESIDUALS = np.empty(0, np.int64)
NO_DELTAS = np.zeros(len(kernels.Deltas._fields), np.int64)


@dataclass(frozen=True)
class Delta:
    """scaling B A of one matrix, [n_outputs, n_inputs]; A [rank, n_inputs] and B [n_outputs, rank] in place, by address.

    is_wide: they are float32 beside activations of 16 bits. part: number of the matrix among those of a linear layer.
    """

    a: int
    b: int
    rank: int
    n_inputs: int
    n_outputs: int
    is_wide: bool
    scaling: float
    part: int
    kept: tuple[Any, ...] = field(compare=False, repr=False)  # the memory

    @classmethod
    def of(cls, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype, part: int = 0) -> Delta:
        """Raises `InvalidInput` unless A and B are contiguous CPU tensors that fit, of `dtype` or float32, both the same."""
        for name, each in (("a", a), ("b", b)):
            check_floats(name, each, a.dtype)
            if each.ndim != 2:
                raise InvalidInput(f"{name} has shape {tuple(each.shape)}: a matrix is needed")
            check_contiguous(name, each)
        if b.shape[1] != a.shape[0]:
            raise InvalidInput(f"b has shape {tuple(b.shape)}: [outputs, {a.shape[0]}] is needed for this a")
        if a.dtype not in (dtype, torch.float32):
            raise InvalidInput(f"a has dtype {a.dtype}: {dtype} or torch.float32 is needed")
        return cls(
            address_of("a", a),
            address_of("b", b),
            a.shape[0],
            a.shape[1],
            b.shape[0],
            a.dtype is not dtype,
            float(scaling),
            part,
            (a.untyped_storage(), b.untyped_storage()),
        )


def pieces_of(sizes: Sequence[int], rows: Rows = ()) -> np.ndarray:
    """Where the outputs of matrices of these sizes lie side by side, int64 [n, PIECE_FIELDS]; rows: see `LinearWeights`."""
    parts = [(0, first, n) for first, n in rows] or [(part, 0, n) for part, n in enumerate(sizes)]
    ends = np.cumsum([0, *(n for *_, n in parts)])
    pieces = [(column, n, part, first) for column, (part, first, n) in zip(ends[:-1], parts, strict=True)]
    return np.array(pieces, np.int64).reshape(-1, kernels.PIECE_FIELDS)


class DeltaTables:
    """The adapters of the rows of a request, in each of several linear layers ("places").

    rows: of each place, of each row, what is added. ranges, terms: see `kernels.deltas`. room_row: float32 of room that a
    token needs. kept: what owns the addresses.
    """

    def __init__(self, places: Sequence[Sequence[Sequence[Delta]]], n_rows: int) -> None:
        self.ranges = np.zeros((len(places), n_rows, 2), np.int64)
        self.room_row, self.kept, terms = 0, [], []  # type: ignore[var-annotated]
        for place, rows in enumerate(places):
            known: dict[tuple[Delta, ...], tuple[int, int]] = {}
            for row, deltas in enumerate(rows):
                key = tuple(deltas)
                if key not in known:
                    known[key] = len(terms), len(key)
                    used = 0
                    for each in key:
                        scale = int(np.float32(each.scaling).view(np.int32))
                        term = kernels.Term(each.a, each.b, each.rank, each.is_wide, scale, each.part, used)
                        terms.append(term)
                        self.kept += each.kept
                        used += -(-each.rank // LANES) * LANES
                    self.room_row = max(self.room_row, used)
                self.ranges[place, row] = known[key]
        self.terms = np.array(terms, np.int64).reshape(-1, kernels.TERM_FIELDS)


def check_deltas(deltas: Sequence[Delta], n_inputs: int, sizes: Sequence[int]) -> None:
    """Raises `InvalidInput` unless they are of matrices of these sizes."""
    for each in deltas:
        if not 0 <= each.part < len(sizes) or (each.n_inputs, each.n_outputs) != (n_inputs, sizes[each.part]):
            given = f"[{each.n_outputs}, {each.n_inputs}] for matrix {each.part}"
            raise InvalidInput(
                f"an adapter is {given}: {list(sizes)} outputs of {n_inputs} inputs are needed"
            )


def add_deltas(
    x: Tensor,
    out: Tensor,
    rows: Sequence[Sequence[Delta]],
    pieces: np.ndarray,
    residuals: Sequence[Tensor] = (),
) -> None:
    """out += scaling B A x of the adapters of each row, + residuals; rounded once.

    x [rows, ..., n_inputs], contiguous, out and residuals [rows, ..., width]. rows: of each row, its adapters, which have
    been checked. pieces: of the columns of out. Raises `InvalidInput`.
    """
    x, x_at = check_rows("x", x, out.dtype)
    address = check_array("out", out, (*x.shape[:-1], out.shape[-1]), x.dtype)
    addresses = _NO_RESIDUALS
    if residuals:
        given = [check_array("residual", each, tuple(out.shape), x.dtype) for each in residuals]
        addresses = np.array(given, np.int64)
    n = out.numel() // max(out.shape[-1], 1)
    if n % max(len(rows), 1):
        raise InvalidInput(f"rows has {len(rows)} entries: {n} tokens of so many rows are needed")
    if n == 0:
        return
    tables = DeltaTables([rows], len(rows))
    room = np.empty((n, tables.room_row), np.float32)
    is_wide = any(each.is_wide for row in rows for each in row)
    wide = np.empty(x.numel() if is_wide else 0, np.float32)
    prepare_threads()
    kernels.add_deltas(
        ELEMENTS[x.dtype],
        x_at,
        n,
        len(rows),
        x.shape[-1],
        tables.ranges[0],
        tables.terms,
        room.ctypes.data,
        tables.room_row,
        wide.ctypes.data,
        pieces,
        addresses,
        address,
        out.shape[-1],
    )


def activate(x: Tensor, activation: str | None, *, gated: bool = False) -> Tensor:
    """act(x); or, gated, act(first half of x) * second half, of the last dimension; in float32, rounded once.

    x [..., size], the last dimension contiguous. activation: None or a key of `ACTIVATIONS`. Raises `InvalidInput`.
    """
    x, address = check_rows("x", x)
    if activation not in CODES:
        raise InvalidInput(
            f"activation is {activation!r}: None or one of {sorted(k for k in CODES if k)} is allowed"
        )
    half = x.shape[-1] // 2
    size = width_of([half, x.shape[-1] - half], gated)
    out = x.new_empty(*x.shape[:-1], size)
    if out.numel():
        prepare_threads()
        code = CODES[activation]
        if gated:
            second = address + size * x.element_size()
            steps = address, 2 * size, second, 2 * size, out.data_ptr(), size
            gated_kernels.gated_product(ELEMENTS[x.dtype], code, *steps, out.numel() // size, size)
        else:
            gated_kernels.activated(ELEMENTS[x.dtype], code, address, out.numel(), out.data_ptr())
    return out
