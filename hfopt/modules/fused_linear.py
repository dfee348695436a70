"""Linear layers with what follows them in the same kernel."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hfopt import functional
from hfopt.errors import InvalidInput
from hfopt.functional import ACTIVATIONS, Epilogue, Weights
from hfopt.functional.checks import check_beside
from hfopt.functional.strided import dense
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
        others = residuals if factor is None else {**factor, **residuals}
        weights = self._read(linears, x, others)
        if weights is None:
            _check_inputs(x, others, linears)
            return self._compute_in_torch(linears, x, others, factor is not None)
        shape = x.shape
        if not shape or shape[-1] != weights.in_features:
            raise InvalidInput(f"x has shape {tuple(shape)}: [..., {weights.in_features}] is needed")
        if others:
            _check_others(others, (*shape[:-1], weights.sizes[0]), x.dtype)
        added = [dense(name, each)[0] for name, each in residuals.items()]
        epilogue = Epilogue(None if factor else self.activation, len(linears) == 2, added)
        y = weights.multiply(dense("x", x)[0], epilogue, "auto")
        if factor:
            (by,) = factor.values()
            functional.activated_product(self.activation, y, by, out=y)
        return y

    def _read(self, linears: list[Any], x: Tensor, others: Mapping[str, Tensor]) -> Weights | None:
        """The weights, where kernels may stand for this call."""
        given = (x, *others.values())
        if torch.compiler.is_compiling() or not is_plain_call(self, given, {}):
            return None
        for linear in linears:
            if not (is_linear(linear) and is_unhooked(linear)):
                return None
        weights = read_weights(self._records, "own", linears)
        if weights is None or not isinstance(x, Tensor) or not are_readable(given, weights.dtype or x.dtype):
            return None
        return weights

    def _compute_in_torch(
        self,
        linears: Sequence[Any],
        x: Tensor,
        others: Mapping[str, Tensor],
        is_product: bool,
    ) -> Tensor:
        first, *rest = [linear(x) for linear in linears]
        _check_others(others, first.shape, first.dtype)
        y: Tensor = first if self.activation is None else ACTIVATIONS[self.activation](first)
        for each in rest:
            y = y * each
        for each in others.values():
            y = y * each if is_product else y + each
        return y


def _check_inputs(x: Any, others: Mapping[str, Any], linears: Sequence[Any]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}: a torch.Tensor is needed")
    own = [each for linear in linears if is_linear(linear) for each in linear.named_parameters(recurse=False)]
    like = own[0][1] if own else x
    for name, each in [("x", x), *others.items(), *own]:
        check_beside(name, each, like)
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
        is_cast = torch.is_autocast_enabled("cpu")  # torch promotes then
        if each.shape != shape or (each.dtype is not dtype and not is_cast):
            raise InvalidInput(
                f"{name} has shape {tuple(each.shape)} and dtype {each.dtype}: "
                f"{tuple(shape)} and {dtype} are needed"
            )
