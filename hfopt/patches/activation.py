"""Which of the kernels' activations a module computes, told by its values."""

import functools

import torch
from torch import nn

from hfopt.functional import ACTIVATIONS
from hfopt.patches.facts import Facts
from hfopt.patches.replacement import Record

_RELATIVE, _ABSOLUTE = 1e-4, 2e-6
_STATE = ("_parameters", "_buffers", "_modules")  # where a change would not be seen


@functools.cache
def _grid() -> torch.Tensor:
    fine = torch.linspace(-12, 12, 1537)
    return torch.cat([fine, fine / 64, torch.tensor([-300.0, -100.0, -20.0, 20.0, 100.0, 300.0])])


@functools.cache
def _references() -> dict[str, torch.Tensor]:
    return {name: function(_grid()) for name, function in ACTIVATIONS.items()}


def match_activation(activation: nn.Module) -> str | None:
    """Name in `functional.ACTIVATIONS` of what the module computes, None if it is none of them."""
    if not callable(activation) or any(vars(activation)[name] for name in _STATE):
        return None
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        values = activation.forward(_grid().clone())  # some work in place
        if not isinstance(values, torch.Tensor) or values.shape != _grid().shape:
            return None
        for name, reference in _references().items():
            if torch.allclose(values, reference, rtol=_RELATIVE, atol=_ABSOLUTE):
                return name
    return None


def fused_activation(record: Record, activation: nn.Module) -> str | None:
    """The name for this very module, remembered until the model gets another one in its place, or it has changed."""
    known = record.activation
    if known is None or known[0] is not activation or not known[1].hold(activation):
        facts = Facts.of(activation)  # before the match: whatever changes meanwhile has changed then
        known = record.activation = (activation, facts, match_activation(activation))
    return known[2]
