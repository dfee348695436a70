"""Integers of 8 bits."""

from dataclasses import dataclass
from typing import ClassVar

from hfopt.quantization.format import register
from hfopt.quantization.uniform import Uniform


@register
@dataclass(frozen=True, kw_only=True)
class Int8(Uniform):
    """Weights in 8 bits, for each output row (group=None) or group of inputs; symmetric codes are -127 to 127."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    groups: ClassVar[tuple[int | None, ...]] = (None, 32, 64, 128, 256)
    zero_code: ClassVar[int] = 128
    lowest: ClassVar[int] = -127
    divisors: ClassVar[tuple[float, ...]] = (127, 126.5, 127.5, 128, 128.5, 129, 129.5)
    shrinks: ClassVar[tuple[float, ...]] = (1.0, 255 / 254, 0.99)

    group: int | None = None
    symmetric: bool = True
    compute: str = "int8"
