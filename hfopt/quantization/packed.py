"""A packed matrix: what kernels read, what files hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hfopt.errors import InvalidInput
from hfopt.quantization.layout import PARTS, Layout, layout

if TYPE_CHECKING:
    from hfopt.quantization.format import Format


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight matrix [out_features, in_features] in a format, arranged as `layout` says.

    value[o, order[k]] = (code[o, k] - zero[o, g]) * scale[o, g] * row_scale[o] with g = k // group; where codes are
    indices into `levels` of the format, level[code[o, k]] stands in place of the difference.

    Without groups there are no `scales`; without `zeros` the zero point is half of the codes' range, 128 or 8. Rows
    behind the last one have scale 0, inputs behind the last one hold the zero point. A scale may be negative.
    `order` (int32) is there where the groups of an imported checkpoint hold inputs that are no neighbours: column k
    of the codes belongs to input order[k], so that a kernel is given x[:, order].
    Tensors that contradict each other raise InvalidInput.
    """

    format: "Format"
    out_features: int
    in_features: int
    codes: torch.Tensor
    row_scales: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def __post_init__(self) -> None:
        tensors = self.tensors()
        expected = layout_of(self.format, self.out_features, self.in_features, ordered="order" in tensors)
        if tensors.keys() != expected.keys():
            raise InvalidInput(
                f"a matrix in {self.format} consists of {sorted(expected)}, got {sorted(tensors)}"
            )
        for name, (shape, dtype) in expected.items():
            tensor = tensors[name]
            if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                raise InvalidInput(
                    f"{name} of a matrix {self.out_features} × {self.in_features} in {self.format} must be contiguous, "
                    f"{dtype}, {list(shape)}; got {tensor.dtype}, {list(tensor.shape)}"
                )
        if self.order is not None and self.order.device.type != "meta":
            counts = torch.arange(self.in_features, dtype=torch.int32)
            if not torch.equal(self.order.sort().values, counts):
                raise InvalidInput(f"order must hold every number below {self.in_features} once")

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name."""
        return {name: tensor for name in PARTS if (tensor := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def misfit(format: "Format", in_features: int) -> str | None:
    """Reason in words why a layer of so many inputs cannot have this format; None if it can."""
    if format.group is None or in_features % format.group == 0:
        return None
    return f"groups of {format.group} do not divide its {in_features} inputs"


def layout_of(format: "Format", out_features: int, in_features: int, *, ordered: bool = False) -> Layout:
    """Shape and dtype of every tensor of a packed matrix. Groups that do not divide in_features raise InvalidInput."""
    if misfit(format, in_features) is not None:
        raise InvalidInput(
            f"group must divide the number of inputs: {format} does not fit a matrix with {in_features} inputs"
        )
    return layout(
        out_features, in_features, format.bits, format.group, has_zeros=format.has_zeros, ordered=ordered
    )


def packed_from(
    format: "Format", out_features: int, in_features: int, tensors: Mapping[str, torch.Tensor]
) -> Packed:
    """Packed matrix from the tensors that `Packed.tensors` gave, as a file holds them."""
    if unknown := tensors.keys() - set(PARTS):
        raise InvalidInput(
            f"a packed matrix has no tensors {sorted(unknown)}; they are among {sorted(PARTS)}"
        )
    if missing := {"codes", "row_scales"} - tensors.keys():
        raise InvalidInput(f"a packed matrix needs the tensors {sorted(missing)}")
    return Packed(format, out_features, in_features, **tensors)
