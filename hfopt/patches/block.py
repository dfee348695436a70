"""Blocks: replacements that are written in verbs, and run on tensors when they are called."""

from typing import Any

import torch

from hfopt.patches.eager import Eager
from hfopt.patches.ops import Declined
from hfopt.patches.replacement import Replacement, are_others_bare


class Block(Replacement):
    """A replacement whose `run` says in verbs what it computes."""

    def compute(self, hidden_states: Any, **roles: Any) -> torch.Tensor | None:
        try:
            if not are_others_bare(self):
                return None
            output: torch.Tensor = self.run(Eager(self, hidden_states, roles), hidden_states)
        except Declined:
            return None
        return output
