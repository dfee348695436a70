"""How a packed matrix lies in memory: blocks of 16 output rows, one after the other, each a stream for a kernel.

    codes       uint8    [n_blocks, n_units, 64]     a unit is 4 inputs (8 bits) or 8 inputs (4 bits) of 16 rows
    row_scales  float32  [n_blocks, 16]
    scales      float16  [n_blocks, n_groups, 16]    where there are groups
    zeros       uint8    [n_blocks, n_groups, 16]    where every group has a zero point of its own
    order       int32    [in_features]               where inputs are permuted

Byte 4 j + i of unit u belongs to row j of the block. 8 bits: the code of input 4 u + i. 4 bits: the low half is the
code of input 8 u + i, the high half that of input 8 u + 4 + i.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hfopt.errors import InvalidInput

BLOCK = 16
UNIT_BYTES = 64
ALIGNMENT = 64  # bytes; what kernels ask of tensors
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class QuantizedMatrix(NamedTuple):
    """The tensors of one packed matrix, as kernels read them; see `Packed` for what they stand for.

    out_features: rows without those that fill up the last block.
    """

    out_features: int
    codes: Tensor
    row_scales: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    order: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        parts = zip(PARTS, self[1:], strict=True)
        return {name: tensor for name, tensor in parts if isinstance(tensor, Tensor)}

    def rows(self, first: int, n: int) -> "QuantizedMatrix | None":
        """Rows `first` to `first + n` in place; None where no view of whole blocks is aligned as kernels need it.

        Raises InvalidInput for rows that are not there.
        """
        last = first + n
        if not 0 <= first < last <= self.out_features:
            raise InvalidInput(f"first={first}, n={n}: rows from 0 to {self.out_features} are there")
        if first % BLOCK or (last % BLOCK and last != self.out_features):
            return None
        blocks = slice(first // BLOCK, ceil_div(last, BLOCK))
        parts = {name: tensor[blocks] for name, tensor in self.tensors.items() if name != "order"}
        if any(part.data_ptr() % ALIGNMENT for part in parts.values()):
            return None
        return QuantizedMatrix(n, **parts, order=self.order)


PARTS = QuantizedMatrix._fields[1:]


def layout(
    out_features: int, in_features: int, bits: int, group: int | None, *, has_zeros: bool, ordered: bool
) -> Layout:
    """Shape and dtype of every tensor of a packed matrix. group: divides the inputs, or None for whole rows."""
    n_blocks = ceil_div(out_features, BLOCK)
    per_group = (n_blocks, in_features // (group or in_features), BLOCK)
    parts: Layout = {
        "codes": ((n_blocks, ceil_div(in_features, inputs_per_unit(bits)), UNIT_BYTES), torch.uint8),
        "row_scales": ((n_blocks, BLOCK), torch.float32),
    }
    if group is not None:
        parts["scales"] = (per_group, torch.float16)
    if has_zeros:
        parts["zeros"] = (per_group, torch.uint8)
    if ordered:
        parts["order"] = ((in_features,), torch.int32)
    return parts


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if kernels cannot read it where it is."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def inputs_per_unit(bits: int) -> int:
    return UNIT_BYTES * 8 // (BLOCK * bits)


def codes_to_blocks(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [16 n_blocks, inputs_per_unit n_units] -> [n_blocks, n_units, 64]."""
    n_blocks = codes.shape[0] // BLOCK
    n_units = codes.shape[1] // inputs_per_unit(bits)
    words = codes.contiguous().view(
        torch.int32
    )  # four codes each; a shift by four moves no bit from one to the next
    if bits == 4:
        halves = words.view(-1, n_units, 2)
        words = halves[:, :, 0] | (halves[:, :, 1] << 4)
    units = words.view(n_blocks, BLOCK, n_units).transpose(1, 2).contiguous()
    return units.view(torch.uint8).view(n_blocks, n_units, UNIT_BYTES)


def blocks_to_codes(blocks: Tensor, bits: int) -> Tensor:
    """The inverse of `codes_to_blocks`."""
    n_blocks = len(blocks)
    rows = blocks.view(torch.int32).transpose(1, 2).contiguous()  # [n_blocks, 16, n_units]
    if bits == 4:
        rows = torch.stack([rows & 0x0F0F0F0F, (rows >> 4) & 0x0F0F0F0F], dim=-1)
    return rows.view(-1).view(torch.uint8).view(n_blocks * BLOCK, -1)


def groups_to_blocks(values: Tensor) -> Tensor:
    """One value for each row and group [16 n_blocks, n_groups] -> [n_blocks, n_groups, 16]."""
    rows, n_groups = values.shape
    return values.view(rows // BLOCK, BLOCK, n_groups).transpose(1, 2).contiguous()


def blocks_to_groups(blocks: Tensor) -> Tensor:
    """The inverse of `groups_to_blocks`."""
    n_blocks, n_groups, _ = blocks.shape
    return blocks.transpose(1, 2).reshape(n_blocks * BLOCK, n_groups)
