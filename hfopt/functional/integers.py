"""Small tensors of integers, such as indices and lengths, as kernels get them."""

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput

from .checks import address_of


def integers(name: str, tensor: object, shape: tuple[int | None, ...]) -> np.ndarray:
    """A tensor of int32 or int64 as C-contiguous int64, a copy that nobody else can change any more.

    Raises `InvalidInput` unless it is one, of this shape (None: any size).
    """
    if not isinstance(tensor, Tensor):
        raise InvalidInput(f"{name} is a {type(tensor).__name__}: a torch.Tensor is needed")
    if (
        tensor.dtype not in (torch.int32, torch.int64)
        or not tensor.is_cpu
        or tensor.layout is not torch.strided
    ):
        raise InvalidInput(
            f"{name} has dtype {tensor.dtype} on {tensor.device}: int32 or int64 in CPU memory is needed"
        )
    if tensor.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
        wanted = f"[{', '.join('any' if n is None else str(n) for n in shape)}]"
        raise InvalidInput(f"{name} has shape {tuple(tensor.shape)}: {wanted} is needed")
    address_of(name, tensor)
    return np.array(tensor.numpy(), np.int64, order="C")
