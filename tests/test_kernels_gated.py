"""Gated products: one array, activated, times another."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hfopt.errors import InvalidInput
from hfopt.functional import ACTIVATIONS, activated_product, gelu_mul, silu_mul
from hfopt.kernels import gated as kernels
from hfopt.kernels.linear.activation import SILU
from tests import reference
from tests.block_cases import LAYOUTS, assert_near, guarded, laid
from tests.pairs import pairs_of
from tests.reference import DTYPES, assert_same_on_threads

Product = Callable[..., Tensor]
PRODUCTS: dict[str, tuple[Product, Callable[[Tensor], Tensor]]] = {
    "silu": (silu_mul, F.silu),
    "gelu": (gelu_mul, F.gelu),
    "gelu_tanh": (partial(gelu_mul, approximate="tanh"), partial(F.gelu, approximate="tanh")),
}
SHAPES = ((1,), (3, 15), (2, 5, 33), (3, 2, 4096 + 7))


def _inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    return (torch.randn(shape) * 4).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize(("name", "dtype", "shape", "layout"), pairs_of(PRODUCTS, DTYPES, SHAPES, LAYOUTS))
def test_products(name: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    if layout == "turned" and len(shape) < 2:
        return
    product, activation = PRODUCTS[name]
    x, y = _inputs(dtype, *shape)
    found = product(laid(x, layout), laid(y, layout))
    assert found.shape == x.shape and found.dtype is dtype and found.is_contiguous()
    assert_near(found, activation(x.double()) * y.double())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", ("new", "x", "y"))
def test_where_the_result_goes(layout: str, target: str) -> None:
    x, y = (laid(each, layout) for each in _inputs(torch.float32, 3, 37))
    out = {"new": laid(torch.zeros(3, 37), layout), "x": x, "y": y}[target]
    expected = silu_mul(x, y)
    assert silu_mul(x, y, out=out) is out
    assert torch.equal(out, expected)


def test_halves_of_one_tensor() -> None:
    both = torch.randn(5, 2 * 37)
    gate, up = both.chunk(2, dim=-1)
    expected = silu_mul(gate, up)
    assert torch.equal(silu_mul(gate, up, out=gate), expected)
    assert torch.equal(both[:, :37], expected)


@pytest.mark.parametrize("shift", (-1, 1, 16))
def test_outputs_that_overlap_other_elements(shift: int) -> None:
    memory = torch.randn(3 * 4096 + 32)
    x, y = memory[16 : 16 + 2 * 4096], torch.randn(2 * 4096)
    expected = silu_mul(x.clone(), y)
    out = memory[16 + shift : 16 + shift + 2 * 4096]
    assert torch.equal(silu_mul(x, y, out=out), expected)


@pytest.mark.parametrize("activation", (None, *ACTIVATIONS))
def test_all_activations(activation: str | None) -> None:
    x, y = _inputs(torch.float32, 7, 41)
    wide = x.double() if activation is None else ACTIVATIONS[activation](x.double())
    assert_near(activated_product(activation, x, y), wide * y.double())


@pytest.mark.parametrize("name", PRODUCTS)
def test_values_that_are_not_finite(name: str) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 300.0, -300.0, 0.0]).repeat(7)
    # of -inf torch makes NaN, too: 0 times inf
    expected = torch.tensor([torch.nan, torch.inf, torch.nan, 300.0, 0.0, 0.0]).repeat(7)
    torch.testing.assert_close(PRODUCTS[name][0](x, torch.ones_like(x)), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_guards(dtype: torch.dtype) -> None:
    x, y = _inputs(dtype, 11, 8191)
    assert_same_on_threads(lambda: silu_mul(x, y))
    out, (n_rows, size) = guarded(torch.zeros_like(x)), x.shape
    rows = (x.data_ptr(), size, y.data_ptr(), size, out.tensor.data_ptr(), size)
    kernels.gated_product(reference.like(dtype), SILU, *rows, n_rows, size)
    assert torch.equal(out.tensor, silu_mul(x, y))
    out.check()


def test_nothing_to_do() -> None:
    for shape in ((0,), (0, 5), (5, 0)):
        assert silu_mul(torch.ones(shape), torch.ones(shape)).shape == shape


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: silu_mul(torch.ones(2, 3), torch.ones(3)), r"y has shape \(3,\): \(2, 3\) is needed"),
        (lambda: silu_mul(torch.ones(2, 3), torch.ones(2, 3).half()), "y has dtype torch.float16"),
        (lambda: silu_mul(torch.ones(2, 3).double(), torch.ones(2, 3).double()), "x has dtype"),
        (lambda: silu_mul(torch.ones(()), torch.ones(())), r"x has shape \(\)"),
        (lambda: silu_mul(torch.ones(3), torch.ones(3), torch.ones(4)), "out has shape"),
        (lambda: silu_mul(torch.ones(3), torch.ones(3), torch.ones(3).half()), "out has dtype"),
        (lambda: silu_mul(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3).expand(2, 3)), "out has strides"),
        (lambda: silu_mul(torch.ones(3), [1.0]), "y is a list"),  # type: ignore[arg-type]
        (lambda: silu_mul(torch.ones(3), torch.ones(3), [1.0]), "out is a list"),  # type: ignore[arg-type]
        (lambda: gelu_mul(torch.ones(3), torch.ones(3), approximate="erf"), "approximate is 'erf'"),
    ),
)
def test_wrong_arguments(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        call()


def test_memory_that_is_gone() -> None:
    whole = torch.ones(8)
    part = whole[2:5]
    whole.untyped_storage().resize_(0)
    for call in (
        lambda: silu_mul(part, torch.ones(3)),
        lambda: silu_mul(torch.ones(3), part),
        lambda: silu_mul(torch.ones(3), torch.ones(3), part),
    ):
        with pytest.raises(InvalidInput, match="has no memory"):
            call()
