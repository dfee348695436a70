"""RMSNorm and LayerNorm against float64 and against torch."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from hfopt import functional
from hfopt.kernels import norm as kernels
from tests import reference
from tests.reference import DTYPES, Guarded, assert_as_exact_as_torch, assert_same_on_threads

# odd ones; and below, at and above one vector, and two vectors, which are read together
SHAPES = (
    *((5, 123), (7, 41), (1, 16), (2, 3, 2051)),
    *((60, 15), (60, 16), (60, 17), (60, 31), (60, 32), (60, 33), (60, 48), (60, 64)),
    (4, 1),
)


def _inputs(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, residual, weight, bias)."""
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    return x * 3 + 1, residual, torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1]).to(dtype)


def _llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual, weight, _ = _inputs(dtype, shape)
    normed = functional.rms_norm(x, weight, 1e-5)
    assert normed.shape == x.shape
    assert_as_exact_as_torch(normed, _llama(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))

    normed, summed = functional.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, x + residual)
    assert torch.equal(normed, functional.rms_norm(summed, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("affine", ("weight and bias", "weight", "bias", "neither"))
def test_layer_norm(dtype: torch.dtype, shape: tuple[int, ...], affine: str) -> None:
    x, residual, w, b = _inputs(dtype, shape)
    weight, bias = (w if "weight" in affine else None), (b if "bias" in affine else None)
    normed = functional.layer_norm(x, weight, bias, 1e-5)
    theirs = torch_functional.layer_norm(x, shape[-1:], weight, bias, 1e-5)
    assert_as_exact_as_torch(normed, theirs, reference.layer_norm(x, weight, bias, 1e-5))

    normed, summed = functional.add_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(summed, x + residual)
    assert torch.equal(normed, functional.layer_norm(summed, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_has_no_variance(dtype: torch.dtype) -> None:
    x = torch.randn(4, 1).to(dtype)
    assert torch.equal(functional.layer_norm(x, None, None, 1e-5), torch.zeros(4, 1, dtype=dtype))


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_stay_in_their_row(dtype: torch.dtype, value: float) -> None:
    x, _, weight, bias = _inputs(dtype, (5, 41))
    x[1, 3] = x[3, 40] = value
    for ours, theirs in (
        (functional.rms_norm(x, weight, 1e-5), _llama(x, weight, 1e-5)),
        (
            functional.layer_norm(x, weight, bias, 1e-5),
            torch_functional.layer_norm(x, (41,), weight, bias, 1e-5),
        ),
    ):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert ours[[0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_wider_tensor(dtype: torch.dtype) -> None:
    wide = torch.randn(3, 4, 100).to(dtype)
    weight = torch.randn(41).to(dtype)
    for x in (wide[..., 7:48], wide[:, -1, :41], wide.transpose(0, 1)[..., :41]):
        assert not x.is_contiguous()
        assert torch.equal(functional.rms_norm(x, weight, 1e-5), functional.rms_norm(x.clone(), weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    x, residual, weight, bias = _inputs(dtype, (401, 515))
    assert_same_on_threads(lambda: functional.add_rms_norm(x, residual, weight, 1e-5)[0])
    assert_same_on_threads(lambda: functional.add_layer_norm(x, residual, weight, bias, 1e-5)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_outside(dtype: torch.dtype) -> None:
    x, residual, weight, bias = _inputs(dtype, (5, 123))
    summed, out = Guarded(dtype, 5, 123), Guarded(dtype, 5, 123)
    w, b = weight.data_ptr(), bias.data_ptr()
    rows = (reference.like(dtype), x.data_ptr(), 5, 123, residual.data_ptr())
    written = (summed.tensor.data_ptr(), out.tensor.data_ptr())
    kernels.rms_norm(*rows, w, 1e-5, *written)
    assert torch.equal(out.tensor, functional.add_rms_norm(x, residual, weight, 1e-5)[0])
    kernels.layer_norm(*rows, w, b, 1e-5, *written)
    assert torch.equal(out.tensor, functional.add_layer_norm(x, residual, weight, bias, 1e-5)[0])
    summed.check()
    out.check()


def test_no_rows() -> None:
    assert functional.rms_norm(torch.empty(0, 41), torch.ones(41), 1e-5).shape == (0, 41)
