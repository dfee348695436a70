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


def _inputs(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight, bias)."""
    return (
        torch.randn(shape).to(dtype) * 3 + 1,
        torch.randn(shape[-1]).to(dtype),
        torch.randn(shape[-1]).to(dtype),
    )


def _llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, _ = _inputs(dtype, shape)
    normed = functional.rms_norm(x, weight, 1e-5)
    assert normed.shape == x.shape
    assert_as_exact_as_torch(normed, _llama(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("affine", ("weight and bias", "weight", "bias", "neither"))
def test_layer_norm(dtype: torch.dtype, shape: tuple[int, ...], affine: str) -> None:
    x, w, b = _inputs(dtype, shape)
    weight, bias = (w if "weight" in affine else None), (b if "bias" in affine else None)
    normed = functional.layer_norm(x, weight, bias, 1e-5)
    theirs = torch_functional.layer_norm(x, shape[-1:], weight, bias, 1e-5)
    assert_as_exact_as_torch(normed, theirs, reference.layer_norm(x, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_has_no_variance(dtype: torch.dtype) -> None:
    x = torch.randn(4, 1).to(dtype)
    assert torch.equal(functional.layer_norm(x, None, None, 1e-5), torch.zeros(4, 1, dtype=dtype))


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_stay_in_their_row(dtype: torch.dtype, value: float) -> None:
    x, weight, bias = _inputs(dtype, (5, 41))
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
    x, weight, bias = _inputs(dtype, (401, 515))
    assert_same_on_threads(lambda: functional.rms_norm(x, weight, 1e-5))
    assert_same_on_threads(lambda: functional.layer_norm(x, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_outside(dtype: torch.dtype) -> None:
    x, weight, bias = _inputs(dtype, (5, 123))
    out = Guarded(dtype, 5, 123)
    rows, address = (reference.like(dtype), x.data_ptr(), 5, 123), out.tensor.data_ptr()
    kernels.rms_norm(*rows, weight.data_ptr(), 1e-5, address)
    assert torch.equal(out.tensor, functional.rms_norm(x, weight, 1e-5))
    kernels.layer_norm(*rows, weight.data_ptr(), bias.data_ptr(), 1e-5, address)
    assert torch.equal(out.tensor, functional.layer_norm(x, weight, bias, 1e-5))
    out.check()


def test_no_rows() -> None:
    assert functional.rms_norm(torch.empty(0, 41), torch.ones(41), 1e-5).shape == (0, 41)


# ---- heads -------------------------------------------------------------------------------------------------------------

SIZES = (1, 15, 16, 31, 32, 33, 64, 80, 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_heads_as_rows_of_their_own(dtype: torch.dtype, size: int) -> None:
    """Of six heads three change, as the rows of a contiguous tensor do; what is behind the last one stays, too."""
    qkv, weight = torch.randn(2, 5, 6 * size + 3).to(dtype) * 3 + 1, torch.randn(size).to(dtype)
    heads = qkv[..., : 6 * size].reshape(2, 5, 6, size)[..., 1:4, :].contiguous()
    expected = qkv.clone()
    expected[..., size : 4 * size] = functional.rms_norm(heads, weight, 1e-6).flatten(2)
    functional.rms_norm_heads(qkv, weight, 1e-6, 1, 3)
    assert torch.equal(qkv.view(torch.uint8), expected.view(torch.uint8))
    exact = reference.rms_norm(heads, weight, 1e-6)
    changed = qkv[..., size : 4 * size].reshape(heads.shape)
    assert_as_exact_as_torch(changed, _llama(heads, weight, 1e-6), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_on_threads_and_between_guards(dtype: torch.dtype) -> None:
    qkv, weight = torch.randn(301, 8 * 48).to(dtype), torch.randn(48).to(dtype)

    def normed() -> Tensor:
        guarded = Guarded(dtype, *qkv.shape)
        guarded.tensor.copy_(qkv)
        functional.rms_norm_heads(guarded.tensor, weight, 1e-6, 0, 8)
        guarded.check()
        return guarded.tensor

    assert_same_on_threads(normed)


def test_no_heads() -> None:
    qkv = torch.randn(2, 8)
    before = qkv.clone()
    functional.rms_norm_heads(qkv, torch.ones(4), 1e-5, 2, 0)
    functional.rms_norm_heads(torch.empty(0, 8), torch.ones(4), 1e-5, 0, 2)
    assert torch.equal(qkv, before)
