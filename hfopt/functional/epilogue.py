"""What follows the product of a linear layer, in the same kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

X = TypeVar("X")


@dataclass(frozen=True)
class Epilogue(Generic[X]):
    """act(y) + residuals for y = x W^T + b; with `gated` act(y0) * y1 + residuals for the y of two matrices of one size.

    activation: None or a key of `ACTIVATIONS`. residuals: tensors of the result's shape and dtype, or slots of a program.
    """

    activation: str | None = None
    gated: bool = False
    residuals: Sequence[X] = ()


PLAIN: Epilogue = Epilogue()
