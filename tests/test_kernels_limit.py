"""Limits of values, hard and smooth, against torch."""

import pytest
import torch
from torch import Tensor

from hfopt import functional
from hfopt.kernels import elementwise as kernels
from tests import reference
from tests.reference import DTYPES, Guarded, assert_same_on_threads

SHAPES = ((5, 123), (7, 41), (1, 1), (2, 3, 2051), (60, 16), (60, 17))
LIMITS = (0.3, 8.0, 30.0)


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    x = torch.randn(shape) * 10
    x.flatten()[: 3 if x.numel() > 3 else 0] = torch.tensor(
        [torch.inf, -torch.inf, torch.nan][: x.numel() // 4]
    )
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limit", LIMITS)
def test_clamp_has_the_bits_of_torch(dtype: torch.dtype, shape: tuple[int, ...], limit: float) -> None:
    x = numbers(dtype, *shape)
    expected = x.clamp(-limit, limit)
    assert torch.equal(functional.clamp(x, limit).nan_to_num(99), expected.nan_to_num(99))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limit", LIMITS)
def test_softcap(dtype: torch.dtype, shape: tuple[int, ...], limit: float) -> None:
    """As transformers does it, each operation rounded: off by a few last bits of what is limited."""
    x = numbers(dtype, *shape)
    found, expected = functional.softcap(x, limit), torch.tanh(x / limit) * limit
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
    assert float(found.nan_to_num().abs().max()) <= float(torch.tensor(limit).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smooth", (False, True))
def test_in_place_and_nothing_outside(dtype: torch.dtype, smooth: bool) -> None:
    x, out = torch.randn(5, 123).to(dtype), Guarded(dtype, 5, 123)
    out.tensor.copy_(x)
    address = out.tensor.data_ptr()
    kernels.limit(reference.like(dtype), address, x.numel(), 0.5, smooth, address)
    operation = functional.softcap if smooth else functional.clamp
    assert torch.equal(out.tensor, operation(x, 0.5))
    out.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    x = torch.randn(401, 515).to(dtype)
    assert_same_on_threads(lambda: functional.softcap(x, 3.0))
