"""RMSNorm and LayerNorm as modules, under the names of `ipex.llm.modules`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfopt import functional
from hfopt.errors import InvalidInput
from hfopt.functional.checks import check_beside, check_shape, plain_address
from hfopt.functional.norm import sizes_of
from hfopt.functional.scalars import finite, integer
from hfopt.modules.guards import are_readable, is_plain_call
from hfopt.words import DTYPES


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension (https://arxiv.org/abs/1910.07467).

    In float32, rounded once. x [..., hidden_size] is float32, bfloat16 or float16, of any strides; the weight is of its
    dtype or float32. With gradients or autocast, and for other dtypes, torch's own norm runs.

    Args:
        hidden_size: of the last dimension.
        eps: what is added to the mean.
        weight: [hidden_size], shared; None: ones, a new parameter.

    Raises `InvalidInput` (a `ValueError`) for other shapes and dtypes.

    >>> import torch
    >>> from hfopt.modules import RMSNorm
    >>> RMSNorm(64, eps=1e-5)(torch.randn(2, 3, 64)).shape
    torch.Size([2, 3, 64])
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, weight: Tensor | None = None) -> None:
        super().__init__()
        self.hidden_size, self.eps = integer("hidden_size", hidden_size), finite("eps", eps, 0)
        self.weight = _parameter(torch.ones(self.hidden_size) if weight is None else weight)
        check_shape("weight", self.weight, (self.hidden_size,))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape."""
        if not _can_read(self, x, (self.hidden_size,)):
            given = x if self.weight.dtype is x.dtype else x.to(self.weight.dtype)
            out = F.rms_norm(given, (self.hidden_size,), self.weight, self.eps)
            return out if given is x else out.to(x.dtype)
        return functional.rms_norm(x, self.weight, self.eps)

    @classmethod
    def apply_function(cls, hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Compute the norm of hidden_states [..., size] with weight [size], without gradients."""
        return functional.rms_norm(hidden_states, weight, eps)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"


class FastLayerNorm(nn.Module):
    """`weight * (x - mean(x)) / sqrt(var(x) + eps) + bias` over the last dimensions (https://arxiv.org/abs/1607.06450).

    In float32, rounded once. x [..., *normalized_shape] is float32, bfloat16 or float16, of any strides; weight and bias
    are of its dtype or float32. With gradients or autocast, and for other dtypes, torch's own norm runs.

    Args:
        normalized_shape: the last dimensions, or the size of the last one.
        eps: what is added to the variance.
        weight: [*normalized_shape], shared.
        bias: the same, or None.

    Raises `InvalidInput` (a `ValueError`) for other shapes and dtypes.

    >>> import torch
    >>> from hfopt.modules import FastLayerNorm
    >>> FastLayerNorm(64, 1e-5, torch.ones(64))(torch.randn(2, 3, 64)).shape
    torch.Size([2, 3, 64])
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.normalized_shape = sizes_of(normalized_shape)
        self.eps = finite("eps", eps, 0)
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)
        for name, each in self.named_parameters():
            check_shape(name, each, self.normalized_shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., *normalized_shape] -> the same shape."""
        if not _can_read(self, x, self.normalized_shape):
            given = x if self.weight.dtype is x.dtype else x.to(self.weight.dtype)
            out = F.layer_norm(given, self.normalized_shape, self.weight, self.bias, self.eps)
            return out if given is x else out.to(x.dtype)
        return functional.fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    @classmethod
    def apply_function(
        cls,
        hidden_states: Tensor,
        normalized_shape: int | Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Compute the norm of hidden_states [..., *normalized_shape], see `functional.fast_layer_norm`."""
        return functional.fast_layer_norm(hidden_states, normalized_shape, weight, bias, eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"


def _parameter(tensor: Tensor) -> nn.Parameter:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"weight or bias is a {type(tensor).__name__}: a torch.Tensor is needed")
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, tensor.requires_grad)


def _can_read(norm: RMSNorm | FastLayerNorm, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether kernels may stand for this call; raises for an x that does not fit."""
    weight = norm.weight
    is_plain = not torch.compiler.is_compiling() and is_plain_call(norm, (x,), {})
    # the usual case by one quick test, which asks the same
    if (
        is_plain
        and type(x) is Tensor
        and plain_address(x, None)
        and x.dtype is weight.dtype
        and weight.is_cpu
        and x.shape[-len(shape) :] == shape
    ):
        return True
    check_beside("x", x, weight)
    fits = x.dtype is weight.dtype or (weight.dtype is torch.float32 and x.dtype in DTYPES)
    if not fits and not torch.is_autocast_enabled("cpu"):
        raise InvalidInput(f"x has dtype {x.dtype}: that of the weight, {weight.dtype}, is needed")
    if tuple(x.shape[-len(shape) :]) != shape:
        raise InvalidInput(f"x has shape {tuple(x.shape)}: the last dimensions are to be {shape}")
    if is_plain and are_readable((x,), x.dtype):
        return True
    for name, each in norm.named_parameters(recurse=False):
        check_beside(name, each, x)
        check_shape(name, each, shape)
    return False
