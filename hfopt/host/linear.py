"""Classes of transformers that are linear layers, besides torch's own."""

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

__all__ = ["Conv1D", "is_linear_class"]

_TOLERANCE = 1e-5


@functools.cache
def is_linear_class(kind: Any) -> bool:
    """Whether modules of this class compute `x W^T + b` of weight [out, in] and bias, as a small one of them shows."""
    if kind is nn.Linear:
        return True
    if not issubclass(kind, nn.Linear) or not kind.__module__.startswith("transformers."):
        return False
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for bias in (True, False):
                linear = kind(5, 3, bias=bias)
                x = torch.randn(2, 4, 5)
                expected = F.linear(x, linear.weight, linear.bias)
                if set(vars(linear)) != set(vars(nn.Linear(5, 3))) or not torch.allclose(
                    linear(x), expected, atol=_TOLERANCE
                ):
                    return False
    except Exception:  # noqa: BLE001  (whatever a foreign class raises)
        return False
    return True
