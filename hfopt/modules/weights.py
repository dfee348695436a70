"""The matrices of Linears as records that kernels read, floats or quantised, in place."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from hfopt.errors import InvalidInput
from hfopt.functional import LinearWeights, MixedWeights, QuantizedWeights, Weights
from hfopt.functional.linear import Rows
from hfopt.host import Conv1D, Features, by_outputs, is_linear_class
from hfopt.modules.quantized import QuantizedLinear, read_quantized
from hfopt.modules.records import Records
from hfopt.modules.sharded import ShardedLinear, is_part


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module has without us."""
    original: type[nn.Module] = type(module).__dict__.get("_hfopt_original", type(module))
    return original


def is_linear(module: nn.Module | None) -> bool:
    """Whether the module is a Linear of torch or transformers, or one of ours, not an adapter's or another library's."""
    if module is None:
        return False
    kind: Any = original_class(module)
    return kind in (QuantizedLinear, ShardedLinear, Conv1D) or is_linear_class(kind)


def features_of(linear: Any) -> Features:
    """Sizes of a linear layer as the modules around it see them."""
    own = Features.of(linear)
    return linear.shard.features(own) if is_part(linear) else own


def read_weights(record: Records, role: str, linears: Sequence[Any], rows: Rows = ()) -> Weights | None:
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


def _read_floats(record: Records, role: str, linears: Sequence[Any], rows: Rows) -> LinearWeights | None:
    weights: list[Any] = [linear._parameters["weight"] for linear in linears]
    if any(type(weight) is not nn.Parameter for weight in weights):
        record.weights.pop(role, None)
        return None
    weights = [by_outputs(*each) for each in zip(linears, weights, strict=True)]
    biases = [linear._parameters["bias"] for linear in linears]
    known = record.weights.get(role)
    if isinstance(known, LinearWeights) and known.reads(weights, biases):
        return known
    # a stale record would keep the old weights in memory
    record.weights.pop(role, None)
    try:
        known = record.weights[role] = LinearWeights.of(weights, biases, rows)
    except InvalidInput:
        return None
    return known
