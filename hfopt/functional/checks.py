"""What the operations of this package ask of tensors, and the arrays that kernels get."""

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import _jit

DTYPES = (torch.float32, torch.bfloat16)


def _fail(name: str, given: object, allowed: str) -> InvalidInput:
    return InvalidInput(f"{name} {given}: {allowed}")


def check_floats(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise `InvalidInput` unless it is dense, on the CPU, and float32 or bfloat16 (or just `dtype`)."""
    if not isinstance(tensor, Tensor):
        raise _fail(name, f"is a {type(tensor).__name__}", "a torch.Tensor is needed")
    if not tensor.is_cpu:
        raise _fail(name, f"is on device {tensor.device}", "only tensors in CPU memory are allowed")
    if tensor.dtype is not dtype and (dtype is not None or tensor.dtype not in DTYPES):
        allowed = "torch.float32 or torch.bfloat16 is allowed" if dtype is None else f"{dtype} is needed here"
        raise _fail(name, f"has dtype {tensor.dtype}", allowed)
    if tensor.layout is not torch.strided:
        raise _fail(name, f"has layout {tensor.layout}", "torch.strided is needed")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `InvalidInput` unless the tensor has this shape."""
    if tensor.shape != shape:
        raise _fail(name, f"has shape {tuple(tensor.shape)}", f"{shape} is needed here")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise `InvalidInput` unless the tensor is C-contiguous."""
    if not tensor.is_contiguous():
        raise _fail(
            name, f"has strides {tensor.stride()} with shape {tuple(tensor.shape)}", "it must be contiguous"
        )


def check_rows(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor, copied if it is not contiguous; raises `InvalidInput` unless its last dimension is."""
    check_floats(name, tensor, dtype)
    if tensor.is_contiguous() and tensor.ndim > 0:
        return tensor
    if tensor.ndim == 0 or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        given = f"has strides {tensor.stride()} with shape {tuple(tensor.shape)}"
        raise _fail(name, given, "its last dimension must be contiguous")
    return tensor.contiguous()


def check_vector(name: str, tensor: Tensor, size: int, dtype: torch.dtype) -> int:
    """Address of a contiguous [size] vector; raises `InvalidInput` for anything else."""
    check_floats(name, tensor, dtype)
    check_shape(name, tensor, (size,))
    check_contiguous(name, tensor)
    return tensor.data_ptr()


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor's own memory as an array; bfloat16 as its bits (uint16)."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def prepare_threads() -> None:
    """Let the launches of this Python thread use as many threads as torch does."""
    _jit.use_threads(torch.get_num_threads())
