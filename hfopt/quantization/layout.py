"""How codes and scales lie in memory: blocks of 16 output rows, one after the other, each a stream for a kernel.

    codes       uint8    [n_blocks, n_units, 64]     a unit is 4 inputs (8 bits) or 8 inputs (4 bits) of 16 rows
    scales      float16  [n_blocks, n_groups, 16]
    zeros       uint8    [n_blocks, n_groups, 16]
    row_scales  float32  [n_blocks, 16]

Byte 4 j + i of unit u belongs to row j of the block. 8 bits: the code of input 4 u + i. 4 bits: the low half is the
code of input 8 u + i, the high half that of input 8 u + 4 + i.
"""

import torch

BLOCK = 16
UNIT_BYTES = 64
ALIGNMENT = 64  # bytes; what kernels ask of tensors


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if kernels cannot read it where it is."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def inputs_per_unit(bits: int) -> int:
    return UNIT_BYTES * 8 // (BLOCK * bits)


def codes_to_blocks(codes: torch.Tensor, bits: int) -> torch.Tensor:
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


def blocks_to_codes(blocks: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `codes_to_blocks`."""
    n_blocks = len(blocks)
    rows = blocks.view(torch.int32).transpose(1, 2).contiguous()  # [n_blocks, 16, n_units]
    if bits == 4:
        rows = torch.stack([rows & 0x0F0F0F0F, (rows >> 4) & 0x0F0F0F0F], dim=-1)
    return rows.view(n_blocks * BLOCK, -1).view(torch.uint8)


def groups_to_blocks(values: torch.Tensor) -> torch.Tensor:
    """One value for each row and group [16 n_blocks, n_groups] -> [n_blocks, n_groups, 16]."""
    rows, n_groups = values.shape
    return values.view(rows // BLOCK, BLOCK, n_groups).transpose(1, 2).contiguous()


def blocks_to_groups(blocks: torch.Tensor) -> torch.Tensor:
    """The inverse of `groups_to_blocks`."""
    n_blocks, n_groups, _ = blocks.shape
    return blocks.transpose(1, 2).reshape(n_blocks * BLOCK, n_groups)
