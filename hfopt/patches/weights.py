"""Linear layers of a replaced module: their weights as one record, and how those of a Conv1D lie."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from hfopt.functional import Weights
from hfopt.functional.linear import Rows
from hfopt.modules.guards import is_bare
from hfopt.modules.weights import is_linear, read_weights
from hfopt.patches.replacement import Replacement


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
    """The weights of these children, or None if one has to be called itself (an adapter, a hook); without names those of
    the module itself."""
    if not names:
        return read_weights(module._hfopt, role, (module,), rows)
    children = module._modules
    linears = [children[name] for name in names]
    for linear in linears:
        if not is_linear(linear) or not is_bare(linear):  # type: ignore[arg-type]
            return None
    return read_weights(module._hfopt, role, linears, rows)
