"""Linear layers with low-rank adapters around them: which matrices a call adds in each row, read off the layers as they are.

The weights of such a layer are those of its base. What the adapters add is no part of them: it may be switched, scaled or
removed at any time, and be another in each row of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hfopt import host
from hfopt.errors import InvalidInput
from hfopt.functional import Delta, Epilogue, Kernels, Weights, activate, add_deltas, check_deltas, pieces_of
from hfopt.functional.epilogue import PLAIN
from hfopt.functional.linear import Rows
from hfopt.modules.guards import DO_NOTHING, is_bare_inside, is_unhooked
from hfopt.patches.replacement import original_class


class Unreadable(Exception):
    """In words, why an adapted layer has to be called itself as it is now."""


class Applied(NamedTuple):
    """What one layer adds: to each row that of its name in `rows`, or all of `active`; names without a delta add nothing."""

    rows: tuple[str, ...] | None
    active: tuple[str, ...]
    deltas: tuple[tuple[str, Delta], ...]

    def of_rows(self, n_rows: int) -> list[list[Delta]]:
        """Of each row."""
        known = dict(self.deltas)
        if self.rows is None:
            return [[known[name] for name in self.active if name in known]] * n_rows
        return [[known[name]] if name in known else [] for name in self.rows]


def applied(layer: Any, part: int, dtype: torch.dtype, *, everything: bool = False) -> Applied:
    """What an adapted layer adds to activations of `dtype`, being the matrix of this number.

    everything: all of its adapters in all rows, but for those that kernels cannot read. Raises Unreadable.
    """
    if layer.training:
        raise Unreadable("it is in training mode: call model.eval()")
    if not is_bare_inside(layer):
        raise Unreadable("it has hooks")
    if everything:
        names = readable_names(layer, dtype)
        state = host.AdapterState(None, names)
    else:
        try:
            state = host.adapter_state(layer)
        except ValueError as error:
            raise Unreadable(str(error)) from error
    used = dict.fromkeys(state.active if state.rows is None else state.rows)
    found = ((name, _delta(layer, name, part, dtype)) for name in used)
    return Applied(*state, tuple((name, delta) for name, delta in found if delta is not None))


def readable_names(layer: Any, dtype: torch.dtype) -> tuple[str, ...]:
    """Adapters of a layer that kernels can add."""
    names = []
    for name in host.adapter_names(layer):
        try:
            _delta(layer, name, 0, dtype)
        except Unreadable:
            continue
        names.append(name)
    return tuple(names)


def _delta(layer: Any, name: str, part: int, dtype: torch.dtype) -> Delta | None:
    try:
        found = host.adapter_modules(layer, name)
    except ValueError as error:
        raise Unreadable(str(error)) from error
    if found is None:
        return None
    linears = found.a, found.b
    for each in linears:
        if original_class(each) is not nn.Linear or each._parameters["bias"] is not None:
            raise Unreadable(f"adapter {name!r} has more than two matrices")
    if not all(map(is_unhooked, (*linears, found.dropout))):
        raise Unreadable(f"adapter {name!r} has hooks, or a forward of its own")
    if type(found.dropout) not in DO_NOTHING:
        raise Unreadable(f"adapter {name!r} has a {type(found.dropout).__name__} in front of it")
    # peft makes adapters in training mode
    if type(found.dropout) is nn.Dropout and found.dropout.training and found.dropout.p > 0:
        raise Unreadable(f"adapter {name!r} drops inputs, as in training: `model.eval()` has it leave that")
    a, b = (each._parameters["weight"] for each in linears)
    if type(a) is not nn.Parameter or type(b) is not nn.Parameter:
        raise Unreadable(f"adapter {name!r} has matrices that are no plain parameters")
    if type(found.scaling) not in (float, int):
        raise Unreadable(f"adapter {name!r} is scaled by a {type(found.scaling).__name__}")
    if a.dtype is not dtype and not host.casts_inputs(layer):
        raise Unreadable("its inputs are not brought into the dtype of its adapters")
    try:
        delta = Delta.of(a, b, found.scaling, dtype, part)
        check_deltas([delta], layer.in_features, [layer.out_features] * (part + 1))
    except InvalidInput as error:
        raise Unreadable(f"adapter {name!r}: {error}") from error
    return delta


def call_reason(layer: Any, dtype: torch.dtype) -> str | None:
    """In words, why an adapted layer has to be called itself; None for other modules, and if kernels add what it does."""
    if not host.is_adapted(layer):
        return None
    try:
        applied(layer, 0, dtype)
    except Unreadable as reason:
        return str(reason)
    return None


@dataclass(frozen=True, eq=False)
class AdaptedWeights:
    """The matrices of linear layers of which some have adapters; see `functional.Weights`.

    layers: of each matrix, the adapted layer, or None. rows: as in `LinearWeights`, of a single one. deltas: of each row of
    the call, once `for_rows` has read them.
    """

    base: Weights
    layers: tuple[Any, ...]
    rows: Rows = ()
    deltas: Sequence[Sequence[Delta]] = ()

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def dtype(self) -> torch.dtype | None:
        return self.base.dtype

    @property
    def sizes(self) -> list[int]:
        return self.base.sizes

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.base.tensors

    @property
    def pieces(self) -> np.ndarray:
        """See `functional.pieces_of`."""
        return pieces_of(self.sizes, self.rows)

    def for_rows(self, n_rows: int, dtype: torch.dtype) -> AdaptedWeights:
        """The same for a call of so many rows; raises Unreadable if kernels cannot add what the layers do in it."""
        return AdaptedWeights(self.base, self.layers, self.rows, deltas_of(self.layers, n_rows, dtype))

    def multiply(
        self, hidden_states: Tensor, epilogue: Epilogue[Tensor] = PLAIN, by: Kernels = "hfopt"
    ) -> Tensor:
        """See `functional.linear`; rounded after the base, with what adapters and residuals add, and after an activation."""
        y = self.base.multiply(hidden_states, PLAIN, by)
        is_last = epilogue.activation is None and not epilogue.gated
        add_deltas(hidden_states, y, self.deltas, self.pieces, epilogue.residuals if is_last else ())
        if is_last:
            return y
        y = activate(y, epilogue.activation, gated=epilogue.gated)
        for residual in epilogue.residuals:
            y += residual
        return y


def deltas_of(layers: Sequence[Any], n_rows: int, dtype: torch.dtype) -> list[list[Delta]]:
    """Of each row of a call, what the layers of a linear layer add side by side. Raises Unreadable."""
    by_row: list[list[Delta]] = [[] for _ in range(n_rows)]
    for part, layer in enumerate(layers):
        if layer is not None:
            found = applied(layer, part, dtype)
            if found.rows is not None and len(found.rows) != n_rows:
                raise Unreadable(f"{len(found.rows)} rows have adapters of their own: there are {n_rows}")
            for row, deltas in zip(by_row, found.of_rows(n_rows), strict=True):
                row += deltas
    return by_row
