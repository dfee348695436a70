"""Norms over the last dimension: RMSNorm and LayerNorm, of whatever class, told apart by the proof."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hfopt.functional import Norm
from hfopt.patches.block import Block
from hfopt.patches.ops import Ops, X
from hfopt.patches.pattern import Pattern, attributes, has_children, takes_only

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_USUAL_EPS = (1e-5, 1e-6)  # what classes that keep none among their attributes have in their code
_ANY_SIZE = 24  # for the proof


@dataclass(frozen=True)
class NormSpec:
    """Shape and epsilon of a norm, and which vectors it has.

    shape: [size], or [n_heads, size] of one for heads that have vectors of their own; None for any size. eps_name: the
    attribute that holds it, if there is one. unit_offset: as in `functional.Norm`.
    """

    shape: tuple[int, ...] | None
    eps_name: str | None
    eps: float
    affine: bool = True
    bias: bool = False
    unit_offset: bool = False

    reads = ("",)
    parts = ()


class NormBlock(Block):
    """`functional.Norm` of the module's own vectors."""

    kind: Literal["rms", "layer"]
    live = _EPS_NAMES

    def run(self, ops: Ops[X], x: X, residuals: Sequence[X] = ()) -> X:
        y = ops.norm(x, self.norm)
        for residual in residuals:
            y = ops.scale(y, 1.0, residual)
        return y

    @property
    def norm(self) -> Norm:
        """What it computes now."""
        spec, parameters = self._hfopt.spec, self._parameters
        eps = spec.eps if spec.eps_name is None else self.__dict__[spec.eps_name]
        return Norm(self.kind, parameters.get("weight"), parameters.get("bias"), eps, spec.unit_offset)


class RMSNorm(NormBlock):
    """`x / sqrt(mean(x^2) + eps) * weight`, or `* (1 + weight)`."""

    kind = "rms"


class LayerNorm(NormBlock):
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, where there is a weight or a bias."""

    kind = "layer"


def _recognise_rms_norm(module: Any) -> list[NormSpec] | None:
    if isinstance(module, nn.LayerNorm):
        return None
    found = _read(module)
    return [each for each in found if not each.bias] or None


def _recognise_layer_norm(module: Any) -> list[NormSpec] | str | None:
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return "it normalises several dimensions"
    return _read(module) or None


def _read(module: Any) -> list[NormSpec]:
    """What the module may be, if it is a norm."""
    names = {name for name, each in module._parameters.items() if each is not None}
    if not names <= {"weight", "bias"} or not has_children(module, ()) or not takes_only(module):
        return []
    state = vars(module)
    known = [each for each in module._buffers.values() if each is not None]
    shapes = {tuple(module._parameters[name].shape) for name in names}
    if not names and "normalized_shape" in state:
        shapes = {tuple(state["normalized_shape"])}
    shape = next(iter(shapes), None)
    if known or len(shapes) > 1 or (shape is not None and len(shape) not in (1, 2)):
        return []
    eps_name = next((name for name in _EPS_NAMES if isinstance(state.get(name), float)), None)
    if eps_name is None and (shape is None or names or any("eps" in name for name in attributes(module))):
        return []
    eps = _USUAL_EPS if eps_name is None else (state[eps_name],)
    offsets = (False, True) if "weight" in names else (False,)
    return [
        NormSpec(shape, eps_name, each, "weight" in names, "bias" in names, offset)
        for offset in offsets
        for each in eps
    ]


def _trial(call: Any, spec: NormSpec, scene: Any) -> list[torch.Tensor]:
    shape = 3, *(spec.shape or (_ANY_SIZE,))
    usual, small = scene.hidden_states(*shape), scene.hidden_states(*shape) / 128
    # the small input shows where eps goes, the last one whether a mean is taken away
    return list(call(hidden_states=torch.stack([usual, small, usual + 1])))


RMS_NORM = Pattern("rms_norm", "norm", RMSNorm, _recognise_rms_norm, _trial)
LAYER_NORM = Pattern("layer_norm", "norm", LayerNorm, _recognise_layer_norm, _trial)
