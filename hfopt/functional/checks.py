"""What the operations of this package ask of tensors, and how kernels get them: as arrays, or as addresses.

Each call of an operation asks all of it again, so what usually holds is told by one quick test.
"""

import numpy as np
import torch
from torch import Tensor

from hfopt.cache.storage import bits_of
from hfopt.errors import InvalidInput
from hfopt.kernels.jit import launch as jit
from hfopt.kernels.jit import openmp
from hfopt.words import DTYPES, dtypes_in_words

# Empty arrays whose type tells a kernel what is at the addresses that it gets; bfloat16 and float16 as their bits.
ELEMENTS: dict[torch.dtype, np.ndarray] = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.float16: np.empty(0, np.int16),
}
CODES = np.empty(0, np.int8)  # the same for a cache of 8-bit codes
# and for one of float8, in bits that numpy has no names for
FLOAT8: dict[torch.dtype, np.ndarray] = {
    torch.float8_e5m2: np.empty(0, np.uint8),
    torch.float8_e4m3fn: np.empty(0, np.bool_),
}
_STRIDED = torch.strided  # attributes of a module take time


def _fail(name: str, given: object, allowed: str) -> InvalidInput:
    return InvalidInput(f"{name} {given}: {allowed}")


def check_floats(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise `InvalidInput` unless it is dense, on the CPU, and of one of `DTYPES` (or just `dtype`)."""
    if not isinstance(tensor, Tensor):
        raise _fail(name, f"is a {type(tensor).__name__}", "a torch.Tensor is needed")
    if not tensor.is_cpu:
        raise _fail(name, f"is on device {tensor.device}", "only tensors in CPU memory are allowed")
    if tensor.dtype is not dtype and (dtype is not None or tensor.dtype not in DTYPES):
        allowed = f"{dtypes_in_words()} is allowed" if dtype is None else f"{dtype} is needed here"
        raise _fail(name, f"has dtype {tensor.dtype}", allowed)
    if tensor.layout is not torch.strided:
        raise _fail(name, f"has layout {tensor.layout}", "torch.strided is needed")
    if tensor.is_neg():
        raise _fail(name, "has its negative bit set", "call resolve_neg() first")


def plain_address(tensor: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...] | None = None) -> int:
    """Address of a tensor in which `check_floats`, `check_shape` (unless shape is None), `check_contiguous` and `address_of`
    find nothing wrong; else 0, also for some that are right: then ask them.
    """
    if (
        isinstance(tensor, Tensor)
        and (tensor.dtype is dtype or (dtype is None and tensor.dtype in ELEMENTS))
        and (shape is None or tensor.shape == shape)
        and tensor.is_cpu
        and tensor.layout is _STRIDED
        and tensor.is_contiguous()
        and not tensor.is_neg()
    ):
        address: int = tensor.data_ptr()
        start, item = tensor.storage_offset(), tensor.itemsize
        has_memory = address != start * item
        if has_memory and (start + tensor.numel()) * item <= tensor.untyped_storage().nbytes():
            return address
    return 0


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


def check_rows(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, int]:
    """The tensor, copied if it is not contiguous, and its address; raises `InvalidInput` unless its last dimension is."""
    address = plain_address(tensor, dtype)
    if address and tensor.ndim > 0:
        return tensor, address
    check_floats(name, tensor, dtype)
    if tensor.ndim == 0 or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        given = f"has strides {tensor.stride()} with shape {tuple(tensor.shape)}"
        raise _fail(name, given, "its last dimension must be contiguous")
    address_of(name, tensor)
    rows = tensor.contiguous()
    return rows, rows.data_ptr()


def check_array(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> int:
    """Address of a contiguous tensor of this shape, of one of `DTYPES` (or just `dtype`); raises `InvalidInput` for anything
    else."""
    address = plain_address(tensor, dtype, shape)
    if address:
        return address
    check_floats(name, tensor, dtype)
    check_shape(name, tensor, shape)
    check_contiguous(name, tensor)
    return address_of(name, tensor)


def address_of(name: str, tensor: Tensor) -> int:
    """Address of a tensor that has passed the checks; raises `InvalidInput` if its memory is not there."""
    address, start, item = tensor.data_ptr(), tensor.storage_offset(), tensor.itemsize
    # a view keeps its shape when its storage is freed (its address is then how far it is from the beginning) or made smaller
    if (
        address == start * item
        or (start + tensor.numel()) * item > tensor.untyped_storage().nbytes()
        or not tensor.is_contiguous()
    ):
        _check_memory(name, tensor)
    return address


def _check_memory(name: str, tensor: Tensor) -> None:
    shape, end = tensor.shape, 1
    for size, step in zip(shape, tensor.stride(), strict=True):
        if size == 0:
            return
        end += (size - 1) * step
    start, item = tensor.storage_offset(), tensor.itemsize
    if tensor.data_ptr() == start * item:
        raise _fail(name, f"of shape {tuple(shape)} has no memory", "its storage has been freed")
    if (start + end) * item > tensor.untyped_storage().nbytes():
        raise _fail(name, f"of shape {tuple(shape)} has lost memory", "its storage has been made smaller")


def check_beside(name: str, tensor: object, other: Tensor) -> None:
    """Raise unless torch's operations may read it beside another tensor: a dense one with its memory, on the same device.

    TypeError for what is no tensor, else `InvalidInput`.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: a torch.Tensor is needed")
    if tensor.device != other.device:
        raise _fail(name, f"is on device {tensor.device}", f"{other.device} is needed here")
    if tensor.layout is not torch.strided:
        raise _fail(name, f"has layout {tensor.layout}", "torch.strided is needed")
    # those of fake tensors and of transforms such as vmap have none of their own
    is_own = type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    if is_own and tensor.is_cpu and torch._C._has_storage(tensor):
        address_of(name, tensor)


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor's own memory as an array; bfloat16 and float16 as their bits (uint16, int16)."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return bits_of(tensor).numpy()


def prepare_threads() -> None:
    """Let the launches of this Python thread use as many threads as torch does."""
    if not openmp.RUNTIME:  # the pool of torch knows
        jit.use_threads(torch.get_num_threads())
