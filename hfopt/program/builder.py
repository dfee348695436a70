"""The making of a program: a `Builder` is told the operations of a decoder in order, and then lays out their memory."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.functional import (
    Epilogue,
    LinearWeights,
    MixedWeights,
    QuantizedWeights,
    Scoring,
    Weights,
)
from hfopt.functional.activation import CODES
from hfopt.functional.epilogue import PLAIN
from hfopt.functional.linear import width_of
from hfopt.functional.rotary import ROTATIONS
from hfopt.kernels import step as kernels
from hfopt.kernels.instruction import NONE
from hfopt.kernels.linear.blocks import RESIDUALS
from hfopt.patches.adapters import AdaptedWeights
from hfopt.patches.sharded import ShardedWeights
from hfopt.program.layout import (
    Value,
    format_of,
    in_words,
    line_of,
    places_of,
    row_of,
    scores_in_words,
)
from hfopt.program.listing import Listing
from hfopt.program.pointwise import Pointwise
from hfopt.program.program import Breaks, Program

_LINEARS = frozenset({kernels.LINEAR, kernels.QUANTIZED_LINEAR})


class Builder(Pointwise):
    """Collects the instructions of a program for weights of one of `DTYPES`; raises `InvalidInput` for
    operands that do not fit.

    layer: the one that the next instructions belong to, for the listing. max_keys: that the model takes.
    """

    # ---- attention --------------------------------------------------------------------------------------------------

    def rotate_and_store(
        self,
        qkv: Value,
        layer: int,
        heads: tuple[int, int, int],
        rotation: str,
        angles: tuple[Value, Value] | None,
    ) -> None:
        """`functional.rotate_and_store`; heads: of queries, of keys, channels of one; angles: cos and sin."""
        self._check_heads(qkv, heads)
        if rotation not in ROTATIONS or (rotation == "none" and angles is not None):
            raise InvalidInput(
                f"rotation is {rotation!r}: {', '.join(ROTATIONS)} are allowed, angles but for none"
            )
        if layer in self._cached:
            raise InvalidInput(f"layer {layer} is cached: once is allowed")
        self._cached[layer] = heads[1:]
        operands = {"IN": qkv}
        columns = {"layer": layer, "n_heads": heads[0], "n_rotary": 0, "kind": ROTATIONS[rotation]}
        if angles is not None:
            operands |= {"cos": angles[0], "sin": angles[1]}
            columns["n_rotary"] = self._n_rotary(angles, rotation, heads[2])
        elif rotation != "none":
            raise InvalidInput(f"angles is None: rotation {rotation!r} needs it")
        columns |= {name: NONE for name in ("cos", "sin") if name not in operands}
        self._add(kernels.ROTATE_AND_STORE, f"{heads[0]} / {heads[1]} heads of {heads[2]}", operands, columns)

    def _n_rotary(self, angles: tuple[Value, Value], rotation: str, head_dim: int) -> int:
        """How many channels these angles turn."""
        n_rotary = angles[0].size * (2 if rotation == "interleaved" else 1)
        if angles[0].size != angles[1].size or n_rotary > head_dim or n_rotary % 2:
            raise InvalidInput(
                f"{angles[0].size} angles turn {n_rotary} channels: up to {head_dim} are allowed"
            )
        for each in angles:
            self._check(each, torch.float32)
        return n_rotary

    def rotate(
        self, x: Value, n_heads: int, head_dim: int, rotation: str, angles: tuple[Value, Value]
    ) -> None:
        """`functional.rotate`, in place."""
        self._check(x)
        if rotation not in ROTATIONS or rotation == "none":
            raise InvalidInput(f"rotation is {rotation!r}: half and interleaved are allowed")
        if n_heads < 1 or head_dim < 1 or n_heads * head_dim > x.size:
            raise InvalidInput(f"x has {x.size} values: {n_heads} heads of {head_dim} do not fit")
        columns = {
            "SIZE": head_dim,
            "width": x.size,
            "n_heads": n_heads,
            "n_rotary": self._n_rotary(angles, rotation, head_dim),
            "kind": ROTATIONS[rotation],
        }
        operands = {"IN": x, "cos": angles[0], "sin": angles[1]}
        self._add(kernels.ROTATE, f"{n_heads} heads of {head_dim}", operands, columns)

    def attend(self, qkv: Value, layer: int, heads: tuple[int, int, int], scoring: Scoring) -> Value:
        """`functional.attend`, over what has been stored in this layer."""
        self._check_heads(qkv, heads, stores=False)
        if self._cached.get(layer) != heads[1:]:
            raise InvalidInput(
                f"layer {layer} caches heads of {self._cached.get(layer)}: {heads[1:]} is needed"
            )
        out = Value(heads[0] * heads[2], self.dtype)
        shapes = f"{heads[0]} / {heads[1]} heads of {heads[2]}"
        scale, softcap, slopes, sinks, window, ranked = scoring.numbers(heads[0], self.dtype)
        n_bytes = {
            "token_bytes": 2 * heads[1] * heads[2] * self.dtype.itemsize,
            "window": window or sys.maxsize,
        }
        self._kept += scoring.tensors
        self._has_slopes |= scoring.slopes is not None
        self._has_ranks |= scoring.ranked
        columns = {
            "SIZE": qkv.size,
            "layer": layer,
            **dict(zip(("n_heads", "n_kv_heads", "head_dim"), heads, strict=True)),
            "softcap": int(np.float32(softcap).view(np.int32)),
            "slopes": slopes,
            "sinks": sinks,
            "window": window,
            "ranked": ranked,
        }
        operands, then = {"IN": qkv, "OUT": out}, scores_in_words(scoring)
        self._add(kernels.ATTEND, shapes, operands, columns, scalar=scale, then=then, n_bytes=n_bytes)
        return out

    def _check_heads(self, qkv: Value, heads: tuple[int, int, int], *, stores: bool = True) -> None:
        n_heads, n_kv_heads, head_dim = heads
        self._check(qkv)
        fits = qkv.size == (n_heads + 2 * n_kv_heads) * head_dim or (
            not stores and qkv.size == n_heads * head_dim
        )
        fits = fits and min(heads) > 0
        if not fits or n_heads % n_kv_heads:
            raise InvalidInput(
                f"qkv has {qkv.size} values: {n_heads} / {n_kv_heads} heads of {head_dim} do not fit"
            )

    # ---- linear layers ----------------------------------------------------------------------------------------------

    def take_last(self, *values: Value) -> None:
        """Only the last token of each row goes on, in all values that are read from here on. The second time it is so
        already.
        """
        if self._per_row:
            return
        for x in values:
            columns = {"SIZE": x.size * x.dtype.itemsize}
            self._add(kernels.TAKE_LAST, f"[{x.size}]", {"IN": x, "OUT": x}, columns)
        self._per_row = True

    def linear(self, x: Value, weights: Weights, epilogue: Epilogue[Value] = PLAIN) -> Value:
        """`functional.linear`, over matrices of floats, of one format, or of several, or with adapters around them."""
        if isinstance(weights, AdaptedWeights):
            return self._adapted(x, weights, epilogue)
        if isinstance(weights, ShardedWeights):
            return self._sharded(x, weights, epilogue)
        if weights.dtype not in (None, self.dtype) or weights.in_features != x.size:
            given = f"{weights.dtype} with {weights.in_features} features"
            raise InvalidInput(f"weights are {given}: {self.dtype} with {x.size} are needed")
        if epilogue.activation not in CODES:
            raise InvalidInput(f"activation is {epilogue.activation!r}: the kernels have none of this name")
        width, residuals = width_of(weights.sizes, epilogue.gated), epilogue.residuals
        most = 0 if isinstance(weights, MixedWeights) else len(RESIDUALS)
        if any(each.size != width for each in residuals) or len(residuals) > most:
            raise InvalidInput(f"residuals have sizes {[each.size for each in residuals]}: up to {most} of {width} "
                               "are allowed")  # fmt: skip
        for each in (x, *residuals):
            self._check(each)
        out = Value(width, self.dtype)
        if isinstance(weights, LinearWeights | QuantizedWeights):
            self._linear(x, weights, epilogue, out)
        elif isinstance(weights, MixedWeights):
            self._linears(x, weights, epilogue, out)
        return out

    def _adapted(self, x: Value, weights: AdaptedWeights, epilogue: Epilogue[Value]) -> Value:
        """`AdaptedWeights.multiply`."""
        out, residuals = self.linear(x, weights.base), epilogue.residuals
        if epilogue.activation is None and not epilogue.gated:
            self.add_deltas(x, out, weights, residuals)
            return out
        self.add_deltas(x, out, weights)
        out = self.activate(out, epilogue.activation, gated=epilogue.gated)
        for each in residuals:
            out = self.scale(out, 1.0, each)
        return out

    def _sharded(self, x: Value, weights: ShardedWeights, epilogue: Epilogue[Value]) -> Value:
        """`ShardedWeights.multiply`."""
        shard, is_plain = weights.shard, epilogue.activation is None and not epilogue.gated
        if shard.cuts:
            x = self.take_part(x, shard)
        if is_plain and shard.sums:
            own = Epilogue(residuals=epilogue.residuals if shard.leads else ())
            return self.all_reduce(self.linear(x, weights.base, own), shard)
        out = self.linear(x, weights.base)
        out = self.all_reduce(out, shard) if shard.sums else self.gather(out, weights)
        if not is_plain:
            out = self.activate(out, epilogue.activation, gated=epilogue.gated)
        for each in epilogue.residuals:
            out = self.scale(out, 1.0, each)
        return out

    def _linears(self, x: Value, weights: MixedWeights, epilogue: Epilogue[Value], out: Value) -> None:
        """An instruction for each part; with `gated` the product of two behind them."""
        activated = Epilogue[Value](epilogue.activation)
        if not epilogue.gated:
            for part in weights.side_by_side():
                self._linear(x, part, activated, out)
            return
        gate, up = weights.parts
        factor = Value(out.size, self.dtype)
        self._linear(x, gate, activated, out)
        self._linear(x, up, PLAIN, factor)
        self.multiply(out, factor)

    def _linear(
        self, x: Value, weights: LinearWeights | QuantizedWeights, epilogue: Epilogue[Value], out: Value
    ) -> None:
        """The instruction for matrices of one format, behind one that brings x into their order."""
        if isinstance(weights, QuantizedWeights) and weights.order is not None:
            x = self._permute(x, weights.order)
        instruction, format, note = format_of(weights, self.dtype)
        self._kept.append(weights)
        residuals = dict(zip(RESIDUALS, epilogue.residuals, strict=False))
        columns = {
            "SIZE": x.size,
            "matrices": weights.table.ctypes.data,
            "n_matrices": len(weights.table),
            "width": out.size,
            "gated": int(epilogue.gated),
            "code": CODES[epilogue.activation],
            **{name: NONE for name in RESIDUALS if name not in residuals},
        }
        shapes = f"{x.size} → {' + '.join(str(size) for size in weights.sizes)}{note}"
        n_bytes = {"n_bytes": sum(each.nbytes for each in weights.tensors if each is not None)}
        more = {"format": format, "then": in_words(epilogue), "n_bytes": n_bytes}
        self._add(instruction, shapes, {"IN": x, "OUT": out, **residuals}, columns, **more)

    def _permute(self, x: Value, order: Tensor) -> Value:
        """x[order], in each row."""
        ends = order.aminmax()
        if ends.min < 0 or ends.max >= x.size:
            raise InvalidInput(f"order is from {int(ends.min)} to {int(ends.max)}: below {x.size} is needed")
        # of its own: nobody can write numbers into it that nobody has looked at
        places = order.long()
        self._kept.append(places)
        out = Value(x.size, self.dtype)
        columns, n_bytes = {"SIZE": x.size, "order": places.data_ptr()}, {"n_bytes": places.nbytes}
        self._add(kernels.PERMUTE, f"[{x.size}]", {"IN": x, "OUT": out}, columns, n_bytes=n_bytes)
        return out

    # ---- the result -------------------------------------------------------------------------------------------------

    def program(self, logits: Value, n_layers: int) -> Program:
        """What was collected, of which the result is `logits`.

        n_layers: of the cache. Raises `InvalidInput` unless each of them is cached, and for logits that are no value of the
        last tokens, or that are read again.
        """
        if sorted(self._cached) != list(range(n_layers)):
            raise InvalidInput(f"layers {sorted(self._cached)} are cached: each of {n_layers} is needed once")
        last = self._written[-1]
        if last.out is not logits or not last.per_row:
            raise InvalidInput(
                f"{last.instruction.name} is the last: it has to make the logits of the last tokens"
            )
        places, row_bytes = places_of(self._written, logits)
        lines = tuple(line_of(each, places) for each in self._written)
        linears = _LINEARS & {each.instruction for each in self._written}
        formats = np.array([each.format for each in self._written], np.int64)
        return Program(
            dtype=self.dtype,
            code=np.stack([row_of(each, places) for each in self._written]),
            formats=formats if linears - {kernels.LINEAR} else formats[:0],
            scalars=np.array([each.scalar for each in self._written]),
            tables=tuple(self._tables),
            breaks=Breaks(
                tuple(sorted({each for table in self._tables for each in table.breaks.lengths})),
                min((table.breaks.last for table in self._tables), default=sys.maxsize),
            ),
            row_bytes=row_bytes,
            layouts=tuple((*self._cached[layer], self.dtype) for layer in range(n_layers)),
            n_logits=logits.size,
            listing=Listing(
                instructions=lines,
                n_bytes=sum(each.bytes_read(1, 0) for each in lines),
                scratch_bytes=row_bytes,
                cached_bytes=sum(each.token_bytes for each in lines),
            ),
            kept=tuple(self._kept),
            linears=linears,
            max_keys=self.max_keys,
            reads_positions=any(each.columns.get("by") == kernels.POSITIONS for each in self._written),
            has_slopes=self._has_slopes,
            has_ranks=self._has_ranks,
            adapted=tuple(self._adapted_layers),
            ranks=self.ranks,
            is_exact=not any(each.columns.get("smooth") for each in self._written),
        )
