"""The instructions of linear layers, over matrices of floats, of one format, or of several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.functional.activation import CODES
from hfopt.functional.linear import LinearWeights, Weights, width_of
from hfopt.functional.mixed import MixedWeights
from hfopt.functional.quantized import QuantizedWeights, terms_of
from hfopt.kernels import step as kernels
from hfopt.kernels.instruction import LOGITS, NONE, Instruction
from hfopt.kernels.linear.blocks import RESIDUALS

from .writer import NO_FORMAT, Slot, Writer


def _linear_of(
    weights: LinearWeights | QuantizedWeights, dtype: torch.dtype
) -> tuple[Instruction, Sequence[int], str]:
    """(operation, row of formats, what to add to the shapes)."""
    if isinstance(weights, LinearWeights):
        return kernels.LINEAR, NO_FORMAT, ""
    levels = 0 if weights.levels is None else weights.levels.data_ptr()
    terms = terms_of(weights.compute, dtype)
    format = (weights.scaling.ctypes.data, weights.bits, weights.group, levels, terms)
    return kernels.QUANTIZED_LINEAR, format, f", {weights.bits} bits"


class LinearWriter(Writer):
    """Writes what a linear layer consists of."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._n_logits: int | None = None

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
        most = 0 if isinstance(weights, MixedWeights) else len(RESIDUALS)
        if any(each.size != width for each in residuals) or len(residuals) > most:
            raise InvalidInput(f"residuals have sizes {[each.size for each in residuals]}: up to {most} of {width} "
                               "are allowed")  # fmt: skip
        for each in (x, *residuals):
            self._check(each)
        if is_last:
            if residuals:
                raise InvalidInput(f"residuals are {len(residuals)}: the last linear has none")
            self._take_last(x)
            out, self._n_logits = Slot(LOGITS, width, 0, self.dtype), width
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
        op, format, note = _linear_of(weights, self.dtype)
        self._kept.append(weights)
        columns = {
            "IN": x.place,
            "OUT": out.place,
            "SIZE": x.size,
            "matrices": weights.table.ctypes.data,
            "n_matrices": len(weights.table),
            "width": out.size,
            "gated": int(gated),
            "code": CODES[activation],
        } | dict.fromkeys(RESIDUALS, NONE)
        columns |= {name: each.place for name, each in zip(RESIDUALS, residuals, strict=False)}
        shapes = f"{x.size} → {' + '.join(str(size) for size in weights.sizes)}{note}"
        several = "s" if len(residuals) > 1 else ""
        then = [
            *([activation] if activation else []),
            *(["gate × up"] if gated else []),
            *([f"+ {len(residuals)} residual{several}"] if residuals else []),
        ]
        n_bytes = sum(each.nbytes for each in weights.tensors if each is not None)
        self._add(
            op, shapes, columns, (x, *residuals), out, format=format, then=", ".join(then), n_bytes=n_bytes
        )
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
            "IN": x.place,
            "OUT": out.place,
            "SIZE": x.size,
            "order": places.data_ptr(),
        }
        self._add(kernels.PERMUTE, f"[{x.size}]", columns, (x,), out, n_bytes=places.nbytes)
        return out

    def _multiply(self, x: Slot, out: Slot) -> None:
        """out *= x."""
        columns = {
            "IN": x.place,
            "OUT": out.place,
            "SIZE": x.size,
        }
        self._add(kernels.MULTIPLY, f"[{x.size}]", columns, (x, out), out)

    def _take_last(self, x: Slot) -> None:
        """Only the last token of each row goes on."""
        n_bytes = x.size * self.dtype.itemsize
        columns = {
            "IN": x.place,
            "OUT": x.place,
            "SIZE": n_bytes,
        }
        self._add(kernels.TAKE_LAST, f"[{x.size}]", columns, (x,), x)
        self._per_row = True
