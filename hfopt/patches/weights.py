"""Linear layers of a replaced module: their weights as one record, and how those of a Conv1D lie."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from hfopt.functional import Weights
from hfopt.functional.linear import Rows
from hfopt.host import base_layer
from hfopt.modules.guards import is_bare
from hfopt.modules.sharded import is_part
from hfopt.modules.weights import is_linear, read_weights
from hfopt.patches.adapters import AdaptedWeights
from hfopt.patches.replacement import Replacement
from hfopt.patches.sharded import ShardedWeights


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


def read_children(module: Replacement, role: str, names: Sequence[str], rows: Rows = ()) -> Weights | None:
    """The weights of these children, or None if one has to be called itself (a hook, an adapter of an unknown kind); without
    names those of the module itself."""
    if not names:
        return _read(module, role, (module,), rows)
    children = module._modules
    given: list[Any] = [children[name] for name in names]
    linears: list[Any] = [each if each is None else base_layer(each) for each in given]
    for linear in linears:
        if not is_linear(linear) or not is_bare(linear):
            return None
    found = _read(module, role, linears, rows)
    layers = tuple(None if each is base else each for each, base in zip(given, linears, strict=True))
    return found if found is None or layers == (None,) * len(layers) else AdaptedWeights(found, layers, rows)


def _read(module: Replacement, role: str, linears: Sequence[Any], rows: Rows) -> Weights | None:
    """The weights of these Linears, of which this process may have parts; None also where parts of several would have to be
    put together.
    """
    shards = [each.shard for each in linears if is_part(each)]
    if not any(each.sums or each.gathers for each in shards):
        return read_weights(module._hfopt, role, linears, rows)
    gather = len(shards) == len(linears) and all(each.gathers for each in shards)
    if not gather and len(linears) > 1:
        return None
    ends = [first + n for first, n in rows]
    # what is put together is in the order of rows
    if rows and (not gather or [first for first, _ in rows] != [0, *ends[:-1]] or ends[-1] != shards[0].n):
        return None
    found = read_weights(module._hfopt, role, linears)
    return None if found is None else ShardedWeights(found, tuple(shards), tuple(n for _, n in rows))
