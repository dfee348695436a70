"""Linear layers: `y = x W^T + b` over the weights where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfopt.functional import Epilogue
from hfopt.modules.weights import features_of, is_linear
from hfopt.patches.block import Block
from hfopt.patches.ops import Ops, X
from hfopt.patches.pattern import Pattern


@dataclass(frozen=True)
class LinearSpec:
    """Sizes of a Linear."""

    in_features: int
    out_features: int
    bias: bool

    reads = ("",)
    parts = ()


class Linear(Block):
    """Replaces `nn.Linear`, or goes on top of `QuantizedLinear`."""

    def run(self, ops: Ops[X], x: X, residuals: Sequence[X] = ()) -> X:
        return ops.linear(x, ops.weights(self, "own", ()), Epilogue(residuals=residuals))


def _recognise(module: Any) -> LinearSpec | None:
    if not is_linear(module):
        return None
    return LinearSpec(*features_of(module), module.bias is not None)


def _trial(call: Any, spec: LinearSpec, scene: Any) -> list[torch.Tensor]:
    return [call(hidden_states=scene.hidden_states(1, 3, spec.in_features))]


LINEAR = Pattern("linear", "linear", Linear, _recognise, _trial)
