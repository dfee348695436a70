"""Linear layers with what follows them in the same kernel."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hfopt import functional
from hfopt.errors import InvalidInput
from hfopt.functional import ACTIVATIONS, Weights
from hfopt.host import Features
from hfopt.modules.guards import are_readable, is_plain_call, is_unhooked
from hfopt.modules.records import Records
from hfopt.modules.weights import is_linear, read_weights


class FusedLinear(nn.Module):
    """What the Linear blocks have in common: Linears, read together, and what follows their products in the same kernel.

    A Linear is a `torch.nn.Linear`, one of hfopt's quantised ones, or a Conv1D of transformers (read by kernels where
    `hfopt.optimize` has laid out its weight for them). It is shared: kernels read the parameters that it has at the call.
    Linear layers with many rows run in torch's kernels where those are faster on this machine (`functional.choice`).
    In hfopt's, all is float32 and rounded once.

    The modules themselves are called, and torch's operations do the rest, where kernels would pass over something (hooks, a
    forward of one's own, a parametrisation, an adapter), where gradients or autocast are needed, and for other dtypes and
    devices than those that kernels know.

    Tensors are float32, bfloat16 or float16, of any strides, all of the dtype of the weight. Raises `InvalidInput` (a
    `ValueError`) for other shapes and dtypes, TypeError for what is no module or no tensor.
    """

    activation: ClassVar[str | None] = None  # of the (first) product

    def __init__(self, **linears: nn.Module) -> None:
        super().__init__()
        for name, linear in linears.items():
            if not isinstance(linear, nn.Module):
                raise TypeError(f"{name} is a {type(linear).__name__}: a Linear is needed")
            self.add_module(name, linear)
        sizes = [Features.of(linear) for linear in linears.values() if is_linear(linear)]
        if len(set(sizes)) > 1:
            raise InvalidInput(f"{' and '.join(linears)} have sizes {sizes}: one is needed")
        self._names = tuple(linears)
        self._records = Records()

    def compute(
        self, x: Tensor, residuals: Mapping[str, Tensor], factor: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """activation(y) times the factor plus residuals, for the y of the only Linear; activation(y0) * y1 of two."""
        linears: list[Any] = [self._modules[name] for name in self._names]
        others = {**(factor or {}), **residuals}
        _check_inputs(x, others, linears)
        weights = self._read(linears, x, others)
        if weights is None:
            return self._compute_in_torch(linears, x, residuals, factor)
        shape = (*x.shape[:-1], weights.sizes[0])
        _check_others(others, shape, x.dtype)
        added = [each.contiguous() for each in residuals.values()]
        activation, is_gated = (None if factor else self.activation), len(linears) == 2
        y = functional.linear(
            x.contiguous(), weights, activation=activation, gated=is_gated, residuals=added, by="auto"
        )
        if factor:
            (by,) = factor.values()
            functional.activated_product(self.activation, y, by, out=y)
        return y

    def _read(self, linears: list[Any], x: Tensor, others: Mapping[str, Tensor]) -> Weights | None:
        """The weights, where kernels may stand for this call."""
        given = (x, *others.values())
        if torch.compiler.is_compiling() or not is_plain_call(self, given, {}):
            return None
        if not all(is_linear(linear) and is_unhooked(linear) for linear in linears):
            return None
        weights = read_weights(self._records, "own", linears)
        if weights is None or not are_readable(given, weights.dtype or x.dtype):
            return None
        return weights

    def _compute_in_torch(
        self,
        linears: Sequence[Any],
        x: Tensor,
        residuals: Mapping[str, Tensor],
        factor: Mapping[str, Tensor] | None,
    ) -> Tensor:
        first, *rest = [linear(x) for linear in linears]
        _check_others({**(factor or {}), **residuals}, first.shape, first.dtype)
        y: Tensor = first if self.activation is None else ACTIVATIONS[self.activation](first)
        for each in (*rest, *(factor or {}).values()):
            y = y * each
        for each in residuals.values():
            y = y + each
        return y


def _check_inputs(x: Any, others: Mapping[str, Any], linears: Sequence[Any]) -> None:
    for name, each in {"x": x, **others}.items():
        if not isinstance(each, Tensor):
            raise TypeError(f"{name} is a {type(each).__name__}: a torch.Tensor is needed")
    for linear in linears:
        if not is_linear(linear):
            continue
        n_inputs = Features.of(linear).inputs
        if x.ndim == 0 or x.shape[-1] != n_inputs:
            raise InvalidInput(f"x has shape {tuple(x.shape)}: [..., {n_inputs}] is needed")
        weight = linear._parameters.get("weight")
        if weight is not None and x.dtype is not weight.dtype and not torch.is_autocast_enabled("cpu"):
            raise InvalidInput(f"x has dtype {x.dtype}: that of the weight, {weight.dtype}, is needed")


def _check_others(others: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
    for name, each in others.items():
        if each.shape != tuple(shape) or each.dtype is not dtype:
            raise InvalidInput(
                f"{name} has shape {tuple(each.shape)} and dtype {each.dtype}: "
                f"{tuple(shape)} and {dtype} are needed"
            )
