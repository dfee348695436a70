"""RMSNorm and LayerNorm."""

import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import norm as kernels

from .checks import (
    ELEMENTS,
    address_of,
    check_array,
    check_contiguous,
    check_floats,
    check_rows,
    prepare_threads,
)


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (https://arxiv.org/abs/1910.07467).

    hidden_states [..., size], its last dimension contiguous; weight [size]; float32, bfloat16 or float16, both the
    same. Raises `InvalidInput`.
    """
    x = check_rows("hidden_states", hidden_states)
    size, dtype = x.shape[-1], x.dtype
    w = check_array("weight", weight, (size,), dtype)
    out = torch.empty_like(x)
    n = out.numel()
    if n:
        prepare_threads()
        address = address_of("hidden_states", x)
        kernels.rms_norm(ELEMENTS[dtype], address, n // size, size, w, float(eps), out.data_ptr())
    return out


def rms_norm_heads(qkv: Tensor, weight: Tensor, eps: float, first: int, count: int) -> None:
    """`rms_norm`, in place, of `count` heads of qkv from head `first` on, as some models do to queries and keys.

    qkv [..., width], contiguous, with heads of as many channels as weight [size] has; both of one of `DTYPES`.
    Raises `InvalidInput`.
    """
    check_floats("qkv", qkv)
    check_contiguous("qkv", qkv)
    check_floats("weight", weight)
    if qkv.ndim == 0:
        raise InvalidInput("qkv has shape (): [..., width] is needed")
    if weight.ndim != 1:
        raise InvalidInput(f"weight has shape {tuple(weight.shape)}: [size] is needed")
    width, size = qkv.shape[-1], len(weight)
    w = check_array("weight", weight, (size,), qkv.dtype)
    if first < 0 or count < 0 or (first + count) * size > width:
        raise InvalidInput(f"heads are {first} to {first + count} of {size} channels: qkv has {width}")
    n = qkv.numel()
    if n and count * size:
        prepare_threads()
        address = address_of("qkv", qkv)
        kernels.rms_norm_heads(
            ELEMENTS[qkv.dtype], address, n // width, width, first, count, size, w, float(eps)
        )


def layer_norm(hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """weight * (x - mean(x)) / sqrt(var(x) + eps) + bias over the last dimension
    (https://arxiv.org/abs/1607.06450).

    hidden_states [..., size], its last dimension contiguous; weight and bias [size] or None; float32 or
    bfloat16, all the same. Raises `InvalidInput`.
    """
    x = check_rows("hidden_states", hidden_states)
    size, dtype = x.shape[-1], x.dtype
    w = 0 if weight is None else check_array("weight", weight, (size,), dtype)
    b = 0 if bias is None else check_array("bias", bias, (size,), dtype)
    out = torch.empty_like(x)
    n = out.numel()
    if n:
        prepare_threads()
        address = address_of("hidden_states", x)
        kernels.layer_norm(ELEMENTS[dtype], address, n // size, size, w, b, float(eps), out.data_ptr())
    return out
