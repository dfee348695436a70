"""RMSNorm and LayerNorm, with the addition of a residual fused in."""

import numpy as np
import torch
from torch import Tensor

from hfopt.kernels import norm as kernels

from .checks import array_of, check_rows, check_shape, check_vector, prepare_threads


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


def _with_residual(
    hidden_states: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(contiguous hidden_states, contiguous residual, memory for their sum)."""
    hidden_states = check_rows("hidden_states", hidden_states)
    if residual is None:
        return hidden_states, None, None
    residual = check_rows("residual", residual, hidden_states.dtype)
    check_shape("residual", residual, tuple(hidden_states.shape))
    return hidden_states, residual, torch.empty_like(hidden_states)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rms_norm(
    hidden_states: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    hidden_states, residual, summed = _with_residual(hidden_states, residual)
    size = hidden_states.shape[-1]
    w = check_vector("weight", weight, size, hidden_states.dtype)
    out = torch.empty_like(hidden_states)
    if out.numel():
        prepare_threads()
        x, y = array_of(hidden_states).reshape(-1, size), array_of(out).reshape(-1, size)
        kernels.rms_norm(x, _address(residual), w, np.float32(eps), _address(summed), y)
    return out, summed


def _layer_norm(
    hidden_states: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    hidden_states, residual, summed = _with_residual(hidden_states, residual)
    size, dtype = hidden_states.shape[-1], hidden_states.dtype
    w = 0 if weight is None else check_vector("weight", weight, size, dtype)
    b = 0 if bias is None else check_vector("bias", bias, size, dtype)
    out = torch.empty_like(hidden_states)
    if out.numel():
        prepare_threads()
        x, y = array_of(hidden_states).reshape(-1, size), array_of(out).reshape(-1, size)
        kernels.layer_norm(x, _address(residual), w, b, np.float32(eps), _address(summed), y)
    return out, summed
