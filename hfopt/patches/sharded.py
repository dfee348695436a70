"""Linear layers of which each process has a part: what kernels make of the own part, and what all of them make together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hfopt.functional import Epilogue, Kernels, Weights, activate
from hfopt.functional.epilogue import PLAIN
from hfopt.modules.sharded import Shard


@dataclass(frozen=True, eq=False)
class ShardedWeights:
    """The own parts of matrices, of whose products all processes make one result; see `functional.Weights`.

    shards: of each matrix, all of which gather; or of one that is summed. parts: rows of the matrices that the outputs of a
    single one stand for, in order. Each process rounds its part of a sum; residuals, like the bias, are in that of the
    first one.
    """

    base: Weights
    shards: tuple[Shard, ...]
    parts: tuple[int, ...] = ()

    @property
    def shard(self) -> Shard:
        """The first one, which is like the others."""
        return self.shards[0]

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
        return list(self.parts) or [each.n for each in self.shards]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.base.tensors

    @property
    def pieces(self) -> np.ndarray:
        """int64 [matrices, 3]: where the outputs of each begin in those of the base, and in the result, and how many."""
        own, all_of_them = (
            np.array([getattr(each, name) for each in self.shards]) for name in ("n_own", "n")
        )
        places = np.array([each.first for each in self.shards]) + all_of_them.cumsum() - all_of_them
        return np.stack([own.cumsum() - own, places, own], 1).astype(np.int64)

    def multiply(
        self, hidden_states: Tensor, epilogue: Epilogue[Tensor] = PLAIN, by: Kernels = "hfopt"
    ) -> Tensor:
        """See `functional.linear`; rounded once more before an activation, a gate, and residuals of what is gathered."""
        shard = self.shard
        with torch.no_grad():
            if epilogue.activation is None and not epilogue.gated and shard.sums:
                own = Epilogue(residuals=epilogue.residuals if shard.leads else ())
                return shard.join(self.base.multiply(shard.cut(hidden_states), own, by))
            y = self._join(self.base.multiply(shard.cut(hidden_states), PLAIN, by))
        if epilogue.activation is not None or epilogue.gated:
            y = activate(y, epilogue.activation, gated=epilogue.gated)
        for residual in epilogue.residuals:
            y += residual
        return y

    def _join(self, y: Tensor) -> Tensor:
        if self.shard.sums:
            return self.shard.join(y)
        whole = y.new_zeros((*y.shape[:-1], sum(self.sizes)))
        for source, target, n in self.pieces:
            whole[..., target : target + n] = y[..., source : source + n]
        self.shard.ranks.all_reduce(whole)
        return whole
