"""RMSNorm and FastLayerNorm as modules."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hfopt.errors import InvalidInput
from hfopt.functional import fast_layer_norm, rms_norm
from hfopt.modules import FastLayerNorm, RMSNorm
from tests import reference
from tests.block_cases import LAYOUTS, assert_near, laid
from tests.pairs import pairs_of
from tests.reference import DTYPES


@pytest.mark.parametrize(("dtype", "layout", "size"), pairs_of(DTYPES, LAYOUTS, (1, 33, 2051)))
def test_norms(dtype: torch.dtype, layout: str, size: int) -> None:
    x = (torch.randn(2, 3, size) * 3 + 1).to(dtype)
    weight, bias = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    given = laid(x, layout)
    with torch.no_grad():
        found = RMSNorm(size, 1e-5, weight)(given)
    assert_near(found, reference.rms_norm(x, weight, 1e-5))
    assert torch.equal(RMSNorm.apply_function(given, weight, 1e-5), found)
    assert torch.equal(rms_norm(given, weight, 1e-5), found)
    with torch.no_grad():
        found = FastLayerNorm(size, 1e-5, weight, bias)(given)
    assert_near(found, reference.layer_norm(x, weight, bias, 1e-5))
    assert torch.equal(FastLayerNorm.apply_function(given, (size,), weight, bias, 1e-5), found)


def test_several_dimensions() -> None:
    x, weight = torch.randn(2, 5, 3, 7), torch.randn(3, 7)
    found = fast_layer_norm(x, (3, 7), weight, None, 1e-5)
    assert_near(found, F.layer_norm(x.double(), (3, 7), weight.double(), None, 1e-5))
    assert torch.equal(FastLayerNorm((3, 7), 1e-5, weight)(x), found)


def test_weights() -> None:
    own = RMSNorm(8)
    assert isinstance(own.weight, nn.Parameter) and own.eps == 1e-6
    weight = nn.Parameter(torch.randn(8))
    assert RMSNorm(8, weight=weight).weight is weight
    plain = torch.ones(8)
    norm = FastLayerNorm(8, 1e-5, plain)
    plain.mul_(3)
    x = torch.randn(2, 8)
    assert_near(norm(x), reference.layer_norm(x, plain, None, 1e-5))
    assert norm.bias is None and set(norm.state_dict()) == {"weight"}


def test_gradients_and_other_dtypes() -> None:
    x, norm = torch.randn(2, 8, requires_grad=True), RMSNorm(8)
    assert norm(x).grad_fn is not None
    double = x.detach().double()
    expected = reference.rms_norm(double, norm.weight.detach(), 1e-6)
    torch.testing.assert_close(norm.double()(double), expected)


@pytest.mark.parametrize("grad", (True, False))
def test_wrong_arguments(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        for norm in (RMSNorm(8), FastLayerNorm(8, 1e-5, torch.ones(8))):
            with pytest.raises(InvalidInput, match="x has shape"):
                norm(torch.ones(2, 9))
            with pytest.raises(TypeError, match="x is a list"):
                norm([1.0])
    with pytest.raises(InvalidInput, match="weight has dtype"):
        RMSNorm.apply_function(torch.ones(2, 8), torch.ones(8).half(), 1e-5)
    with pytest.raises(TypeError, match="weight or bias is a list"):
        FastLayerNorm(8, 1e-5, [1.0])  # type: ignore[arg-type]
