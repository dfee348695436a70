"""Activations of transformers that have numbers of their own."""

from typing import Any

from torch import Tensor

_XIELU = (("alpha_p", "alpha_n"), ("beta", "eps"))  # parameters, buffers


def xielu_numbers(activation: Any) -> tuple[Tensor, ...] | None:
    """(alpha_p, alpha_n, beta, eps) of what may be xIELU; None of anything else."""
    owned = activation._parameters, activation._buffers
    if any(set(found) != set(names) for found, names in zip(owned, _XIELU, strict=True)):
        return None
    numbers = [found[name] for found, names in zip(owned, _XIELU, strict=True) for name in names]
    if activation._modules or any(each is None or each.numel() != 1 for each in numbers):
        return None
    return tuple(each.detach() for each in numbers)
