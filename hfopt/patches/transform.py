"""Transforms in front of the logits: `norm(act(dense(x)))`."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfopt.host import Features, base_layer
from hfopt.patches.activation import match_activation
from hfopt.patches.block import Block
from hfopt.patches.families.family import TransformParts
from hfopt.patches.ops import Ops, X
from hfopt.patches.pattern import Pattern, has_children, owned, takes_only
from hfopt.patches.weights import is_read_as_linear


@dataclass(frozen=True)
class TransformSpec:
    """Names of the children, and the kernels' activation between them (None: it runs in torch)."""

    dense: str
    activation: str
    norm: str
    hidden_size: int
    activation_name: str | None

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        return (self.dense,)

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.norm,)


class Transform(Block):
    """`norm(act(dense(x)))`."""

    takes = frozenset({"hidden_states"})

    def run(self, ops: Ops[X], x: X, residuals: Sequence[X] = ()) -> X:
        spec = self._hfopt.spec
        inner = ops.activate(self, spec.activation, x, ops.weights(self, "dense", (spec.dense,)))
        return ops.part(self, spec.norm, inner, residuals)


def _recognise(parts: TransformParts, module: Any) -> TransformSpec | str | None:
    names = parts.dense, parts.activation, parts.norm
    if not has_children(module, names) or owned(module) or not takes_only(module, Transform.takes):
        return None
    dense, activation = module._modules[parts.dense], module._modules[parts.activation]
    if not is_read_as_linear(dense):
        return f"{parts.dense} is a {type(dense).__name__}, not a plain Linear"
    return TransformSpec(*names, Features.of(base_layer(dense)).inputs, match_activation(activation))


def _trial(call: Any, spec: TransformSpec, scene: Any) -> list[torch.Tensor]:
    return [call(hidden_states=scene.hidden_states(1, 3, spec.hidden_size))]


def pattern_of(parts: TransformParts) -> Pattern:
    """How a transform with these children is recognised and proven."""
    return Pattern("transform", "transform", Transform, functools.partial(_recognise, parts), _trial)
