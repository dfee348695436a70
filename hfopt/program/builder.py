"""The making of a program: a `Builder` is told the operations of a decoder in order."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.functional.checks import check_array
from hfopt.functional.rotary import ROTATIONS
from hfopt.kernels import step as kernels
from hfopt.kernels.instruction import LOGITS, NONE, OP, OUT, Instruction

from .linear_writer import LinearWriter
from .listing import Listing
from .program import Program, Table
from .writer import Slot

Index = Literal["tokens", "positions"]

_INDICES = {"tokens": kernels.TOKENS, "positions": kernels.POSITIONS}
_LINEARS = frozenset({kernels.LINEAR, kernels.QUANTIZED_LINEAR})


class Builder(LinearWriter):
    """Collects the instructions of a program for weights of one dtype, float32 or bfloat16; raises `InvalidInput` for
    operands that do not fit.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._tables: list[Table] = []
        self._cached: set[tuple[int, int]] = set()
        self._stored: list[int] = []  # layers, in the order of the instructions
        self._attended: list[int] = []

    # ---- what looks something up ------------------------------------------------------------------------------------

    def _table(self, table: Table) -> int:
        self._tables.append(table)
        return len(self._tables) - 1

    def look_up(self, table: Table, by: Index) -> Slot:
        """The table's row for each token or position."""
        size, item_size = table.rows.shape[1], table.rows.element_size()
        out = self._slot(size, table.rows.dtype)
        columns = {
            "OUT": out.place,
            "SIZE": size * item_size,
            "table": self._table(table),
            "by": _INDICES[by],
        }
        self._add(kernels.LOOK_UP, f"[{size}]", columns, (), out, row_bytes=size * item_size)
        return out

    def add_looked_up(self, table: Table, by: Index, x: Slot) -> None:
        """x plus such a row."""
        size = table.rows.shape[1]
        self._check(x)
        if table.rows.dtype is not self.dtype or size != x.size:
            raise InvalidInput(f"the table is {table.rows.dtype} [{size}]: {self.dtype} [{x.size}] is needed")
        columns = {
            "OUT": x.place,
            "SIZE": size,
            "table": self._table(table),
            "by": _INDICES[by],
        }
        self._add(kernels.ADD_LOOKED_UP, f"[{size}]", columns, (x,), x, row_bytes=size * self.dtype.itemsize)

    # ---- norms ------------------------------------------------------------------------------------------------------

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

    def _norm(self, x: Slot, op: Instruction, weight: Tensor | None, bias: Tensor | None, eps: float) -> Slot:
        self._check(x)
        out = self._slot(x.size, self.dtype)
        columns = {
            "IN": x.place,
            "OUT": out.place,
            "SIZE": x.size,
            "weight": self._vector("weight", weight, x.size),
        }
        if op is kernels.LAYER_NORM:
            columns["bias"] = self._vector("bias", bias, x.size)
        n_bytes = sum(each.nbytes for each in (weight, bias) if each is not None)
        self._add(op, f"[{x.size}]", columns, (x,), out, scalar=eps, n_bytes=n_bytes)
        return out

    # ---- attention --------------------------------------------------------------------------------------------------

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
            "IN": qkv.place,
            "layer": layer,
            "n_heads": heads[0],
            "cos": NONE,
            "sin": NONE,
            "n_rotary": 0,
            "kind": ROTATIONS[rotation],
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
                "cos": angles[0].place,
                "sin": angles[1].place,
                "n_rotary": n_rotary,
            }
        elif rotation != "none":
            raise InvalidInput(f"angles is None: rotation {rotation!r} needs it")
        shapes = f"{heads[0]} / {heads[1]} heads of {heads[2]}"
        self._add(kernels.ROTATE_AND_STORE, shapes, columns, (qkv, *(angles or ())), qkv)

    def attend(self, qkv: Slot, layer: int, heads: tuple[int, int, int], scale: float) -> Slot:
        """`functional.attend`."""
        self._check_heads(qkv, heads)
        self._cached.add(heads[1:])
        self._attended.append(layer)
        out = self._slot(heads[0] * heads[2], self.dtype)
        columns = {
            "IN": qkv.place,
            "OUT": out.place,
            "layer": layer,
            "n_heads": heads[0],
        }
        shapes = f"{heads[0]} / {heads[1]} heads of {heads[2]}"
        token_bytes = 2 * heads[1] * heads[2] * self.dtype.itemsize
        self._add(kernels.ATTEND, shapes, columns, (qkv,), out, scalar=scale, token_bytes=token_bytes)
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
        if self._n_logits is not None and self._code[-1][OUT] != LOGITS:
            raise InvalidInput(f"{self._listing[-1].name} follows the last linear: nothing may")
        if self._n_logits != n_logits:
            raise InvalidInput(f"n_logits is {n_logits}: the last linear has {self._n_logits}")
        ((n_kv_heads, head_dim),) = self._cached
        linears = _LINEARS & {kernels.INSTRUCTIONS[row[OP]] for row in self._code}
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
