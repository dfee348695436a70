"""Instructions on each token by itself (tables, norms, scales, limits), and how all instructions are collected."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hfopt.distributed.ranks import Ranks
from hfopt.errors import InvalidInput, UnsupportedModel
from hfopt.functional import Norm, Weights, Xielu
from hfopt.functional.activation import CODES
from hfopt.functional.limit import check_limit
from hfopt.functional.linear import width_of
from hfopt.kernels import step as kernels
from hfopt.kernels.instruction import NONE, Instruction
from hfopt.kernels.linear.blocks import RESIDUALS
from hfopt.modules.sharded import Shard
from hfopt.patches.adapters import AdaptedWeights
from hfopt.patches.sharded import ShardedWeights
from hfopt.program.layout import Value, Written
from hfopt.program.program import Table

Index = Literal["tokens", "positions"]

_INDICES = {"tokens": kernels.TOKENS, "positions": kernels.POSITIONS}


class Pointwise:
    """The first part of a `Builder`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.layer: int | None = None
        self.max_keys = sys.maxsize
        self._has_slopes = self._has_ranks = False
        self._written: list[Written] = []
        self._per_row = False
        self._tables: list[Table] = []
        self._kept: list[Weights | Tensor] = []
        self.ranks: Ranks | None = None  # that have the model together
        self._adapted_layers: list[tuple[Any, ...]] = []
        self._cached: dict[int, tuple[int, int]] = {}  # layer -> heads of keys, channels of one

    def _add(
        self,
        instruction: Instruction,
        shapes: str,
        operands: dict[str, Value],
        columns: dict[str, int],
        **more: object,
    ) -> None:
        more.setdefault("n_bytes", {})
        written = Written(instruction, self.layer, self._per_row, operands, columns, shapes, **more)  # type: ignore[arg-type]
        self._written.append(written)

    def _check(self, value: Value, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or self.dtype
        if value.dtype is not dtype:
            raise InvalidInput(f"an operand is {value.dtype} [{value.size}]: {dtype} is needed")

    # ---- embeddings -------------------------------------------------------------------------------------------------

    def _table(self, table: Table) -> int:
        self._tables.append(table)
        return len(self._tables) - 1

    def look_up(self, table: Table, by: Index) -> Value:
        """The table's row for each token or position."""
        size, n_bytes = table.rows.shape[1], table.rows.shape[1] * table.rows.element_size()
        out, shard = Value(size, table.rows.dtype), table.shard
        columns = {"SIZE": n_bytes, "table": self._table(table), "by": _INDICES[by]}
        more = {"n_bytes": {"row_bytes": n_bytes}}
        if shard is None:
            self._add(kernels.LOOK_UP, f"[{size}]", {"OUT": out}, columns, **more)
            return out
        columns |= {"first": shard.first, "n_all": shard.n}
        self._add(kernels.LOOK_UP_PART, f"[{size}]", {"OUT": out}, columns, **more)
        return self.all_reduce(out, shard)

    def add_looked_up(self, table: Table, by: Index, x: Value) -> None:
        """x plus such a row, in place."""
        size, dtype = table.rows.shape[1], table.rows.dtype
        self._check(x)
        if dtype is not self.dtype or size != x.size:
            raise InvalidInput(f"the table is {dtype} [{size}]: {self.dtype} [{x.size}] is needed")
        columns = {"SIZE": size, "table": self._table(table), "by": _INDICES[by]}
        n_bytes = {"row_bytes": size * dtype.itemsize}
        self._add(kernels.ADD_LOOKED_UP, f"[{size}]", {"OUT": x}, columns, n_bytes=n_bytes)

    # ---- what several processes make together -------------------------------------------------------------------------

    def all_reduce(self, x: Value, shard: Shard) -> Value:
        """The sum over the processes, in place; x itself."""
        self._check(x)
        self._note(shard)
        self._add(kernels.ALL_REDUCE, f"[{x.size}]", {"IN": x}, {"SIZE": x.size})
        return x

    def gather(self, x: Value, weights: ShardedWeights) -> Value:
        """What the processes have made of their parts of these matrices, side by side."""
        self._check(x)
        if x.size != sum(weights.base.sizes):
            raise InvalidInput(f"x has {x.size} values: {sum(weights.base.sizes)} are needed")
        self._note(weights.shard)
        pieces, out = torch.from_numpy(weights.pieces), Value(sum(weights.sizes), self.dtype)
        self._kept.append(pieces)
        columns = {"SIZE": x.size, "pieces": pieces.data_ptr(), "n_pieces": len(pieces), "width": out.size}
        self._add(kernels.GATHER, f"{x.size} → {out.size}", {"IN": x, "OUT": out}, columns)
        return out

    def take_part(self, x: Value, shard: Shard) -> Value:
        """The inputs of this process."""
        self._check(x)
        if x.size != shard.n:
            raise InvalidInput(f"x has {x.size} values: {shard.n} are needed")
        out = Value(shard.n_own, self.dtype)
        columns = {"SIZE": out.size, "first": shard.first, "width": x.size}
        self._add(kernels.TAKE_PART, f"{x.size} → {out.size}", {"IN": x, "OUT": out}, columns)
        return out

    def _note(self, shard: Shard) -> None:
        """Raises UnsupportedModel for processes of several hosts."""
        if shard.ranks.words is None:
            raise UnsupportedModel("processes of several hosts have the model together")
        self.ranks = shard.ranks

    # ---- adapters -------------------------------------------------------------------------------------------------------

    def add_deltas(
        self, x: Value, out: Value, weights: AdaptedWeights, residuals: Sequence[Value] = ()
    ) -> None:
        """`functional.add_deltas` of what the request brings for these layers, in place."""
        for each in (x, out, *residuals):
            self._check(each)
        pieces = torch.from_numpy(weights.pieces)
        width = sum(weights.sizes)
        if (x.size, out.size) != (weights.in_features, width) or any(
            each.size != width for each in residuals
        ):
            given = f"{x.size} and {[each.size for each in (out, *residuals)]} values"
            raise InvalidInput(f"operands have {given}: {weights.in_features} and {width} are needed")
        if len(residuals) > len(RESIDUALS):
            raise InvalidInput(f"there are {len(residuals)} residuals: up to {len(RESIDUALS)} are allowed")
        self._kept.append(pieces)
        given_too = dict(zip(RESIDUALS, residuals, strict=False))
        columns = {
            "SIZE": x.size,
            "place": len(self._adapted_layers),
            "pieces": pieces.data_ptr(),
            "n_pieces": len(pieces),
            "width": width,
            **{name: NONE for name in RESIDUALS if name not in given_too},
        }
        self._adapted_layers.append(weights.layers)
        n = len(residuals)
        then = f"+ {n} residual{'s' * (n > 1)}" if n else ""
        shapes = f"{x.size} → {' + '.join(map(str, weights.sizes))}"
        self._add(kernels.ADD_DELTAS, shapes, {"IN": x, "OUT": out, **given_too}, columns, then=then)

    def activate(self, x: Value, activation: str | None, *, gated: bool = False) -> Value:
        """`functional.activate`."""
        self._check(x)
        if activation not in CODES:
            raise InvalidInput(f"activation is {activation!r}: the kernels have none of this name")
        out = Value(width_of([x.size // 2, x.size - x.size // 2], gated), self.dtype)
        columns = {"SIZE": out.size, "code": CODES[activation], "gated": int(gated)}
        then = ", ".join([*([activation] if activation else []), *(["gate × up"] if gated else [])])
        self._add(
            kernels.ACTIVATE, f"[{x.size}]", {"IN": x, "OUT": out}, columns, then=then, in_place=not gated
        )
        return out

    # ---- norms and scales -------------------------------------------------------------------------------------------

    def norm(self, x: Value, norm: Norm) -> Value:
        """`functional.norm`."""
        self._check(x)
        out = Value(x.size, self.dtype)
        instruction = kernels.LAYER_NORM if norm.kind == "layer" else kernels.RMS_NORM
        columns = {"SIZE": x.size, **self._vectors(norm, (x.size,))}
        operands, n_bytes = {"IN": x, "OUT": out}, {"n_bytes": _n_bytes(norm)}
        self._add(instruction, f"[{x.size}]", operands, columns, scalar=norm.eps, n_bytes=n_bytes)
        return out

    def _vectors(self, norm: Norm, shape: tuple[int, ...]) -> dict[str, int]:
        columns = norm.addresses(shape, self.dtype) | {"offset": int(norm.unit_offset)}
        self._kept += norm.vectors.values()
        return columns

    def norm_heads(self, qkv: Value, norm: Norm, first: int, count: int, size: int) -> None:
        """`functional.norm_heads`, in place."""
        self._check(qkv)
        shape = norm.of_heads(qkv.size, first, count, size)
        columns = {
            "SIZE": size,
            "step": size if len(shape) == 2 else 0,
            "width": qkv.size,
            "first": first,
            "n_heads": count,
            "is_layer": int(norm.kind == "layer"),
            **self._vectors(norm, shape),
        }
        shapes, n_bytes = f"{count} heads of {size}", {"n_bytes": _n_bytes(norm)}
        more = {"scalar": norm.eps, "n_bytes": n_bytes}
        self._add(kernels.HEAD_NORM, shapes, {"IN": qkv, "OUT": qkv}, columns, **more)

    def scale(self, x: Value, factor: float, residual: Value | None = None, *, divide: bool = False) -> Value:
        """`functional.scale`."""
        operands = {"IN": x, "OUT": Value(x.size, self.dtype)}
        if residual is not None:
            operands["residual"] = residual
        for each in operands.values():
            self._check(each)
            if each.size != x.size:
                raise InvalidInput(f"residual has {each.size} values: {x.size} are needed")
        columns = {"SIZE": x.size, "divide": int(divide)} | (
            {} if "residual" in operands else {"residual": NONE}
        )
        then = "" if residual is None else "+ 1 residual"
        shapes = f"[{x.size}] {'/' if divide else '×'} {factor:g}"
        self._add(kernels.SCALE, shapes, operands, columns, scalar=factor, then=then, in_place=True)
        return operands["OUT"]

    def multiply(self, x: Value, factor: Value, first: int = 0) -> None:
        """x times as many values of the factor, from its value `first` on, in place."""
        for each in (x, factor):
            self._check(each)
        if not 0 <= first <= factor.size - x.size:
            raise InvalidInput(f"first is {first}: {x.size} of {factor.size} values are needed")
        columns = {"SIZE": x.size, "width": factor.size, "first": first}
        self._add(kernels.MULTIPLY, f"[{x.size}]", {"IN": factor, "OUT": x}, columns)

    def xielu(self, x: Value, numbers: Xielu) -> Value:
        """`functional.xielu`."""
        self._check(x)
        out = Value(x.size, self.dtype)
        columns = {"SIZE": x.size, **numbers.addresses(self.dtype)}
        self._kept += numbers
        self._add(kernels.XIELU, f"[{x.size}]", {"IN": x, "OUT": out}, columns, in_place=True)
        return out

    def clamp(self, x: Value, limit: float) -> Value:
        """`functional.clamp`."""
        return self._limit(x, limit, smooth=False)

    def softcap(self, x: Value, limit: float) -> Value:
        """`functional.softcap`."""
        return self._limit(x, limit, smooth=True)

    def _limit(self, x: Value, limit: float, *, smooth: bool) -> Value:
        self._check(x)
        operands = {"IN": x, "OUT": Value(x.size, self.dtype)}
        shapes = f"[{x.size}] {'softly ' if smooth else ''}within {limit:g}"
        columns = {"SIZE": x.size, "smooth": int(smooth)}
        self._add(kernels.LIMIT, shapes, operands, columns, scalar=check_limit(limit), in_place=True)
        return operands["OUT"]


def _n_bytes(norm: Norm) -> int:
    return sum(each.nbytes for each in norm.vectors.values())
