"""The activations that `linear` can apply in its epilogue."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hfopt.kernels.linear import activation as codes


class Activation(NamedTuple):
    """What the kernels call an activation, and the torch function that defines it."""

    code: int
    reference: Callable[[Tensor], Tensor]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


_RECORDS = {
    "relu": Activation(codes.RELU, F.relu),
    "silu": Activation(codes.SILU, F.silu),
    "gelu": Activation(codes.GELU, F.gelu),
    "gelu_tanh": Activation(codes.GELU_TANH, partial(F.gelu, approximate="tanh")),
    "quick_gelu": Activation(codes.QUICK_GELU, _quick_gelu),
    "tanh": Activation(codes.TANH, torch.tanh),
    "sigmoid": Activation(codes.SIGMOID, torch.sigmoid),
    "relu_squared": Activation(codes.RELU_SQUARED, _relu_squared),
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: record.reference for name, record in _RECORDS.items()
}
CODES: dict[str | None, int] = {None: codes.NONE} | {name: record.code for name, record in _RECORDS.items()}
