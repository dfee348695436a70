"""Evenly spaced codes: value = (code - zero) * scale."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from hfopt.quantization.format import Format
from hfopt.quantization.search import SMALLEST, Candidate


@dataclass(frozen=True, kw_only=True)
class Uniform(Format):
    """Base of the formats whose codes are evenly spaced, with a zero point in the middle or one for each group.

    divisors: the scales to try when symmetric, scale = largest magnitude / divisor. A negative one gives the scale
    the sign that brings the largest weight to the end of the range that has one code more.
    shrinks: the factors of both ends of a group's range to try when asymmetric.
    """

    lowest: ClassVar[int]  # the smallest symmetric code, relative to its zero
    divisors: ClassVar[tuple[float, ...]]
    shrinks: ClassVar[tuple[float, ...]]

    group: int | None
    symmetric: bool
    compute: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("symmetric", (True, False))

    @property
    def has_zeros(self) -> bool:
        return not self.symmetric

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def candidates(self, groups: torch.Tensor) -> Iterator[Candidate]:
        high, low = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
        if self.symmetric:
            magnitude = torch.maximum(high, -low).clamp_(min=SMALLEST)
            signed = torch.where(high > -low, magnitude, -magnitude)
            for divisor in self.divisors:
                yield (magnitude if divisor > 0 else signed) / divisor, None
            return
        high, low = high.clamp(min=0), low.clamp(max=0)  # zero is one of the values
        for shrink in self.shrinks:
            scale = ((high - low) * shrink / self.top).clamp_(min=SMALLEST)
            yield scale, (low / scale).mul_(-shrink).round_()

    def nearest(self, quotients: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self.symmetric:
            return torch.round(quotients, out=out).clamp_(self.lowest, self.top - self.zero_code)
        return torch.round(quotients, out=out).clamp_(0, self.top)

    def encode(self, quotients: torch.Tensor) -> torch.Tensor:
        codes = self.nearest(quotients, quotients)
        return (codes.add_(self.zero_code) if self.symmetric else codes).to(torch.uint8)

    def decode(self, codes: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        return codes.float() - (self.zero_code if zero is None else zero.float())
