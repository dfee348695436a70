"""Small tensors of integers, such as indices and lengths, as kernels get them."""

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput

from .checks import address_of

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def integers(name: str, tensor: Tensor) -> np.ndarray:
    """A copy, int64 [n], which nobody else can change any more."""
    if not isinstance(tensor, Tensor):
        raise InvalidInput(f"{name} is a {type(tensor).__name__}: a torch.Tensor is needed")
    if tensor.dtype not in _INTEGERS or not tensor.is_cpu or tensor.layout is not torch.strided:
        given = f"is {tensor.layout} of {tensor.dtype} on device {tensor.device}"
        raise InvalidInput(f"{name} {given}: integers in CPU memory are needed")
    if tensor.ndim != 1:
        raise InvalidInput(f"{name} has shape {tuple(tensor.shape)}: one dimension is needed")
    address_of(name, tensor)
    return tensor.numpy().astype(np.int64)
