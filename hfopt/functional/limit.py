"""Limits of values: hard, as some models set them to queries, keys and values, and smooth, as others do to logits."""

import math

import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import elementwise as kernels

from .checks import ELEMENTS, check_rows, prepare_threads


def clamp(x: Tensor, limit: float) -> Tensor:
    """x, between -limit and limit; what is NaN stays so.

    x [..., size], the last dimension contiguous, float32, bfloat16 or float16. Raises `InvalidInput`.
    """
    return _limited(x, limit, smooth=False)


def softcap(x: Tensor, limit: float) -> Tensor:
    """limit * tanh(x / limit), rounded after each operation (Gemma 2, https://arxiv.org/abs/2408.00118); x as in `clamp`."""
    return _limited(x, limit, smooth=True)


def check_limit(limit: float) -> float:
    """The limit; raises `InvalidInput` unless it is positive and finite."""
    if not (isinstance(limit, int | float) and 0 < limit < math.inf):
        raise InvalidInput(f"limit is {limit!r}: a positive finite number is needed")
    return float(limit)


def _limited(x: Tensor, limit: float, *, smooth: bool) -> Tensor:
    x, address = check_rows("x", x)
    limit = check_limit(limit)
    out = torch.empty_like(x)
    if out.numel():
        prepare_threads()
        kernels.limit(ELEMENTS[x.dtype], address, out.numel(), limit, smooth, out.data_ptr())
    return out
