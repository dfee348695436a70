"""Products with a number: the bits of torch, where it rounds once."""

import pytest
import torch
from torch import Tensor

from hfopt import functional
from hfopt.kernels import elementwise as kernels
from tests import reference
from tests.reference import DTYPES, Guarded, assert_same_on_threads

SHAPES = ((5, 123), (7, 41), (1, 1), (2, 3, 2051), (3, 4096), (60, 16), (60, 17))
FACTORS = (0.3, -12.0, 1 / 3, 45.254833995939045, 1e-39, 1e30)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    """Of all sizes, and both zeros."""
    x = torch.randn(shape) * 10.0 ** torch.randint(-38, 38, shape)
    x[..., 0], x[..., -1] = 0.0, -0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", FACTORS)
def test_bits_of_torch(dtype: torch.dtype, shape: tuple[int, ...], factor: float) -> None:
    x = numbers(dtype, *shape)
    for ours, theirs in (
        (functional.scale(x, factor), x * factor),
        (functional.scale(x, factor, divide=True), x / factor),
    ):
        if dtype is torch.bfloat16:
            # the instruction that rounds to it makes zeros of numbers this small
            small = theirs.abs() <= torch.finfo(dtype).smallest_normal
            assert (ours.abs() <= torch.finfo(dtype).smallest_normal)[small].all()
            ours, theirs = ours[~small], theirs[~small]
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", FACTORS)
def test_bits_of_torch_with_a_residual(shape: tuple[int, ...], factor: float) -> None:
    """No product is fused with its sum. In 16 bits torch rounds both."""
    x, residual = torch.randn(shape), torch.randn(shape)
    assert same_bits(functional.scale(x, factor, residual=residual), residual + x * factor)
    assert same_bits(functional.scale(x, factor, divide=True, residual=residual), residual + x / factor)
    for dtype in DTYPES[1:]:
        low, other = x.to(dtype), residual.to(dtype)
        once = (other.float() + low.float() * factor).to(dtype)
        assert same_bits(functional.scale(low, factor, residual=other), once)


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype: torch.dtype) -> None:
    x, residual = torch.randn(7, 41).to(dtype), torch.randn(7, 41).to(dtype)
    exact = residual.double() + x.double() / 0.7
    unit = torch.finfo(dtype).eps * exact.abs().max()
    assert (functional.scale(x, 0.7, divide=True, residual=residual).double() - exact).abs().max() <= unit


def test_values_that_are_not_finite() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0, 0.0])
    for factor in (0.0, torch.inf, 2.0):
        for ours, theirs in (
            (functional.scale(x, factor), x * factor),
            (functional.scale(x, factor, divide=True), x / factor),
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_wider_tensor(dtype: torch.dtype) -> None:
    wide = torch.randn(3, 4, 100).to(dtype)
    for x in (wide[..., 7:48], wide[:, -1, :41], wide.transpose(0, 1)[..., :41]):
        assert same_bits(
            functional.scale(x, 0.3, residual=x), functional.scale(x.clone(), 0.3, residual=x.clone())
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads(dtype: torch.dtype) -> None:
    x = torch.randn(401, 515).to(dtype)
    assert_same_on_threads(lambda: functional.scale(x, 0.3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_and_nowhere_else(dtype: torch.dtype) -> None:
    x, residual, out = torch.randn(5, 123).to(dtype), torch.randn(5, 123).to(dtype), Guarded(dtype, 5, 123)
    expected = functional.scale(x, 0.3, residual=residual)
    arguments = (reference.like(dtype), x.data_ptr(), x.numel(), 0.3, False, residual.data_ptr())
    kernels.scale(*arguments, out.tensor.data_ptr())
    assert torch.equal(out.tensor, expected)
    out.check()
    kernels.scale(*arguments, residual.data_ptr())
    assert torch.equal(residual, expected)


def test_nothing() -> None:
    assert functional.scale(torch.empty(0, 41), 0.3).shape == (0, 41)
