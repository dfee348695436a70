"""Linear layers of which each process has a part: what kernels make of the own part, and what all of them make together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfopt.functional import Epilogue, Kernels, Weights, activate
from hfopt.functional.epilogue import PLAIN
from hfopt.modules.sharded import Shard


@dataclass(frozen=True, eq=False)
class ShardedWeights:
    """The own part of one matrix, of whose product all processes make one result; see `functional.Weights`.

    parts: rows of the matrices that the outputs stand for, in order, if they are several. Each process rounds its part of a
    sum; residuals, like the bias, are in that of the first one.
    """

    base: Weights
    shard: Shard
    parts: tuple[int, ...] = ()

    @property
    def in_features(self) -> int:
        return self.shard.n if self.shard.cuts else self.base.in_features

    @property
    def dtype(self) -> torch.dtype | None:
        return self.base.dtype

    @property
    def sizes(self) -> list[int]:
        if self.shard.sums:
            return self.base.sizes
        return list(self.parts) or [self.shard.n]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.base.tensors

    def multiply(
        self, hidden_states: Tensor, epilogue: Epilogue[Tensor] = PLAIN, by: Kernels = "hfopt"
    ) -> Tensor:
        """See `functional.linear`; rounded once more before an activation, a gate, and residuals of what is gathered."""
        shard = self.shard
        with torch.no_grad():
            if epilogue.activation is None and not epilogue.gated and shard.sums:
                own = Epilogue(residuals=epilogue.residuals if shard.leads else ())
                return shard.join(self.base.multiply(shard.cut(hidden_states), own, by))
            y = shard.join(self.base.multiply(shard.cut(hidden_states), PLAIN, by))
        if epilogue.activation is not None or epilogue.gated:
            y = activate(y, epilogue.activation, gated=epilogue.gated)
        for residual in epilogue.residuals:
            y += residual
        return y
