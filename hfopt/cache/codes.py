"""Keys and values as 8-bit codes, with a scale for each token and head."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput

KV_CACHES = (None, "int8")  # what `kv_cache` may be

_MAX_CODE = 127
_LARGEST = float(np.finfo(np.float32).max)


def check_kv_cache(kv_cache: str | None) -> None:
    """Raises `InvalidInput` unless it is one of `KV_CACHES`."""
    if not isinstance(kv_cache, str | None) or kv_cache not in KV_CACHES:
        raise InvalidInput(f"kv_cache = {kv_cache!r}: {', '.join(map(repr, KV_CACHES))} are allowed")


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 codes of the shape of x, float32 scales without its last dimension): codes * scale is about x.

    code = x * 127 / absmax, rounded to nearest even, and scale = absmax / 127 over the last dimension; 0 for a vector of
    zeros. One that is not finite has codes 0 and the scale NaN. `kernels.rope` gives the same bits.
    """
    x = x.float()
    most = x.abs().amax(-1)
    is_finite = most <= _LARGEST
    # in float64, because kernels have no exact division in float32; limited, because 127 / absmax may be infinite
    factor = (_MAX_CODE / most.double()).clamp(max=_LARGEST).float()
    codes = torch.where(is_finite[..., None], x * factor[..., None], 0.0).round().to(torch.int8)
    scales = torch.where(is_finite, most * float(np.float32(1 / _MAX_CODE)), torch.nan)
    return codes, scales


def dequantised(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale, rounded to a dtype."""
    return (codes.float() * scales[..., None]).to(dtype)
