"""RMSNorm and LayerNorm, with the addition of a residual fused in."""

import torch
from torch import Tensor

from hfopt.kernels import norm as kernels

from .checks import ELEMENTS, address_of, check_array, check_rows, check_shape, prepare_threads


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (https://arxiv.org/abs/1910.07467).

    hidden_states [..., size], its last dimension contiguous; weight [size]; float32 or bfloat16, both the
    same. Raises `InvalidInput`.
    """
    return _rms_norm(hidden_states, None, weight, eps)[0]


def add_rms_norm(
    hidden_states: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(rms_norm(summed), summed) with summed = hidden_states + residual; arguments as in `rms_norm`."""
    normed, summed = _rms_norm(hidden_states, residual, weight, eps)
    assert summed is not None
    return normed, summed


def layer_norm(hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """weight * (x - mean(x)) / sqrt(var(x) + eps) + bias over the last dimension
    (https://arxiv.org/abs/1607.06450).

    hidden_states [..., size], its last dimension contiguous; weight and bias [size] or None; float32 or
    bfloat16, all the same. Raises `InvalidInput`.
    """
    return _layer_norm(hidden_states, None, weight, bias, eps)[0]


def add_layer_norm(
    hidden_states: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(summed), summed) with summed = hidden_states + residual; arguments as in `layer_norm`."""
    normed, summed = _layer_norm(hidden_states, residual, weight, bias, eps)
    assert summed is not None
    return normed, summed


def _with_sum(x: Tensor, residual: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(contiguous residual, memory for x + residual)."""
    if residual is None:
        return None, None
    residual = check_rows("residual", residual, x.dtype)
    check_shape("residual", residual, tuple(x.shape))
    return residual, torch.empty_like(x)


def _rms_norm(
    hidden_states: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    x = check_rows("hidden_states", hidden_states)
    size, dtype = x.shape[-1], x.dtype
    w = check_array("weight", weight, (size,), dtype)
    residual, summed = _with_sum(x, residual)
    out = torch.empty_like(x)
    n = out.numel()
    if n:
        prepare_threads()
        address, n_rows = address_of("hidden_states", x), n // size
        r = 0 if residual is None else address_of("residual", residual)
        s = 0 if summed is None else summed.data_ptr()
        kernels.rms_norm(ELEMENTS[dtype], address, n_rows, size, r, w, float(eps), s, out.data_ptr())
    return out, summed


def _layer_norm(
    hidden_states: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    x = check_rows("hidden_states", hidden_states)
    size, dtype = x.shape[-1], x.dtype
    w = 0 if weight is None else check_array("weight", weight, (size,), dtype)
    b = 0 if bias is None else check_array("bias", bias, (size,), dtype)
    residual, summed = _with_sum(x, residual)
    out = torch.empty_like(x)
    n = out.numel()
    if n:
        prepare_threads()
        address, n_rows = address_of("hidden_states", x), n // size
        r = 0 if residual is None else address_of("residual", residual)
        s = 0 if summed is None else summed.data_ptr()
        kernels.layer_norm(ELEMENTS[dtype], address, n_rows, size, r, w, b, float(eps), s, out.data_ptr())
    return out, summed
