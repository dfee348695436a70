"""Linear layers: `y = x W^T + b` over the weights where they are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfopt import functional
from hfopt.errors import InvalidInput, UnsupportedModel
from hfopt.functional import LinearWeights, MixedWeights, QuantizedWeights, Weights
from hfopt.patches.guards import DO_NOTHING, are_readable, is_bare
from hfopt.patches.pattern import Pattern
from hfopt.patches.quantized import QuantizedLinear, read_quantized
from hfopt.patches.replacement import Record, Replacement, original_class
from hfopt.program.builder import Builder
from hfopt.program.writer import Slot


@dataclass(frozen=True)
class LinearSpec:
    in_features: int
    out_features: int
    bias: bool

    reads = ("",)


def is_linear(module: nn.Module | None) -> bool:
    """Whether the module is torch's own Linear or one of ours, not an adapter's or another library's."""
    return module is not None and original_class(module) in (nn.Linear, QuantizedLinear)


def read_weights(record: Record, role: str, linears: Sequence[Any]) -> Weights | None:
    """The weights of these Linears as one record, or None where kernels cannot read them."""
    quantized = [isinstance(linear, QuantizedLinear) for linear in linears]
    if not any(quantized):
        return _read_floats(record, role, linears)
    if all(quantized):
        known = read_quantized(record, role, linears)
        if known is not None or len(linears) == 1:
            return known
    parts = [read_weights(record, f"{role} {index}", (linear,)) for index, linear in enumerate(linears)]
    found = [part for part in parts if isinstance(part, LinearWeights | QuantizedWeights)]
    try:
        return MixedWeights(tuple(found)) if len(found) == len(parts) else None
    except InvalidInput:
        return None


def _read_floats(record: Record, role: str, linears: Sequence[Any]) -> LinearWeights | None:
    weights = [linear._parameters["weight"] for linear in linears]
    biases = [linear._parameters["bias"] for linear in linears]
    known = record.weights.get(role)
    if isinstance(known, LinearWeights) and known.reads(weights, biases):
        return known
    # a stale record would keep the old weights in memory
    record.weights.pop(role, None)
    if any(type(weight) is not nn.Parameter for weight in weights):
        return None
    try:
        known = record.weights[role] = LinearWeights.of(weights, biases)
    except InvalidInput:
        return None
    return known


def read_children(module: Replacement, role: str, names: Sequence[str]) -> Weights | None:
    """The weights of these children, or None if one has to be called itself (an adapter, a hook)."""
    children = module._modules
    linears = [children[name] for name in names]
    for linear in linears:
        if not is_linear(linear) or not is_bare(linear):  # type: ignore[arg-type]
            return None
    return read_weights(module._hfopt, role, linears)


def weights_of(module: Replacement, role: str, names: Sequence[str]) -> Weights:
    """`read_children`, for a program; raises UnsupportedModel."""
    weights = read_children(module, role, names)
    if weights is None:
        raise UnsupportedModel(f"{', '.join(names)} cannot be read by a kernel as they are")
    return weights


def can_multiply(weights: Iterable[Weights], tensors: Sequence[torch.Tensor]) -> bool:
    """Whether kernels can read these tensors, inputs and residuals, beside these weights."""
    dtype = tensors[0].dtype
    return all(each.dtype in (None, dtype) for each in weights) and are_readable(tensors, dtype)


def are_others_bare(module: Replacement) -> bool:
    """Whether the children that are no such Linears (activations, dropouts) may be bypassed."""
    reads = module._hfopt.spec.reads
    others = ((name, child) for name, child in module._modules.items() if name not in reads)
    return all(_may_be_bypassed(module, name, child) and is_bare(child) for name, child in others)  # type: ignore[arg-type]


def bypass_obstacle(module: Replacement) -> str | None:
    """In words, which child has become something that cannot be bypassed; None if there is none."""
    reads = module._hfopt.spec.reads
    for name, child in module._modules.items():
        if name not in reads and not _may_be_bypassed(module, name, child):
            return f"{name} is a {type(child).__name__} now"
    return None


def _may_be_bypassed(module: Replacement, name: str, child: Any) -> bool:
    if name == getattr(module._hfopt.spec, "activation_module", None):
        return child is not None
    return type(child) in DO_NOTHING


class Linear(Replacement):
    """Replaces `nn.Linear`, or goes on top of `QuantizedLinear`."""

    def compute(self, hidden_states: Any, **roles: Any) -> torch.Tensor | None:
        weights = read_weights(self._hfopt, "own", (self,))
        if weights is None or not can_multiply((weights,), (hidden_states,)):
            return None
        return functional.linear(hidden_states.contiguous(), weights, by=self._hfopt.kernels)

    def emit(self, builder: Builder, x: Slot, is_last: bool = False) -> Slot:
        """The layer as an instruction."""
        weights = read_weights(self._hfopt, "own", (self,))
        if weights is None:
            raise UnsupportedModel("a kernel cannot read its weights")
        return builder.linear(x, weights, is_last=is_last)


def _recognise(module: Any) -> LinearSpec | None:
    if type(module) not in (nn.Linear, QuantizedLinear):
        return None
    return LinearSpec(module.in_features, module.out_features, module.bias is not None)


def _trial(call: Any, spec: LinearSpec, scene: Any) -> list[torch.Tensor]:
    return [call(hidden_states=scene.hidden_states(1, 3, spec.in_features))]


LINEAR = Pattern("linear", "linear", Linear, _recognise, _trial)
