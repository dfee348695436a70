"""Packed matrices from the integers of a checkpoint, with every bit as it was."""

from collections.abc import Mapping
from typing import Any

import torch

from hfopt.errors import CorruptCheckpoint, UnsupportedModel
from hfopt.quantization.format import arrange
from hfopt.quantization.int4 import Int4
from hfopt.quantization.int8 import Int8
from hfopt.quantization.packed import Packed, packed_from
from hfopt.quantization.uniform import Uniform

INTEGERS: dict[int, type[Uniform]] = {4: Int4, 8: Int8}
SCALES = (torch.float16, torch.bfloat16, torch.float32)


class Tensors:
    """The tensors of one linear layer; a missing one, or one of another kind, raises CorruptCheckpoint."""

    def __init__(self, layer: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.layer = layer
        self.tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def get(
        self, name: str, shape: tuple[int | None, ...], *dtypes: torch.dtype, why: str = ""
    ) -> torch.Tensor:
        """A tensor of this shape (None: of any size) and one of these dtypes."""
        if name not in self.tensors:
            raise CorruptCheckpoint(
                f"{self.layer}: tensor {name!r} is missing; there are {sorted(self.tensors)}"
            )
        tensor = self.tensors[name]
        fits = tensor.ndim == len(shape) and all(
            want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits or 0 in tensor.shape or tensor.dtype not in dtypes:
            wanted = " × ".join("any" if size is None else str(size) for size in shape)
            raise CorruptCheckpoint(
                f"{self.layer}: tensor {name!r} must be {wanted} of {' or '.join(map(str, dtypes))}{why}; "
                f"it is {' × '.join(map(str, tensor.shape))} of {tensor.dtype}"
            )
        return tensor


def option(
    layer: str, config: Mapping[str, Any], name: str, allowed: tuple[Any, ...], default: Any = None
) -> Any:
    """An option of a quantization_config; a value that is not allowed raises UnsupportedModel."""
    value = config.get(name, default)
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise UnsupportedModel(
            f"{layer}: {name}={value!r} of quantization_config is not among {list(allowed)}"
        )
    return value


def group_of(layer: str, bits: int, size: object) -> int | None:
    """The group of a format from a checkpoint's group size, where -1 (or None) stands for whole rows."""
    allowed = [group for group in INTEGERS[bits].groups if group is not None]
    if size is None or (type(size) is int and size == -1):
        return None
    if type(size) is not int or size not in allowed:
        raise UnsupportedModel(
            f"{layer}: group_size={size!r} of quantization_config is not among {[-1, *allowed]} for {bits} bits"
        )
    return size


def n_groups_of(layer: str, in_features: int, group: int | None) -> int:
    if group is not None and in_features % group:
        raise UnsupportedModel(f"{layer}: group_size={group} does not divide its {in_features} inputs")
    return in_features // (group or in_features)


def fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The unsigned numbers of 4 or 8 bits in int32 words [..., n], lowest bits first: uint8 [..., n 32 / bits]."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)


def order_of(layer: str, g_idx: torch.Tensor, group: int | None, n_groups: int) -> torch.Tensor | None:
    """Inputs sorted by their group, as `Packed.order`; None where they are sorted already."""
    groups = g_idx.long()
    if groups.min() < 0 or groups.max() >= n_groups:
        raise CorruptCheckpoint(f"{layer}: group indices must be from 0 to {n_groups - 1}")
    if group is None or bool((groups.diff() >= 0).all() and (groups.bincount() == group).all()):
        return None
    if not (groups.bincount(minlength=n_groups) == group).all():
        raise UnsupportedModel(
            f"{layer}: every group must hold {group} inputs, and these hold different numbers"
        )
    return groups.argsort(stable=True).to(torch.int32)


def packed_integers(
    layer: str,
    bits: int,
    group: int | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    compute: str,
) -> Packed:
    """Pack unsigned codes [out, in] and zero points [out, n_groups] (uint8) with scales [out, n_groups].

    float16 scales stay as they are; bfloat16 and float32 ones are divided by a power of two for each row, which
    loses nothing of bfloat16 (but of scales below 2^-17 of their row's largest), and rounds float32 to 11 bits.
    Without zero points, or with all of them in the middle, the format is symmetric.
    """
    if not scales.isfinite().all():
        raise CorruptCheckpoint(f"{layer}: the scales hold NaN or Inf")
    if order is not None:
        codes = codes[:, order.long()]
    kind = INTEGERS[bits]
    if zeros is not None and bool((zeros == kind.zero_code).all()):
        zeros = None
    format = kind(group=group, symmetric=zeros is None, compute=compute)
    row_scales, relative = torch.ones(len(codes)), None
    if group is None:
        row_scales = scales.float().view(-1)
    elif scales.dtype == torch.float16:
        relative = scales
    else:
        largest = scales.float().abs().amax(1)
        row_scales = torch.where(largest > 0, largest / (2 * torch.frexp(largest).mantissa), 1)
        relative = (scales.float() / row_scales[:, None]).half()
    tensors = arrange(format, codes, row_scales=row_scales, scales=relative, zeros=zeros)
    if order is not None:
        tensors["order"] = order
    return packed_from(format, codes.shape[0], codes.shape[1], tensors)
