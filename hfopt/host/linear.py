"""Linear layers: torch's own, and the classes of transformers that are such too."""

import functools
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

__all__ = ["LINEARS", "Conv1D", "Features", "by_outputs", "is_linear_class"]

# Those that may get a packed weight. A Conv1D, of GPT-2, has its weight as [in, out].
LINEARS = (nn.Linear, Conv1D)

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


class Features(NamedTuple):
    """Sizes of a linear layer."""

    inputs: int
    outputs: int

    @classmethod
    def of(cls, linear: Any) -> "Features":
        """Those of such a module."""
        if isinstance(linear, Conv1D):
            return cls(linear.nx, linear.nf)
        return cls(linear.in_features, linear.out_features)


def by_outputs(linear: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight of this linear layer as [out, in], as a view where the layer has it the other way round."""
    return weight.t() if isinstance(linear, Conv1D) else weight
