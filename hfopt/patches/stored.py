"""What a layer has stored, for later layers that have no keys and values of their own."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from hfopt.cache import Appended


class Stored:
    """Keys and values of a layer behind its new tokens; for kernels in place, and gathered for code that unpacks it as
    transformers' pair of tensors.
    """

    def __init__(self, layer: Any, appended: Appended) -> None:
        self.layer, self.appended = layer, appended

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.layer.seen(self.appended.skipped))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return tuple(self)[index]
