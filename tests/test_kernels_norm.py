"""RMSNorm and LayerNorm against float64 and against torch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from hfopt import functional
from hfopt.functional import Norm
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
    rows: Any = reference.like(dtype), x.data_ptr(), 5, 123
    address = out.tensor.data_ptr()
    like, *rows = rows
    kernels.norm(like, False, *rows, weight.data_ptr(), 0, 0, 1e-5, address)
    assert torch.equal(out.tensor, functional.rms_norm(x, weight, 1e-5))
    kernels.norm(like, True, *rows, weight.data_ptr(), bias.data_ptr(), 0, 1e-5, address)
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
    functional.norm_heads(qkv, Norm("rms", weight, None, 1e-6), size, 3, size)
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
        functional.norm_heads(guarded.tensor, Norm("rms", weight, None, 1e-6), 0, 8, 48)
        guarded.check()
        return guarded.tensor

    assert_same_on_threads(normed)


def test_no_heads() -> None:
    qkv = torch.randn(2, 8)
    before = qkv.clone()
    norm = Norm("rms", torch.ones(4), None, 1e-5)
    functional.norm_heads(qkv, norm, 8, 0, 4)
    functional.norm_heads(torch.empty(0, 8), norm, 0, 2, 4)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("rms", "layer"))
@pytest.mark.parametrize("has_bias", (False, True))
def test_heads_with_vectors_of_their_own(dtype: torch.dtype, kind: Any, has_bias: bool) -> None:
    qkv, weight = torch.randn(5, 6 * 24).to(dtype), torch.randn(3, 24).to(dtype)
    bias = torch.randn(3, 24).to(dtype) if has_bias and kind == "layer" else None
    heads, before = qkv.view(5, 6, 24)[:, 2:5].clone(), qkv.clone()
    norm = Norm(kind, weight, bias, 1e-5)
    functional.norm_heads(qkv, norm, 2 * 24, 3, 24)
    for head in range(3):
        own = Norm(kind, weight[head], None if bias is None else bias[head], 1e-5)
        assert torch.equal(qkv.view(5, 6, 24)[:, 2 + head], functional.norm(heads[:, head], own))
    qkv.view(5, 6, 24)[:, 2:5] = heads
    assert torch.equal(qkv, before)
    assert torch.equal(
        functional.norm(heads, norm)[:, 1],
        functional.norm(heads[:, 1], Norm(kind, weight[1], None if bias is None else bias[1], 1e-5)),
    )


# ---- weights that are kept as their difference from 1 ------------------------------------------------------------------


def _gemma(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_unit_offset(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, bias = _inputs(dtype, shape)
    normed = functional.norm(x, Norm("rms", weight, None, 1e-5, unit_offset=True))
    exact = reference.rms_norm(x, weight.double() + 1, 1e-5)
    assert_as_exact_as_torch(normed, _gemma(x, weight, 1e-5), exact)
    if shape[-1] > 1:
        normed = functional.norm(x, Norm("layer", weight, bias, 1e-5, unit_offset=True))
        theirs = torch_functional.layer_norm(x, shape[-1:], weight + 1, bias, 1e-5)
        assert_as_exact_as_torch(normed, theirs, reference.layer_norm(x, weight.double() + 1, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_weight(dtype: torch.dtype) -> None:
    x = torch.randn(5, 123).to(dtype)
    ones = torch.ones(123, dtype=dtype)
    assert torch.equal(functional.rms_norm(x, None, 1e-5), functional.rms_norm(x, ones, 1e-5))
