"""A residual connection and the norm behind it in one kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.functional import add_layer_norm, add_rms_norm, fast_layer_norm, layer_norm, rms_norm
from hfopt.kernels import add_norm as kernels
from tests import reference
from tests.block_cases import LAYOUTS, assert_near, guarded, laid
from tests.pairs import pairs_of
from tests.reference import DTYPES, assert_same_on_threads

SHAPES = ((1, 1), (5, 33), (2, 3, 64), (3, 2051))


def _inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(residual, x, weight, bias)."""
    size = shape[-1]
    numbers = torch.randn(shape) * 3, torch.randn(shape) + 1, torch.randn(size), torch.randn(size)
    return tuple(each.to(dtype) for each in numbers)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "layout", "vectors", "add_back"),
    pairs_of(("rms", "layer"), DTYPES, SHAPES, LAYOUTS, ("both", "weight", "bias", "none"), (False, True)),
)
def test_sums_and_norms(
    kind: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str, vectors: str, add_back: bool
) -> None:
    r, x, w, b = _inputs(dtype, *shape)
    weight, bias = w if vectors in ("both", "weight") else None, b if vectors in ("both", "bias") else None
    total = x + r
    residual, before = laid(r, layout), r.clone()
    ours = add_rms_norm if kind == "rms" else add_layer_norm
    found = ours(residual, laid(x, layout), weight, bias, 1e-5, add_back)
    if kind == "rms":
        exact = reference.rms_norm(total, torch.ones_like(w) if weight is None else weight, 1e-5)
        exact = exact if bias is None else exact + bias.double()
    else:
        exact = reference.layer_norm(total, weight, bias, 1e-5)
    assert found.dtype is dtype and found.is_contiguous()
    assert_near(found, exact)
    assert torch.equal(residual, total if add_back else before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add_back", (False, True))
def test_the_norm_sees_the_rounded_sum(dtype: torch.dtype, add_back: bool) -> None:
    """As in the models of transformers, and with the bits of the norm alone."""
    r, x, weight, bias = _inputs(dtype, 4, 515)
    found = add_rms_norm(r.clone(), x, weight, None, 1e-6, add_back)
    assert torch.equal(found, rms_norm(x + r, weight, 1e-6))
    found = add_layer_norm(r.clone(), x, weight, bias, 1e-6, add_back)
    assert torch.equal(found, layer_norm(x + r, weight, bias, 1e-6))


@pytest.mark.parametrize("add_back", (False, True))
def test_no_residual(add_back: bool) -> None:
    _, x, weight, bias = _inputs(torch.bfloat16, 4, 515)
    before = x.clone()
    assert torch.equal(add_rms_norm(None, x, weight, None, 1e-6, add_back), rms_norm(x, weight, 1e-6))
    found = add_layer_norm(None, x, weight, bias, 1e-6, add_back)
    assert torch.equal(found, layer_norm(x, weight, bias, 1e-6))
    assert torch.equal(x, before)


def test_residuals_that_share_memory() -> None:
    weight = torch.ones(64)
    x = torch.randn(3, 64)
    doubled = x + x
    expected = rms_norm(doubled, weight, 1e-6)
    assert torch.equal(add_rms_norm(x, x, weight, None, 1e-6, add_back=True), expected)
    assert torch.equal(x, doubled)
    memory = torch.randn(4 * 64)
    residual, x = memory[8 : 8 + 192].view(3, 64), memory[:192].view(3, 64)
    total = residual + x
    found = add_rms_norm(residual, x, weight, None, 1e-6, add_back=True)
    assert torch.equal(found, rms_norm(total, weight, 1e-6))
    assert torch.equal(residual, total)
    tied = torch.randn(3, 64)
    total, expected = tied + 1, rms_norm(tied + 1, tied[1].clone(), 1e-6)
    assert torch.equal(add_rms_norm(tied, torch.ones(3, 64), tied[1], None, 1e-6, add_back=True), expected)
    assert torch.equal(tied, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_guards(dtype: torch.dtype) -> None:
    r, x, weight, bias = _inputs(dtype, 301, 517)
    assert_same_on_threads(lambda: add_rms_norm(r, x, weight, bias, 1e-6))
    assert_same_on_threads(lambda: add_layer_norm(r, x, weight, bias, 1e-6))
    residual, out = guarded(r), guarded(torch.zeros_like(r))
    at: Any = residual.tensor.data_ptr()
    rows = (x.data_ptr(), 517, at, 517, at, 517, 301, 517, weight.data_ptr(), bias.data_ptr())
    for is_layer in (False, True):
        residual.tensor.copy_(r)
        kernels.add_norm(reference.like(dtype), is_layer, *rows, 1e-6, out.tensor.data_ptr())
        expected = (add_layer_norm if is_layer else add_rms_norm)(r, x, weight, bias, 1e-6)
        assert torch.equal(out.tensor, expected)
        residual.check()
        out.check()


def test_nothing_to_do() -> None:
    assert add_rms_norm(torch.empty(0, 5), torch.empty(0, 5), None, None, 1e-6, True).shape == (0, 5)
    assert add_layer_norm(None, torch.empty(5, 0), None, None, 1e-6).shape == (5, 0)


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_values_that_are_not_finite_stay_in_their_row(value: float) -> None:
    r, x, weight, bias = _inputs(torch.float32, 3, 41)
    x[1, 40] = value
    found = add_rms_norm(r, x, weight, bias, 1e-6)
    assert found[[0, 2]].isfinite().all() and found[1].isnan().any()


_X, _ONES = torch.ones(2, 3), torch.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: add_rms_norm(torch.ones(3), _X, None, None, 1e-6), "residual has shape"),
        (lambda: add_rms_norm(_X.half(), _X, None, None, 1e-6), "residual has dtype"),
        (lambda: add_rms_norm(torch.ones(3), _X, None, None, 1e-6, True), "residual has shape"),
        (lambda: add_rms_norm(_ONES.expand(2, 3), _X, None, None, 1e-6, True), "residual has strides"),
        (lambda: add_rms_norm(None, _X, torch.ones(2), None, 1e-6), "weight has shape"),
        (lambda: add_rms_norm(None, _X, None, torch.ones(2), 1e-6), "bias has shape"),
        (lambda: add_rms_norm(None, _X, None, None, None), "eps is None"),  # type: ignore[arg-type]
        (lambda: add_rms_norm(None, torch.ones(()), None, None, 1e-6), "x has shape"),
        (lambda: add_rms_norm(_X, None, None, None, 1e-6), "x is a NoneType"),  # type: ignore[arg-type]
        (lambda: fast_layer_norm(_X, (2,), None, None, 1e-6), r"normalized_shape is \(2,\)"),
        (lambda: fast_layer_norm(_X, (), None, None, 1e-6), r"normalized_shape is \(\)"),
        (lambda: fast_layer_norm(_X, (2, 3), _ONES, None, 1e-6), "weight has shape"),
    ),
)
def test_wrong_arguments(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        call()


def test_a_residual_that_is_only_read_may_be_expanded() -> None:
    residual = torch.randn(3).expand(2, 3)
    expected = add_rms_norm(residual.clone(), _X, _ONES, None, 1e-6)
    assert torch.equal(add_rms_norm(residual, _X, _ONES, None, 1e-6), expected)
