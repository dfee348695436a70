"""Products with a number, as the multipliers of some models need them."""

import torch
from torch import Tensor

from hfopt.kernels import elementwise as kernels

from .checks import ELEMENTS, check_rows, check_shape, prepare_threads


def scale(x: Tensor, factor: float, *, divide: bool = False, residual: Tensor | None = None) -> Tensor:
    """x * factor, or x / factor; plus the residual, if there is one.

    In float32, with the bits of torch's own `residual + x * factor`; of bfloat16 the result is rounded, once. x and residual
    [..., size], the last dimension contiguous, float32, bfloat16 or float16, both the same. Raises `InvalidInput`.
    """
    x, x_at = check_rows("x", x)
    address = 0
    if residual is not None:
        residual, address = check_rows("residual", residual, x.dtype)
        check_shape("residual", residual, tuple(x.shape))
    out = torch.empty_like(x)
    if out.numel():
        prepare_threads()
        kernels.scale(ELEMENTS[x.dtype], x_at, out.numel(), float(factor), divide, address, out.data_ptr())
    return out
