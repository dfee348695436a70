"""A decoder as a flat program: the instructions for new tokens, over weights where they are and one scratch arena.

A `Builder` is told the operations in order; it lays out the scratch and writes a row of numbers for each (see
`kernels.step`). Nothing of a request is in a `Program`: threads share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import step as kernels

from .activation import CODES
from .checks import check_array, check_contiguous, check_floats
from .linear import LinearWeights, Weights, width_of
from .listing import Instruction, Listing
from .mixed import MixedWeights
from .quantized import QuantizedWeights
from .rotary import ROTATIONS

Index = Literal["tokens", "positions"]

_INDICES = {"tokens": kernels.TOKENS, "positions": kernels.POSITIONS}
LINE = 64  # bytes of a cache line, on which slots begin
_LINEARS = frozenset({kernels.LINEAR, kernels.QUANTIZED_LINEAR, kernels.DEQUANTIZED_LINEAR})
_QUANTIZED = {"int8": kernels.QUANTIZED_LINEAR, "float": kernels.DEQUANTIZED_LINEAR}
_NO_FORMAT = (0,) * kernels.FORMAT_COLUMNS


class Slot(NamedTuple):
    """Scratch for `size` values a row; place: bytes a row before it, or `kernels.LOGITS`."""

    place: int
    size: int
    n_bytes: int
    dtype: torch.dtype


class Table:
    """Contiguous [n, size] of which instructions look up rows. build(n): the table with at least n rows, if it can grow."""

    def __init__(self, rows: Tensor, build: Callable[[int], Tensor] | None = None) -> None:
        _check_rows(rows)
        self.rows = rows
        self._build = build

    @property
    def grows(self) -> bool:
        """Whether it can have more rows."""
        return self._build is not None

    def reach(self, n: int) -> Tensor:
        """The table, with n rows if it can have them."""
        rows = self.rows
        if len(rows) < n and self._build is not None:
            known, rows = rows, self._build(n)
            _check_rows(rows)
            if rows.dtype is not known.dtype or rows.shape[1] != known.shape[1]:
                given, needed = f"{rows.dtype} [{rows.shape[1]}]", f"{known.dtype} [{known.shape[1]}]"
                raise InvalidInput(f"a table has become {given}: {needed} is needed")
            self.rows = rows
        return rows


def _check_rows(rows: Tensor) -> None:
    check_floats("rows", rows)
    check_contiguous("rows", rows)
    if rows.ndim != 2:
        raise InvalidInput(f"rows has shape {tuple(rows.shape)}: [n, size] is needed")


class Program(NamedTuple):
    """The way of new tokens through a decoder.

    code int64 [n, columns], formats int64 [n or 0, columns], scalars float64 [n]: see `kernels.step`. row_bytes: of the
    arena, for each new token. kept: what owns the addresses in the code.
    """

    dtype: torch.dtype
    code: np.ndarray
    formats: np.ndarray
    scalars: np.ndarray
    tables: tuple[Table, ...]
    row_bytes: int
    n_layers: int
    n_kv_heads: int
    head_dim: int
    n_logits: int
    listing: Listing
    kept: tuple[Weights | Tensor, ...]
    linears: frozenset[int]  # operations of linear layers that there are

    @property
    def is_quantized(self) -> bool:
        """Whether it has quantised layers that quantise their inputs too."""
        return kernels.QUANTIZED_LINEAR in self.linears

    @property
    def is_dequantized(self) -> bool:
        """Whether it has quantised layers that do not."""
        return kernels.DEQUANTIZED_LINEAR in self.linears

    @property
    def has_floats(self) -> bool:
        """Whether it has linear layers that are not quantised."""
        return kernels.LINEAR in self.linears

    def tensors(self) -> Iterator[Tensor]:
        """Those that the code has addresses of."""
        for each in self.kept:
            for tensor in (each,) if isinstance(each, Tensor) else each.tensors:
                if tensor is not None:
                    yield tensor


def _linear_of(weights: LinearWeights | QuantizedWeights) -> tuple[int, Sequence[int], str]:
    """(operation, row of formats, what to add to the shapes)."""
    if isinstance(weights, LinearWeights):
        return kernels.LINEAR, _NO_FORMAT, ""
    levels = 0 if weights.levels is None else weights.levels.data_ptr()
    format = (weights.scaling.ctypes.data, weights.bits, weights.group, levels)
    return _QUANTIZED[weights.compute], format, f", {weights.bits} bits"


class Builder:
    """Collects the instructions of a program for weights of one dtype, float32 or bfloat16; raises `InvalidInput` for
    operands that do not fit.

    layer: the one that the next instructions belong to, for the listing.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.layer: int | None = None
        self._code: list[np.ndarray] = []
        self._scalars: list[float] = []
        self._listing: list[Instruction] = []
        self._tables: list[Table] = []
        self._formats: list[list[int]] = []
        self._kept: list[Weights | Tensor] = []
        self._row_bytes = 0
        self._free: list[Slot] = []
        self._cached: set[tuple[int, int]] = set()
        self._stored: list[int] = []  # layers, in the order of the instructions
        self._attended: list[int] = []
        self._n_logits: int | None = None

    def _slot(self, size: int, dtype: torch.dtype) -> Slot:
        n_bytes = -(-size * dtype.itemsize // LINE) * LINE
        fitting = next((each for each in self._free if each.n_bytes == n_bytes), None)
        if fitting is not None:
            self._free.remove(fitting)
            return fitting._replace(size=size, dtype=dtype)
        self._row_bytes += n_bytes
        return Slot(self._row_bytes - n_bytes, size, n_bytes, dtype)

    def release(self, *slots: Slot) -> None:
        """These slots are not read any more."""
        self._free += slots

    def _check(self, slot: Slot, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or self.dtype
        if slot.place < 0 or slot.dtype is not dtype:
            raise InvalidInput(f"an operand is {slot.dtype} [{slot.size}]: {dtype} in scratch is needed")

    def _add(
        self,
        shapes: str,
        columns: dict[int, int],
        reads: Sequence[Slot],
        out: Slot,
        *,
        scalar: float = 0.0,
        format: Sequence[int] = _NO_FORMAT,
        then: str = "",
        **n_bytes: int,
    ) -> None:
        row = np.full(kernels.COLUMNS, kernels.NONE, np.int64)
        row[list(columns)] = list(columns.values())
        self._code.append(row)
        self._scalars.append(scalar)
        self._formats.append(list(format))
        self._listing.append(
            Instruction(
                name=kernels.NAMES[columns[kernels.OP]],
                layer=self.layer,
                shapes=shapes,
                then=then,
                reads=tuple(each.place for each in reads),
                writes=None if out.place == kernels.LOGITS else out.place,
                **n_bytes,
            )
        )

    # ---- what looks something up ------------------------------------------------------------------------------------

    def _table(self, table: Table) -> int:
        self._tables.append(table)
        return len(self._tables) - 1

    def look_up(self, table: Table, by: Index) -> Slot:
        """The table's row for each token or position."""
        size, item_size = table.rows.shape[1], table.rows.element_size()
        out = self._slot(size, table.rows.dtype)
        columns = {
            kernels.OP: kernels.LOOK_UP,
            kernels.OUT: out.place,
            kernels.SIZE: size * item_size,
            kernels.TABLE: self._table(table),
            kernels.BY: _INDICES[by],
        }
        self._add(f"[{size}]", columns, (), out, row_bytes=size * item_size)
        return out

    def add_looked_up(self, table: Table, by: Index, x: Slot) -> None:
        """x plus such a row."""
        size = table.rows.shape[1]
        self._check(x)
        if table.rows.dtype is not self.dtype or size != x.size:
            raise InvalidInput(f"the table is {table.rows.dtype} [{size}]: {self.dtype} [{x.size}] is needed")
        columns = {
            kernels.OP: kernels.ADD_LOOKED_UP,
            kernels.OUT: x.place,
            kernels.SIZE: size,
            kernels.TABLE: self._table(table),
            kernels.BY: _INDICES[by],
        }
        self._add(f"[{size}]", columns, (x,), x, row_bytes=size * self.dtype.itemsize)

    # ---- arithmetic -------------------------------------------------------------------------------------------------

    def _vector(self, name: str, tensor: Tensor | None, size: int) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor)
        return check_array(name, tensor, (size,), self.dtype)

    def rms_norm(self, x: Slot, weight: Tensor, eps: float) -> Slot:
        """`functional.rms_norm`."""
        if weight is None:  # as a LayerNorm may have
            raise InvalidInput("weight is None: a torch.Tensor is needed")
        return self._norm(x, kernels.RMS_NORM, weight, None, eps)

    def layer_norm(self, x: Slot, weight: Tensor | None, bias: Tensor | None, eps: float) -> Slot:
        """`functional.layer_norm`."""
        return self._norm(x, kernels.LAYER_NORM, weight, bias, eps)

    def _norm(self, x: Slot, op: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Slot:
        self._check(x)
        out = self._slot(x.size, self.dtype)
        columns = {
            kernels.OP: op,
            kernels.IN: x.place,
            kernels.OUT: out.place,
            kernels.SIZE: x.size,
            kernels.WEIGHT: self._vector("weight", weight, x.size),
            kernels.BIAS: self._vector("bias", bias, x.size),
        }
        n_bytes = sum(each.nbytes for each in (weight, bias) if each is not None)
        self._add(f"[{x.size}]", columns, (x,), out, scalar=eps, n_bytes=n_bytes)
        return out

    def linear(
        self,
        x: Slot,
        weights: Weights,
        *,
        activation: str | None = None,
        gated: bool = False,
        residuals: Sequence[Slot] = (),
        is_last: bool = False,
    ) -> Slot:
        """`functional.linear`; what the last one returns are the logits, of the last new token of each row alone."""
        if weights.dtype not in (None, self.dtype) or weights.in_features != x.size:
            given = f"{weights.dtype} with {weights.in_features} features"
            raise InvalidInput(f"weights are {given}: {self.dtype} with {x.size} are needed")
        if activation not in CODES:
            raise InvalidInput(f"activation is {activation!r}: the kernels have none of this name")
        width = width_of(weights.sizes, gated)
        most = 0 if isinstance(weights, MixedWeights) else kernels.MOST_RESIDUALS
        if any(each.size != width for each in residuals) or len(residuals) > most:
            raise InvalidInput(f"residuals have sizes {[each.size for each in residuals]}: up to {most} of {width} "
                               "are allowed")  # fmt: skip
        for each in (x, *residuals):
            self._check(each)
        if is_last:
            if residuals:
                raise InvalidInput(f"residuals are {len(residuals)}: the last linear has none")
            self._take_last(x)
            out, self._n_logits = Slot(kernels.LOGITS, width, 0, self.dtype), width
        else:
            out = self._slot(width, self.dtype)
        if isinstance(weights, LinearWeights | QuantizedWeights):
            self._linear(x, weights, activation, gated, residuals, out)
        elif isinstance(weights, MixedWeights):
            self._linears(x, weights, activation, gated, out)
        return out

    def _linears(
        self, x: Slot, weights: MixedWeights, activation: str | None, gated: bool, out: Slot
    ) -> None:
        """An instruction for each part; with `gated` the product of two behind them."""
        if not gated:
            for part in weights.side_by_side():
                self._linear(x, part, activation, False, (), out)
            return
        gate, up = weights.parts
        factor = self._slot(out.size, self.dtype)
        self._linear(x, gate, activation, False, (), out)
        self._linear(x, up, None, False, (), factor)
        self._multiply(factor, out)
        self.release(factor)

    def _linear(
        self,
        x: Slot,
        weights: LinearWeights | QuantizedWeights,
        activation: str | None,
        gated: bool,
        residuals: Sequence[Slot],
        out: Slot,
    ) -> None:
        """The instruction for matrices of one format, behind one that brings x into their order."""
        order = weights.order if isinstance(weights, QuantizedWeights) else None
        if order is not None:
            x = self._permute(x, order)
        op, format, note = _linear_of(weights)
        self._kept.append(weights)
        columns = {
            kernels.OP: op,
            kernels.IN: x.place,
            kernels.OUT: out.place,
            kernels.SIZE: x.size,
            kernels.MATRICES: weights.table.ctypes.data,
            kernels.N_MATRICES: len(weights.table),
            kernels.WIDTH: out.size,
            kernels.GATED: int(gated),
            kernels.CODE: CODES[activation],
        } | {kernels.RESIDUALS + place: each.place for place, each in enumerate(residuals)}
        shapes = f"{x.size} → {' + '.join(str(size) for size in weights.sizes)}{note}"
        several = "s" if len(residuals) > 1 else ""
        then = [
            *([activation] if activation else []),
            *(["gate × up"] if gated else []),
            *([f"+ {len(residuals)} residual{several}"] if residuals else []),
        ]
        n_bytes = sum(each.nbytes for each in weights.tensors if each is not None)
        self._add(shapes, columns, (x, *residuals), out, format=format, then=", ".join(then), n_bytes=n_bytes)
        if order is not None:
            self.release(x)

    def _permute(self, x: Slot, order: Tensor) -> Slot:
        """x[order], in each row."""
        ends = order.aminmax()
        if ends.min < 0 or ends.max >= x.size:
            raise InvalidInput(f"order is from {int(ends.min)} to {int(ends.max)}: below {x.size} is needed")
        # of its own: nobody can write numbers into it that nobody has looked at
        places = order.long()
        self._kept.append(places)
        out = self._slot(x.size, self.dtype)
        columns = {
            kernels.OP: kernels.PERMUTE,
            kernels.IN: x.place,
            kernels.OUT: out.place,
            kernels.SIZE: x.size,
            kernels.ORDER: places.data_ptr(),
        }
        self._add(f"[{x.size}]", columns, (x,), out, n_bytes=places.nbytes)
        return out

    def _multiply(self, x: Slot, out: Slot) -> None:
        """out *= x."""
        columns = {
            kernels.OP: kernels.MULTIPLY,
            kernels.IN: x.place,
            kernels.OUT: out.place,
            kernels.SIZE: x.size,
        }
        self._add(f"[{x.size}]", columns, (x, out), out)

    def _take_last(self, x: Slot) -> None:
        """Only the last token of each row goes on."""
        n_bytes = x.size * self.dtype.itemsize
        columns = {
            kernels.OP: kernels.TAKE_LAST,
            kernels.IN: x.place,
            kernels.OUT: x.place,
            kernels.SIZE: n_bytes,
        }
        self._add(f"[{x.size}]", columns, (x,), x)

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
        if rotation not in ROTATIONS or (rotation == "none" and angles is not None):
            raise InvalidInput(
                f"rotation is {rotation!r}: {', '.join(ROTATIONS)} are allowed, angles but for none"
            )
        self._stored.append(layer)
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
            for each in angles:
                self._check(each, torch.float32)
            columns |= {
                kernels.COS: angles[0].place,
                kernels.SIN: angles[1].place,
                kernels.N_ROTARY: n_rotary,
            }
        elif rotation != "none":
            raise InvalidInput(f"angles is None: rotation {rotation!r} needs it")
        shapes = f"{heads[0]} / {heads[1]} heads of {heads[2]}"
        self._add(shapes, columns, (qkv, *(angles or ())), qkv)

    def attend(self, qkv: Slot, layer: int, heads: tuple[int, int, int], scale: float) -> Slot:
        """`functional.attend`."""
        self._check_heads(qkv, heads)
        self._cached.add(heads[1:])
        self._attended.append(layer)
        out = self._slot(heads[0] * heads[2], self.dtype)
        columns = {
            kernels.OP: kernels.ATTEND,
            kernels.IN: qkv.place,
            kernels.OUT: out.place,
            kernels.LAYER: layer,
            kernels.N_HEADS: heads[0],
        }
        shapes = f"{heads[0]} / {heads[1]} heads of {heads[2]}"
        token_bytes = 2 * heads[1] * heads[2] * self.dtype.itemsize
        self._add(shapes, columns, (qkv,), out, scalar=scale, token_bytes=token_bytes)
        return out

    def _check_heads(self, qkv: Slot, heads: tuple[int, int, int]) -> None:
        n_heads, n_kv_heads, head_dim = heads
        self._check(qkv)
        fits = qkv.size == (n_heads + 2 * n_kv_heads) * head_dim and min(heads) > 0
        if not fits or n_heads % n_kv_heads:
            raise InvalidInput(
                f"qkv has {qkv.size} values: {n_heads} / {n_kv_heads} heads of {head_dim} do not fit"
            )

    # ---- the result -------------------------------------------------------------------------------------------------

    def program(self, n_layers: int, n_logits: int) -> Program:
        """What was collected. Raises `InvalidInput` if layers cache heads of different shapes, or not each of them once."""
        if len(self._cached) != 1:
            raise InvalidInput(f"layers cache heads of shapes {sorted(self._cached)}: one is allowed")
        if self._stored != self._attended or sorted(self._stored) != list(range(n_layers)):
            raise InvalidInput(f"layers {self._attended} are cached: each of {n_layers} is needed once")
        if self._n_logits is not None and self._code[-1][kernels.OUT] != kernels.LOGITS:
            raise InvalidInput(f"{self._listing[-1].name} follows the last linear: nothing may")
        if self._n_logits != n_logits:
            raise InvalidInput(f"n_logits is {n_logits}: the last linear has {self._n_logits}")
        ((n_kv_heads, head_dim),) = self._cached
        linears = _LINEARS & {int(row[kernels.OP]) for row in self._code}
        formats = np.array(self._formats, np.int64)
        return Program(
            dtype=self.dtype,
            code=np.stack(self._code),
            formats=formats if linears - {kernels.LINEAR} else formats[:0],
            scalars=np.array(self._scalars),
            tables=tuple(self._tables),
            row_bytes=self._row_bytes,
            n_layers=n_layers,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            n_logits=n_logits,
            listing=Listing(
                instructions=tuple(self._listing),
                n_bytes=sum(each.bytes_read(1, 0) for each in self._listing),
                scratch_bytes=self._row_bytes,
                cached_bytes=sum(each.token_bytes for each in self._listing),
            ),
            kept=tuple(self._kept),
            linears=linears,
        )
