"""What attention makes of the products of queries and keys."""

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from hfopt.errors import InvalidInput

from .checks import check_array, check_floats

_SOFTCAPS = 1e-30, 1e30  # their products with other numbers are none of the largest or smallest


@dataclass(frozen=True, eq=False)
class Scoring:
    """How scores come about: `scale` times the product of query and key; softcap: then `softcap * tanh(score / softcap)`.

    slopes: float32 [n_heads], of ALiBi: plus slope * distance of the key from the token, which is negative before it. sinks:
    [n_heads], of the dtype of the queries, a score for each query head that takes weight and has no value. window: how many
    keys up to its own a token sees at most, whatever its mask lets through. ranked: slopes are of the rank of a key instead,
    its distance from the first one that the last new token of its row sees. Rank, and slope times rank, are rounded to
    bfloat16, then scaled as products are. A window would move the first one. Raises `InvalidInput`.
    """

    scale: float
    softcap: float | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    window: int | None = None
    ranked: bool = False

    def __post_init__(self) -> None:
        if self.softcap is not None and not _SOFTCAPS[0] <= self.softcap <= _SOFTCAPS[1]:
            raise InvalidInput(f"softcap is {self.softcap}: from {_SOFTCAPS[0]} to {_SOFTCAPS[1]} is allowed")
        if self.window is not None and not (isinstance(self.window, int) and 1 <= self.window <= sys.maxsize):
            raise InvalidInput(f"window is {self.window}: an integer from 1 to {sys.maxsize} is allowed")
        if self.ranked and (self.slopes is None or self.window is not None):
            raise InvalidInput("ranked is True: slopes, and no window, are needed")
        for name, each in (("slopes", self.slopes), ("sinks", self.sinks)):
            if each is not None:
                _check_numbers(name, each)

    def is_plain(self, n_keys: int) -> bool:
        """Whether over so many keys nothing but the scale matters."""
        return (
            self.softcap is None
            and self.slopes is None
            and self.sinks is None
            and (self.window is None or self.window >= n_keys)
        )

    def numbers(self, n_heads: int, dtype: torch.dtype) -> tuple[float, float, int, int, int, int]:
        """Scale, softcap, addresses, window, ranked for so many heads of queries of this dtype, as kernels get them; what a
        model has not is 0. The tensors have to be kept alive. Raises `InvalidInput`.
        """
        return (
            float(self.scale),
            self.softcap or 0.0,
            0 if self.slopes is None else check_array("slopes", self.slopes, (n_heads,), torch.float32),
            0 if self.sinks is None else check_array("sinks", self.sinks, (n_heads,), dtype),
            self.window or 0,
            int(self.ranked),
        )

    @property
    def tensors(self) -> list[Tensor]:
        """Those whose memory kernels read."""
        return [each for each in (self.slopes, self.sinks) if each is not None]


def _check_numbers(name: str, tensor: Tensor) -> None:
    """Raise `InvalidInput` for numbers that are not finite; a sink may be -inf, which takes no weight."""
    check_floats(name, tensor)
    right = tensor < math.inf if name == "sinks" else tensor.isfinite()
    if not bool(right.all()):
        wrong = tensor[~right]
        raise InvalidInput(f"{name} has {wrong[0].item()}: finite numbers are allowed")
