"""The matrices of Linears as records that kernels read, floats or quantised, in place."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from hfopt.errors import InvalidInput
from hfopt.functional import LinearWeights, MixedWeights, QuantizedWeights, Weights
from hfopt.functional.linear import Rows
from hfopt.host import Conv1D, base_layer, by_outputs, is_linear_class
from hfopt.patches.adapters import AdaptedWeights
from hfopt.patches.guards import is_bare
from hfopt.patches.quantized import QuantizedLinear, read_quantized
from hfopt.patches.replacement import Record, Replacement, original_class


def is_linear(module: nn.Module | None) -> bool:
    """Whether the module is a Linear of torch or transformers, or one of ours, not an adapter's or another library's."""
    if module is None:
        return False
    kind: Any = original_class(module)
    return kind in (QuantizedLinear, Conv1D) or is_linear_class(kind)


def is_read_as_linear(module: nn.Module | None) -> bool:
    """Whether the module is such a Linear, or one with adapters around it."""
    return module is not None and is_linear(base_layer(module))


def lay_by_outputs(linear: Any) -> bool:
    """Let the weight [in, out] of a Conv1D lie in memory as kernels read it: the same parameter, of this shape, with other
    strides. False if it lies so, or is none that kernels read.
    """
    weight = linear._parameters["weight"]
    if type(weight) is not nn.Parameter or not weight.is_cpu or weight.t().is_contiguous():
        return False
    weight.data = weight.data.t().contiguous().t()
    return True


def lay_by_inputs(linear: Any) -> None:
    """Undo `lay_by_outputs`."""
    weight = linear._parameters["weight"]
    weight.data = weight.data.contiguous()


def read_weights(record: Record, role: str, linears: Sequence[Any], rows: Rows = ()) -> Weights | None:
    """The weights of these Linears as one record, or None where kernels cannot read them.

    rows: (first row, rows) of the matrices that a single Linear is read as.
    """
    quantized = [isinstance(linear, QuantizedLinear) for linear in linears]
    if not any(quantized):
        return _read_floats(record, role, linears, rows)
    if all(quantized):
        known = read_quantized(record, role, linears, rows)
        if known is not None or len(linears) == 1:
            return known
    parts = [read_weights(record, f"{role} {index}", (linear,), rows) for index, linear in enumerate(linears)]
    found = [part for part in parts if isinstance(part, LinearWeights | QuantizedWeights)]
    try:
        return MixedWeights(tuple(found)) if len(found) == len(parts) else None
    except InvalidInput:
        return None


def _read_floats(record: Record, role: str, linears: Sequence[Any], rows: Rows) -> LinearWeights | None:
    weights: list[Any] = [by_outputs(linear, linear._parameters["weight"]) for linear in linears]
    biases = [linear._parameters["bias"] for linear in linears]
    known = record.weights.get(role)
    if isinstance(known, LinearWeights) and known.reads(weights, biases):
        return known
    # a stale record would keep the old weights in memory
    record.weights.pop(role, None)
    if any(type(linear._parameters["weight"]) is not nn.Parameter for linear in linears):
        return None
    try:
        known = record.weights[role] = LinearWeights.of(weights, biases, rows)
    except InvalidInput:
        return None
    return known


def read_children(module: Replacement, role: str, names: Sequence[str], rows: Rows = ()) -> Weights | None:
    """The weights of these children, or None if one has to be called itself (a hook, an adapter of an unknown kind); without
    names those of the module itself."""
    if not names:
        return read_weights(module._hfopt, role, (module,), rows)
    children = module._modules
    given: list[Any] = [children[name] for name in names]
    linears: list[Any] = [each if each is None else base_layer(each) for each in given]
    for linear in linears:
        if not is_linear(linear) or not is_bare(linear):
            return None
    found = read_weights(module._hfopt, role, linears, rows)
    layers = tuple(None if each is base else each for each, base in zip(given, linears, strict=True))
    return found if found is None or layers == (None,) * len(layers) else AdaptedWeights(found, layers, rows)
