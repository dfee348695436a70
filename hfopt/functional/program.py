"""A decoder as a flat program: the instructions of one decode step, over weights where they are and one scratch arena.

A `Builder` is told the operations in order; it lays out the scratch and writes a row of numbers for each (see
`kernels.step`). Nothing of a request is in a `Program`: threads share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import step as kernels

from .activation import CODES
from .checks import check_array, check_contiguous, check_floats
from .linear import LinearWeights
from .rotary import ROTATIONS

Index = Literal["tokens", "positions"]

_INDICES = {"tokens": kernels.TOKENS, "positions": kernels.POSITIONS}
_LINE = 64  # bytes of a cache line, on which slots begin


class Slot(NamedTuple):
    """Scratch for `size` values a row; place: bytes a row before it, or `kernels.LOGITS`."""

    place: int
    size: int
    n_bytes: int


class Table:
    """Contiguous [n, size] of which instructions look up rows. build(n): the table with at least n rows, if it can grow."""

    def __init__(self, rows: Tensor, build: Callable[[int], Tensor] | None = None) -> None:
        check_floats("rows", rows)
        check_contiguous("rows", rows)
        self.rows = rows
        self._build = build

    def reach(self, n: int) -> Tensor:
        """The table, with n rows if it can have them."""
        rows = self.rows
        if len(rows) < n and self._build is not None:
            rows = self.rows = self._build(n)
        return rows


class Instruction(NamedTuple):
    """A line of a program for people to read: the operation, its shapes, and the bytes of weights that it reads."""

    name: str
    shapes: str
    n_bytes: int


class Program(NamedTuple):
    """A decode step.

    code int64 [n, columns], scalars float64 [n]: see `kernels.step`. row_bytes: of the arena, for each row of a step.
    kept: what owns the addresses in the code.
    """

    dtype: torch.dtype
    code: np.ndarray
    scalars: np.ndarray
    tables: tuple[Table, ...]
    row_bytes: int
    n_layers: int
    n_kv_heads: int
    head_dim: int
    n_logits: int
    listing: tuple[Instruction, ...]
    kept: tuple[Any, ...]


class Builder:
    """Collects the instructions of a program for weights of one dtype, float32 or bfloat16; raises `InvalidInput` for
    operands that do not fit."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._code: list[np.ndarray] = []
        self._scalars: list[float] = []
        self._listing: list[Instruction] = []
        self._tables: list[Table] = []
        self._kept: list[Any] = []
        self._row_bytes = 0
        self._free: list[Slot] = []
        self._cached: set[tuple[int, int]] = set()

    def _slot(self, size: int, item_size: int = 0) -> Slot:
        n_bytes = -(-size * (item_size or self.dtype.itemsize) // _LINE) * _LINE
        fitting = next((each for each in self._free if each.n_bytes == n_bytes), None)
        if fitting is not None:
            self._free.remove(fitting)
            return fitting._replace(size=size)
        self._row_bytes += n_bytes
        return Slot(self._row_bytes - n_bytes, size, n_bytes)

    def release(self, *slots: Slot) -> None:
        """These slots are not read any more."""
        self._free += slots

    def _add(self, shapes: str, n_bytes: int, columns: dict[int, int], scalar: float = 0.0) -> None:
        row = np.full(kernels.COLUMNS, kernels.NONE, np.int64)
        row[list(columns)] = list(columns.values())
        self._code.append(row)
        self._scalars.append(scalar)
        self._listing.append(Instruction(kernels.NAMES[columns[kernels.OP]], shapes, n_bytes))

    # ---- what looks something up ------------------------------------------------------------------------------------

    def _table(self, table: Table) -> int:
        self._tables.append(table)
        return len(self._tables) - 1

    def look_up(self, table: Table, by: Index) -> Slot:
        """The table's row for each token or position."""
        size, item_size = table.rows.shape[1], table.rows.element_size()
        out = self._slot(size, item_size)
        columns = {
            kernels.OP: kernels.LOOK_UP,
            kernels.OUT: out.place,
            kernels.SIZE: size * item_size,
            kernels.TABLE: self._table(table),
            kernels.BY: _INDICES[by],
        }
        self._add(f"[{size}]", size * item_size, columns)
        return out

    def add_looked_up(self, table: Table, by: Index, x: Slot) -> None:
        """x plus such a row."""
        size = table.rows.shape[1]
        if table.rows.dtype is not self.dtype or size != x.size:
            raise InvalidInput(f"the table is {table.rows.dtype} [{size}]: {self.dtype} [{x.size}] is needed")
        columns = {
            kernels.OP: kernels.ADD_LOOKED_UP,
            kernels.OUT: x.place,
            kernels.SIZE: size,
            kernels.TABLE: self._table(table),
            kernels.BY: _INDICES[by],
        }
        self._add(f"[{size}]", size * self.dtype.itemsize, columns)

    # ---- arithmetic -------------------------------------------------------------------------------------------------

    def _vector(self, name: str, tensor: Tensor | None, size: int) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor)
        return check_array(name, tensor, (size,), self.dtype)

    def rms_norm(self, x: Slot, weight: Tensor, eps: float) -> Slot:
        """`functional.rms_norm`."""
        return self._norm(x, kernels.RMS_NORM, weight, None, eps)

    def layer_norm(self, x: Slot, weight: Tensor | None, bias: Tensor | None, eps: float) -> Slot:
        """`functional.layer_norm`."""
        return self._norm(x, kernels.LAYER_NORM, weight, bias, eps)

    def _norm(self, x: Slot, op: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Slot:
        out = self._slot(x.size)
        columns = {
            kernels.OP: op,
            kernels.IN: x.place,
            kernels.OUT: out.place,
            kernels.SIZE: x.size,
            kernels.WEIGHT: self._vector("weight", weight, x.size),
            kernels.BIAS: self._vector("bias", bias, x.size),
        }
        n_bytes = sum(each.nbytes for each in (weight, bias) if each is not None)
        self._add(f"[{x.size}]", n_bytes, columns, eps)
        return out

    def linear(
        self,
        x: Slot,
        weights: LinearWeights,
        *,
        activation: str | None = None,
        gated: bool = False,
        residuals: Sequence[Slot] = (),
        is_last: bool = False,
    ) -> Slot:
        """`functional.linear`; what the last one returns are the logits."""
        if weights.dtype is not self.dtype or weights.in_features != x.size:
            given = f"{weights.dtype} with {weights.in_features} features"
            raise InvalidInput(f"weights are {given}: {self.dtype} with {x.size} are needed")
        width = weights.out_features // (2 if gated else 1)
        if any(each.size != width for each in residuals) or len(residuals) > kernels.MOST_RESIDUALS:
            raise InvalidInput(f"residuals have sizes {[each.size for each in residuals]}: up to "
                               f"{kernels.MOST_RESIDUALS} of {width} are allowed")  # fmt: skip
        out = Slot(kernels.LOGITS, width, 0) if is_last else self._slot(width)
        self._kept.append(weights)
        columns = {
            kernels.OP: kernels.LINEAR,
            kernels.IN: x.place,
            kernels.OUT: out.place,
            kernels.SIZE: x.size,
            kernels.MATRICES: weights.table.ctypes.data,
            kernels.N_MATRICES: len(weights.table),
            kernels.WIDTH: width,
            kernels.GATED: int(gated),
            kernels.CODE: CODES[activation],
        } | {kernels.RESIDUALS + place: each.place for place, each in enumerate(residuals)}
        parts = [str(x.size), " + ".join(str(size) for size in weights.table[:, 2])]
        after = (
            [activation or ""] + ["gate × up"] * gated + [f"+ {len(residuals)} residuals"] * bool(residuals)
        )
        n_bytes = sum(each.nbytes for each in weights.tensors if each is not None)
        self._add(", ".join([" → ".join(parts), *filter(None, after)]), n_bytes, columns)
        return out

    def rotate_and_store(
        self,
        qkv: Slot,
        layer: int,
        heads: tuple[int, int, int],
        rotation: str,
        angles: tuple[Slot, Slot] | None,
    ) -> None:
        """`functional.rotate_and_store`; heads: of queries, of keys, channels of one; angles: slots of cos and sin."""
        self._check_heads(qkv, heads)
        columns = {
            kernels.OP: kernels.ROTATE_AND_STORE,
            kernels.IN: qkv.place,
            kernels.LAYER: layer,
            kernels.N_HEADS: heads[0],
            kernels.N_ROTARY: 0,
            kernels.KIND: ROTATIONS[rotation],
        }
        if angles is not None:
            n_rotary = angles[0].size * (2 if rotation == "interleaved" else 1)
            if angles[0].size != angles[1].size or n_rotary > heads[2] or n_rotary % 2:
                raise InvalidInput(
                    f"{angles[0].size} angles turn {n_rotary} channels: up to {heads[2]} are allowed"
                )
            columns |= {
                kernels.COS: angles[0].place,
                kernels.SIN: angles[1].place,
                kernels.N_ROTARY: n_rotary,
            }
        elif rotation != "none":
            raise InvalidInput(f"angles is None: rotation {rotation!r} needs it")
        self._add(f"layer {layer}, {heads[0]} / {heads[1]} heads of {heads[2]}", 0, columns)

    def attend(self, qkv: Slot, layer: int, heads: tuple[int, int, int], scale: float) -> Slot:
        """`functional.attend`."""
        self._check_heads(qkv, heads)
        self._cached.add(heads[1:])
        out = self._slot(heads[0] * heads[2])
        columns = {
            kernels.OP: kernels.ATTEND,
            kernels.IN: qkv.place,
            kernels.OUT: out.place,
            kernels.LAYER: layer,
            kernels.N_HEADS: heads[0],
        }
        self._add(f"layer {layer}, {heads[0]} / {heads[1]} heads of {heads[2]}", 0, columns, scale)
        return out

    def _check_heads(self, qkv: Slot, heads: tuple[int, int, int]) -> None:
        n_heads, n_kv_heads, head_dim = heads
        if qkv.size != (n_heads + 2 * n_kv_heads) * head_dim or n_heads % n_kv_heads:
            raise InvalidInput(
                f"qkv has {qkv.size} values: {n_heads} / {n_kv_heads} heads of {head_dim} do not fit"
            )

    # ---- the result -------------------------------------------------------------------------------------------------

    def program(self, n_layers: int, n_logits: int) -> Program:
        """What was collected. Raises `InvalidInput` if layers cache heads of different shapes."""
        if len(self._cached) != 1:
            raise InvalidInput(f"layers cache heads of shapes {sorted(self._cached)}: one is allowed")
        ((n_kv_heads, head_dim),) = self._cached
        return Program(
            dtype=self.dtype,
            code=np.stack(self._code),
            scalars=np.array(self._scalars),
            tables=tuple(self._tables),
            row_bytes=self._row_bytes,
            n_layers=n_layers,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            n_logits=n_logits,
            listing=tuple(self._listing),
            kept=tuple(self._kept),
        )
