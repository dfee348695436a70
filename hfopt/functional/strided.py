"""Tensors as rows that kernels read or write: in place where their strides allow it, else through one copy."""

import torch
from torch import Tensor

from hfopt.errors import InvalidInput

from .checks import address_of, check_floats, check_shape, plain_address


def read_rows(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype | None = None,
    trailing: int = 1,
    shape: torch.Size | None = None,
) -> tuple[Tensor, int, int]:
    """(tensor whose rows are contiguous, its address, elements from a row to the next): itself, a view of it, or a copy.

    trailing: dimensions that make up the elements of a row. shape: what it needs to be; None: any.

    Raises `InvalidInput` unless it is of one of `DTYPES` (or just `dtype`), with memory, and that many dimensions.
    """
    address = plain_address(tensor, dtype, shape)
    if address:
        given = tensor.shape
        if len(given) >= trailing:
            return tensor, address, given[-1] if trailing == 1 else given[-2] * given[-1]
    check_floats(name, tensor, dtype)
    if shape is not None:
        check_shape(name, tensor, tuple(shape))
    if tensor.ndim < trailing:
        raise InvalidInput(
            f"{name} has shape {tuple(tensor.shape)}: at least {trailing} dimensions are needed"
        )
    address_of(name, tensor)
    return _rows_of(tensor, trailing)


def _rows_of(tensor: Tensor, trailing: int) -> tuple[Tensor, int, int]:
    rows = tensor.detach()
    if trailing > 1:
        rows = rows.flatten(-trailing)
    if rows.shape[-1] > 1 and rows.stride(-1) != 1:
        rows = rows.contiguous()
    rows = rows.flatten(0, -2) if rows.ndim > 1 else rows[None]
    return rows, rows.data_ptr(), rows.stride(0)


def dense(
    name: str, tensor: Tensor, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None
) -> tuple[Tensor, int]:
    """The tensor, copied if it is not contiguous, and its address; raises `InvalidInput` as `read_rows`."""
    address = plain_address(tensor, dtype, shape)
    if address and (shape is not None or tensor.ndim > 0):
        return tensor, address
    check_floats(name, tensor, dtype)
    if shape is not None:
        check_shape(name, tensor, shape)
    if tensor.ndim == 0:
        raise InvalidInput(f"{name} has shape (): [..., size] is needed")
    address_of(name, tensor)
    array = tensor.contiguous()
    return array, array.data_ptr()


class Output:
    """A tensor that a kernel writes rows to; `finish` brings them to where they belong, if the kernel could not.

    address: that of the first row; rows are contiguous. step: elements from a row to the next.
    """

    def __init__(
        self,
        name: str,
        tensor: Tensor,
        shape: torch.Size,
        dtype: torch.dtype | None,
        *inputs: Tensor | None,
        trailing: int = 1,
    ) -> None:
        """inputs: what the kernel reads, in the same places or others. Raises `InvalidInput` for another shape or dtype, or
        one that holds an element in several places.
        """
        self._target: Tensor | None = None
        address = plain_address(tensor, dtype, shape)
        if not address:
            check_floats(name, tensor, dtype)
            check_shape(name, tensor, tuple(shape))
            if tensor.numel() and repeats(tensor):
                raise InvalidInput(
                    f"{name} has strides {tensor.stride()} with shape {tuple(tensor.shape)}: "
                    "memory of its own is needed for each element"
                )
            address_of(name, tensor)
        if _collides(tensor, inputs):
            self._target, tensor = tensor, tensor.detach().clone(memory_format=torch.contiguous_format)
            address = tensor.data_ptr()
        if address and len(shape) >= trailing:
            self._rows, self.address = tensor, address
            self.step = shape[-1] if trailing == 1 else shape[-2] * shape[-1]
            return
        self._rows, self.address, self.step = read_rows(name, tensor, dtype, trailing)
        if self._rows.numel() and self.address != tensor.data_ptr():
            self._target = tensor

    def finish(self) -> None:
        """Call it behind the kernel."""
        if self._target is not None:
            with torch.no_grad():
                self._target.copy_(self._rows.view(self._target.shape))


def repeats(tensor: Tensor) -> bool:
    """Whether elements may share memory, as those of an expanded tensor do."""
    end = 0  # of the elements along the dimensions so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= end:
                return True
            end += stride * (size - 1)
    return False


def _collides(output: Tensor, inputs: tuple[Tensor | None, ...]) -> bool:
    """Whether writing an element of the output may change another one that is still to be read."""
    first, end = memory_range(output)
    for read in inputs:
        if read is None or read is output:
            continue
        start, stop = memory_range(read)
        if first < stop and start < end and (first != start or output.stride() != read.stride()):
            return True
    return False


def memory_range(tensor: Tensor) -> tuple[int, int]:
    """Addresses of its first byte and of the one behind its last; equal ones if it is empty."""
    first = tensor.data_ptr()
    if tensor.is_contiguous():  # an empty one is
        return first, first + tensor.nbytes
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return first, first + (last + 1) * tensor.itemsize
