"""Linear layers over matrices that no single launch multiplies by: of several formats, or some of them of floats."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels.linear.blocks import COLUMN

from .choice import Kernels
from .epilogue import PLAIN, Epilogue
from .linear import LinearWeights, width_of
from .quantized import QuantizedWeights


@dataclass(frozen=True, eq=False)
class MixedWeights:
    """Records of one matrix each, for launches one after the other; dtypes that contradict raise `InvalidInput`."""

    parts: tuple[LinearWeights | QuantizedWeights, ...]

    def __post_init__(self) -> None:
        dtypes = {part.dtype for part in self.parts} - {None}
        sizes = {part.in_features for part in self.parts}
        if len(dtypes) > 1 or len(sizes) != 1:
            raise InvalidInput(f"parts have dtypes {dtypes} and {sizes} features: one of each is needed")

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def dtype(self) -> torch.dtype | None:
        return next((part.dtype for part in self.parts if part.dtype is not None), None)

    @property
    def sizes(self) -> list[int]:
        return [size for part in self.parts for size in part.sizes]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    def side_by_side(self) -> Iterator[LinearWeights | QuantizedWeights]:
        """The parts, each for its columns of one result."""
        first = 0
        for part in self.parts:
            table = part.table.copy()
            table[:, COLUMN] += first
            first += sum(part.sizes)
            yield replace(part, table=table)

    def multiply(
        self, hidden_states: Tensor, epilogue: Epilogue[Tensor] = PLAIN, by: Kernels = "hfopt"
    ) -> Tensor:
        """See `linear.linear`; rounded after each part."""
        width_of(self.sizes, epilogue.gated)  # refuses what does not fit
        activated = Epilogue[Tensor](epilogue.activation)
        first, *others = self.parts
        parts = [first.multiply(hidden_states, activated, by)]
        parts += [part.multiply(hidden_states, PLAIN if epilogue.gated else activated, by) for part in others]
        y = parts[0] * parts[1] if epilogue.gated else torch.cat(parts, -1)
        for residual in epilogue.residuals:
            y += residual
        return y
