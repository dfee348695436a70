"""Feed-forward blocks: gated, `output(act(gate(x)) * up(x))`, and plain, `output(act(input(x)))`."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfopt.functional import Epilogue
from hfopt.functional.linear import Rows
from hfopt.host import base_layer
from hfopt.modules.guards import DO_NOTHING
from hfopt.modules.weights import features_of
from hfopt.patches.activation import match_activation
from hfopt.patches.block import Block
from hfopt.patches.families.family import MlpParts
from hfopt.patches.ops import Ops, X
from hfopt.patches.pattern import Pattern, has_children, owned, takes_only
from hfopt.patches.weights import is_read_as_linear


@dataclass(frozen=True)
class MlpSpec:
    """Names of the children, and the kernels' activation between them (None: it runs in torch).

    rows: (first row, rows) of the matrices that a single input holds. sub_norm: as in `MlpParts`.
    """

    inputs: tuple[str, ...]
    activation: str
    output: str
    rows: Rows
    hidden_size: int
    activation_name: str | None
    sub_norm: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return () if self.sub_norm is None else (self.sub_norm,)

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)


class Mlp(Block):
    """What gated and plain blocks share."""

    gated = False
    takes = frozenset({"hidden_states", "residual"})

    def run(self, ops: Ops[X], x: X, residuals: Sequence[X] = ()) -> X:
        spec = self._hfopt.spec
        inputs = ops.weights(self, "inputs", spec.inputs, spec.rows)
        output = ops.weights(self, "output", (spec.output,))
        inner = ops.activate(self, spec.activation, x, inputs, gated=self.gated)
        if spec.sub_norm is not None:
            inner = ops.part(self, spec.sub_norm, inner)
        return ops.linear(inner, output, Epilogue(residuals=residuals))


class GatedMlp(Mlp):
    """`output(act(gate(x)) * up(x))`."""

    gated = True


class PlainMlp(Mlp):
    """`output(act(input(x)))`."""


def _recognise(parts: MlpParts, module: Any) -> MlpSpec | str | None:
    linears = (*parts.inputs, parts.output)
    sub_norm = parts.sub_norm if module._modules.get(parts.sub_norm) is not None else None
    known = (*linears, *(() if sub_norm is None else (sub_norm,)))
    others = (name for name, child in module._modules.items() if child is not None and name not in known)
    activation = next((name for name in others if type(module._modules[name]) not in DO_NOTHING), None)
    if activation is None or not has_children(module, (*known, activation)):
        return None
    if owned(module) or not takes_only(module, Mlp.takes):
        return None
    wrapped = next((name for name in linears if not is_read_as_linear(module._modules[name])), None)
    if wrapped is not None:
        return f"{wrapped} is a {type(module._modules[wrapped]).__name__}, not a plain Linear"
    first, output = (
        features_of(base_layer(module._modules[name])) for name in (parts.inputs[0], parts.output)
    )
    n = output.inputs
    rows = ((0, n), (n, n)) if parts.is_fused else ()
    if first.outputs != n * max(len(rows), 1):
        return "its Linears do not fit together"
    matched = match_activation(module._modules[activation])
    return MlpSpec(parts.inputs, activation, parts.output, rows, first.inputs, matched, sub_norm)


def _trial(call: Any, spec: MlpSpec, scene: Any) -> list[torch.Tensor]:
    usual, large = scene.hidden_states(3, spec.hidden_size), 32 * scene.hidden_states(3, spec.hidden_size)
    # the large input shows limits that a module sets to its activations
    inputs = torch.stack([usual, large])
    return list(call(hidden_states=inputs, residual=inputs.flip(-1)))


def pattern_of(parts: MlpParts) -> Pattern:
    """How a block with these children is recognised and proven."""
    name, replacement = ("gated_mlp", GatedMlp) if parts.is_gated else ("plain_mlp", PlainMlp)
    return Pattern(name, "mlp", replacement, functools.partial(_recognise, parts), _trial)
