"""Rotations of heads: which channels turn together, and in which form models hand down the angles."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rotation = Literal[
    "half", "half_once", "half_back", "interleaved", "interleaved_halves", "interleaved_pairs", "none"
]


@dataclass(frozen=True)
class _Form:
    """kind: in `functional.ROTATIONS`. Kernels take each `stride`th of the first n / share of n angles that are handed down,
    `repeats` times; sign: of sin, -1 where heads turn the other way.
    """

    kind: str
    stride: int = 1
    share: int = 1
    repeats: int = 1
    sign: int = 1

    def taken(self, numbers: Tensor) -> Tensor:
        numbers = numbers[..., : numbers.shape[-1] // self.share : self.stride].float()
        return torch.cat([numbers] * self.repeats, dim=-1).contiguous()


_FORMS: dict[Rotation, _Form] = {
    "half": _Form("half"),  # each angle twice, in two halves
    "half_once": _Form("half", repeats=2),
    "half_back": _Form("half", sign=-1),
    "interleaved": _Form("interleaved"),
    "interleaved_halves": _Form("interleaved", share=2),
    "interleaved_pairs": _Form("interleaved", stride=2),  # each angle twice, side by side
    "none": _Form("none"),
}

# that models with computed angles have
ROTATIONS: tuple[Rotation, ...] = (
    "half", "interleaved_halves", "interleaved_pairs", "half_once", "half_back", "none",
)  # fmt: skip


def kind_of(rotation: Rotation) -> str:
    """What `functional.rotate_and_store` calls it."""
    return _FORMS[rotation].kind


def as_taken(rotation: Rotation, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [..., n] as a model hands them down, in the form that kernels take: float32, contiguous."""
    form = _FORMS[rotation]
    return form.taken(cos), form.sign * form.taken(sin)


def are_taken_as_they_are(rotation: Rotation) -> bool:
    """Whether kernels take what is handed down."""
    return _FORMS[rotation] in (_FORMS["half"], _FORMS["interleaved"])
