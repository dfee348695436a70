"""Blocks: replacements that are written in verbs, and run on tensors when they are called."""

from typing import Any

import torch

from hfopt.patches.eager import Eager
from hfopt.patches.ops import Declined
from hfopt.patches.replacement import Replacement, are_others_bare


class Block(Replacement):
    """A replacement whose `run` says in verbs what it computes; some add a residual that the call gives to it."""

    def compute(self, hidden_states: Any, **roles: Any) -> torch.Tensor | None:
        residual = roles.get("residual")
        if (residual is None) == ("residual" in self._hfopt_arguments.names):
            return None
        try:
            if not are_others_bare(self):
                return None
            ops = Eager(self, hidden_states, roles)
            output: torch.Tensor
            if residual is None:
                output = self.run(ops, hidden_states)
            else:
                ops.check(hidden_states, residual)
                output = self.run(ops, hidden_states, [residual])  # type: ignore[call-arg]
        except Declined:
            return None
        return output
