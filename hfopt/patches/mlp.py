"""Feed-forward blocks: gated, `down(act(gate(x)) * up(x))`, and plain, `out(act(in(x)))`."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfopt import functional
from hfopt.errors import UnsupportedModel
from hfopt.functional import Weights
from hfopt.patches.activation import fused_activation, match_activation
from hfopt.patches.linear import (
    are_others_bare,
    bypass_obstacle,
    can_multiply,
    is_linear,
    read_children,
    weights_of,
)
from hfopt.patches.pattern import Pattern, has_children, owns_nothing, takes_one_input
from hfopt.patches.replacement import Record, Replacement
from hfopt.program.builder import Builder
from hfopt.program.writer import Slot


@dataclass(frozen=True)
class MlpSpec:
    """Names of the children, and the kernels' activation between them (None: it runs in torch)."""

    inputs: tuple[str, ...]
    activation_module: str
    output: str
    hidden_size: int
    intermediate_size: int
    activation: str | None

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)


def activate(
    record: Record, activation: nn.Module, hidden_states: torch.Tensor, weights: Weights
) -> torch.Tensor:
    """`act(x W^T + b)`; the activation runs as an epilogue where the kernels know it, else in torch."""
    name = fused_activation(record, activation)
    if name is not None:
        return functional.linear(hidden_states, weights, activation=name, by=record.kernels)
    return activation(functional.linear(hidden_states, weights, by=record.kernels))


def activation_of(record: Record, activation: Any) -> str:
    """Name of the kernels' activation that the module computes; raises UnsupportedModel if there is none."""
    name = fused_activation(record, activation)
    if name is None:
        raise UnsupportedModel(f"{type(activation).__name__} is no activation of the kernels")
    return name


class Mlp(Replacement):
    """What gated and plain blocks share."""

    def project_in(self, hidden_states: torch.Tensor, weights: Weights, activation: Any) -> torch.Tensor:
        """Everything before the last Linear."""
        raise NotImplementedError

    def feed(
        self, hidden_states: torch.Tensor, residuals: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor | None:
        """The block's output plus the residuals, or None if kernels cannot do it."""
        spec = self._hfopt.spec
        inputs = read_children(self, "inputs", spec.inputs)
        output = read_children(self, "output", (spec.output,))
        if inputs is None or output is None or not are_others_bare(self):
            return None
        if not can_multiply((inputs, output), (hidden_states, *residuals)):
            return None
        inner = self.project_in(hidden_states.contiguous(), inputs, self._modules[spec.activation_module])
        residuals = [residual.contiguous() for residual in residuals]
        return functional.linear(inner, output, residuals=residuals, by=self._hfopt.kernels)

    def compute(self, hidden_states: Any, **roles: Any) -> torch.Tensor | None:
        return self.feed(hidden_states)

    def idle_reason(self) -> str | None:
        return super().idle_reason() or bypass_obstacle(self)

    def emit(self, builder: Builder, x: Slot, residuals: Sequence[Slot]) -> Slot:
        """`feed` as instructions."""
        spec = self._hfopt.spec
        inputs, output = weights_of(self, "inputs", spec.inputs), weights_of(self, "output", (spec.output,))
        name = activation_of(self._hfopt, self._modules[spec.activation_module])
        inner = builder.linear(x, inputs, activation=name, gated=len(spec.inputs) == 2)
        out = builder.linear(inner, output, residuals=residuals)
        builder.release(inner)
        return out


class GatedMlp(Mlp):
    """`down(act(gate(x)) * up(x))`."""

    def project_in(self, hidden_states: torch.Tensor, weights: Weights, activation: Any) -> torch.Tensor:
        name, by = fused_activation(self._hfopt, activation), self._hfopt.kernels
        if name is not None:
            return functional.linear(hidden_states, weights, activation=name, gated=True, by=by)
        gate, up = functional.linear(hidden_states, weights, by=by).chunk(2, dim=-1)
        product: torch.Tensor = activation(gate) * up
        return product


class PlainMlp(Mlp):
    """`out(act(in(x)))`."""

    def project_in(self, hidden_states: torch.Tensor, weights: Weights, activation: Any) -> torch.Tensor:
        return activate(self._hfopt, activation, hidden_states, weights)


@dataclass(frozen=True)
class _Names:
    inputs: tuple[str, ...]
    output: str


_GATED = (_Names(("gate_proj", "up_proj"), "down_proj"),)
_PLAIN = (
    _Names(("fc_in",), "fc_out"),
    _Names(("fc1",), "fc2"),
    _Names(("c_fc",), "c_proj"),
    _Names(("up_proj",), "down_proj"),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act")


def _recognise(module: Any, candidates: Sequence[_Names]) -> MlpSpec | str | None:
    activation = next((name for name in _ACTIVATIONS if name in module._modules), None)
    if activation is None:
        return None
    for names in candidates:
        linears = (*names.inputs, names.output)
        if has_children(module, (*linears, activation), ("dropout",)):
            break
    else:
        return None
    if not owns_nothing(module) or not takes_one_input(module):
        return None
    wrapped = next((name for name in linears if not is_linear(module._modules[name])), None)
    if wrapped is not None:
        return f"{wrapped} is a {type(module._modules[wrapped]).__name__}, not a plain Linear"
    first, output = module._modules[names.inputs[0]], module._modules[names.output]
    matched = match_activation(module._modules[activation])
    return MlpSpec(names.inputs, activation, names.output, first.in_features, output.in_features, matched)


def _trial(call: Any, spec: MlpSpec, scene: Any) -> list[torch.Tensor]:
    usual, large = scene.hidden_states(3, spec.hidden_size), 32 * scene.hidden_states(3, spec.hidden_size)
    # the large input shows limits that a module sets to its activations
    return list(call(hidden_states=torch.stack([usual, large])))


GATED_MLP = Pattern("gated_mlp", "mlp", GatedMlp, lambda module: _recognise(module, _GATED), _trial)
PLAIN_MLP = Pattern("plain_mlp", "mlp", PlainMlp, lambda module: _recognise(module, _PLAIN), _trial)
