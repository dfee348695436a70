"""Norms over the last dimension: RMSNorm as Llama computes it, and LayerNorm."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfopt.patches.block import Block
from hfopt.patches.ops import Ops, X
from hfopt.patches.pattern import Pattern, attributes, takes_one_input


@dataclass(frozen=True)
class NormSpec:
    """Size and epsilon of a norm, and which vectors it has."""

    size: int
    eps_name: str
    eps: float
    affine: bool = True
    bias: bool = False

    reads = ("",)
    parts = ()


class RMSNorm(Block):
    """`x / sqrt(mean(x^2) + eps) * weight`."""

    live = ("variance_epsilon", "eps")

    def run(self, ops: Ops[X], x: X) -> X:
        return ops.rms_norm(x, self._parameters["weight"], self.epsilon)

    @property
    def epsilon(self) -> float:
        """The eps of the formula, under whatever name the module has it."""
        eps: float = self.__dict__[self._hfopt.spec.eps_name]
        return eps


class LayerNorm(Block):
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, where there is a weight or a bias."""

    live = ("eps",)

    def run(self, ops: Ops[X], x: X) -> X:
        return ops.layer_norm(x, self._parameters["weight"], self._parameters["bias"], self.__dict__["eps"])


def _recognise_rms_norm(module: Any) -> NormSpec | None:
    weight = module._parameters.get("weight")
    if (
        len(module._parameters) != 1
        or weight is None
        or weight.dim() != 1
        or module._buffers
        or module._modules
    ):
        return None
    eps_name = next((name for name in ("variance_epsilon", "eps") if name in attributes(module)), None)
    if eps_name is None or not isinstance(getattr(module, eps_name), float) or not takes_one_input(module):
        return None
    return NormSpec(weight.shape[0], eps_name, getattr(module, eps_name))


def _recognise_layer_norm(module: Any) -> NormSpec | str | None:
    if not isinstance(module, nn.LayerNorm) or not takes_one_input(module):
        return None
    if len(module.normalized_shape) != 1:
        return "it normalises several dimensions"
    size = module.normalized_shape[0]
    return NormSpec(size, "eps", module.eps, module.weight is not None, module.bias is not None)


def _trial(call: Any, spec: NormSpec, scene: Any) -> list[torch.Tensor]:
    usual, small = scene.hidden_states(3, spec.size), scene.hidden_states(3, spec.size) / 128
    # the small input shows where eps goes
    return list(call(hidden_states=torch.stack([usual, small])))


RMS_NORM = Pattern("rms_norm", "norm", RMSNorm, _recognise_rms_norm, _trial)
LAYER_NORM = Pattern("layer_norm", "norm", LayerNorm, _recognise_layer_norm, _trial)
