"""Results that go into tensors of the caller."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hfopt.errors import InvalidInput

from .checks import address_of, check_floats


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of the one behind its last, equal if it is empty."""
    first = tensor.data_ptr()
    if tensor.is_contiguous():
        return first, first + tensor.nbytes
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return first, first + (1 + sum((size - 1) * stride for size, stride in pairs)) * tensor.element_size()


def check_output(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise `InvalidInput` unless a kernel's floats may go there: each element has memory of its own."""
    check_floats(name, tensor, dtype)
    address_of(name, tensor)
    if tensor.is_contiguous():
        return
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                given = f"has strides {tensor.stride()} with shape {tuple(tensor.shape)}"
                raise InvalidInput(f"{name} {given}: elements that share memory cannot be written")
            extent += (size - 1) * stride


@contextmanager
def contiguous_output(tensor: Tensor, dims: int) -> Iterator[Tensor]:
    """A tensor that a kernel may write, its last `dims` dimensions contiguous, for one that `check_output` has passed.

    It is the tensor itself, or a copy that is written back in the end.
    """
    if tensor.is_contiguous() or tensor[(0,) * (tensor.ndim - dims)].is_contiguous():
        yield tensor
        return
    copy = tensor.contiguous()
    yield copy
    tensor.detach().copy_(copy)


def apart(output: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where some of their memory may be the output's."""
    first, end = _span(output)
    spans = [_span(each) for each in tensors]
    return [
        each.clone() if start < end and first < stop else each
        for each, (start, stop) in zip(tensors, spans, strict=True)
    ]
