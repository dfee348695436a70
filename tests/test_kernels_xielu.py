"""xIELU: against float64, in place of transformers' own, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from hfopt import functional
from hfopt.errors import InvalidInput
from hfopt.functional import Xielu
from hfopt.kernels import step as kernels
from hfopt.patches.activation import XIELU, match_activation, xielu_of
from tests.reference import DTYPES, assert_as_exact_as_torch, assert_same_on_threads
from tests.test_instructions import SLOT, run, tokens

pytestmark = pytest.mark.skipif("xielu" not in ACT2FN, reason="this transformers has no xIELU")

SHAPES = ((5, 123), (1, 1), (2, 3, 2051), (3, 4096), (60, 17))
ALPHAS = ((0.8, 0.8), (0.01, 0.51), (30.0, 25.0))


def activation(dtype: torch.dtype, alpha_p: float = 0.8, alpha_n: float = 0.8) -> Any:
    """Transformers' own, with numbers that can be told apart."""
    return ACT2FN["xielu"].__class__(alpha_p, alpha_n).to(dtype).requires_grad_(False)


def numbers_of(module: Any) -> Xielu:
    numbers = xielu_of(module)
    assert numbers is not None
    return numbers


def exactly(x: Tensor, numbers: Xielu) -> Tensor:
    alpha_p, alpha_n, beta, eps = (each.double() for each in numbers)
    positive, negative = (torch.nn.functional.softplus(each) for each in (alpha_p, alpha_n))
    x = x.double()
    below = (torch.expm1(torch.minimum(x, eps)) - x) * (beta + negative) + beta * x
    return torch.where(x > 0, positive * x * x + beta * x, below)


def spread(dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers of all sizes that squares do not overflow."""
    x = torch.randn(shape) * 10.0 ** torch.randint(-7, 2, shape)
    x[..., 0] = -0.0
    return x.clamp(-50, 50).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alphas", ALPHAS)
def test_against_float64(dtype: torch.dtype, shape: tuple[int, ...], alphas: tuple[float, float]) -> None:
    module, x = activation(dtype, *alphas), spread(dtype, *shape)
    numbers = numbers_of(module)
    found = functional.xielu(x, numbers)
    assert found.shape == x.shape
    assert_as_exact_as_torch(found, module(x), exactly(x, numbers))


@pytest.mark.parametrize("bounds", ((-1e-4, 1e-4), (-0.6, -0.4), (-30.0, 0.0), (0.0, 20.0)))
def test_each_branch_is_exact(bounds: tuple[float, float]) -> None:
    module = activation(torch.float32)
    x = torch.linspace(*bounds, 4001)
    assert_as_exact_as_torch(
        functional.xielu(x, numbers_of(module)), module(x), exactly(x, numbers_of(module))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite(dtype: torch.dtype) -> None:
    module = activation(dtype)
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0]).to(dtype)
    found, theirs = functional.xielu(x, numbers_of(module)), module(x)
    assert torch.equal(found.isnan(), theirs.isnan()) and torch.equal(found.isinf(), theirs.isinf())


def test_threads_change_nothing() -> None:
    module, x = activation(torch.float32), spread(torch.float32, 60, 4099)
    assert_same_on_threads(lambda: functional.xielu(x, numbers_of(module)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_instruction(dtype: torch.dtype) -> None:
    module, x, out = activation(dtype, 0.3, 1.1), tokens(dtype, 41), tokens(dtype, 41)
    numbers = numbers_of(module)
    expected = functional.xielu(x, numbers)
    places: dict[str, Any] = {**numbers.addresses(dtype)}
    run(kernels.XIELU, [x, out], IN=0, OUT=SLOT, SIZE=41, **places)
    assert torch.equal(out, expected)
    run(kernels.XIELU, [x], IN=0, OUT=0, SIZE=41, **places)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_told_by_its_values(dtype: torch.dtype) -> None:
    module = activation(dtype, 0.3, 1.1)
    assert match_activation(module) == XIELU

    class Other(type(module)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.01 * x.abs()

    other = copy.deepcopy(module)
    other.__class__ = Other
    assert match_activation(other) is None


def test_what_kernels_cannot_read_is_refused() -> None:
    numbers, x = numbers_of(activation(torch.float32)), torch.ones(3, 4)
    for wrong, message in (
        (x.double(), "x"),
        (x.to(torch.bfloat16), "alpha_p"),
        (torch.ones(4, 3).t(), "x"),
    ):
        with pytest.raises(InvalidInput, match=message):
            functional.xielu(wrong, numbers)
    for name in Xielu._fields:
        for value in (torch.ones(2), torch.ones(1).double(), torch.ones(1, device="meta")):
            with pytest.raises(InvalidInput, match=name):
                functional.xielu(x, numbers._replace(**{name: value}))
