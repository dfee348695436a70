"""Linears with what follows them: against float64, over all kinds of Linear, and where their modules have to be called."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hfopt import modules
from hfopt.errors import InvalidInput
from hfopt.functional import linear as functional_linear
from hfopt.modules import Linear2SiluMul, LinearAdd, LinearMul, LinearSilu
from hfopt.modules.quantized import quantize_linear
from hfopt.modules.records import Records
from hfopt.modules.weights import read_weights
from hfopt.patches.weights import lay_by_outputs
from hfopt.quantization import Format, Int4, Int8
from tests.block_cases import LAYOUTS, assert_near, laid
from tests.pairs import pairs_of
from tests.reference import DTYPES


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# number of further inputs, and what becomes of the product and them
BLOCKS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "LinearSilu": (0, F.silu),
    "LinearRelu": (0, F.relu),
    "LinearGelu": (0, F.gelu),
    "LinearNewGelu": (0, _gelu_tanh),
    "LinearSiluMul": (1, lambda p, y: F.silu(p) * y),
    "LinearMul": (1, lambda p, y: p * y),
    "LinearAdd": (1, lambda p, y: p + y),
    "LinearAddAdd": (2, lambda p, y, z: p + y + z),
}
SHAPES = ((24,), (3, 24), (2, 70, 24))  # behind 64 rows another kernel begins


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def _linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    return nn.Linear(24, 40, bias=bias).to(dtype)


def _exact(linear: Any, x: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.double()
    return F.linear(x.double(), linear.weight.double(), bias)


class Calls:
    """How often kernels multiplied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            self.count += 1
            return functional_linear(*args, **kwargs)

        monkeypatch.setattr("hfopt.functional.linear", counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "layout", "bias"), pairs_of(BLOCKS, DTYPES, SHAPES, LAYOUTS, (True, False))
)
def test_blocks(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str, bias: bool, calls: Calls
) -> None:
    if layout == "turned" and len(shape) < 2:
        return
    n_more, after = BLOCKS[name]
    linear = _linear(dtype, bias)
    x, more = torch.randn(shape).to(dtype), [torch.randn(*shape[:-1], 40).to(dtype) for _ in range(n_more)]
    found = getattr(modules, name)(linear)(laid(x, layout), *(laid(each, layout) for each in more))
    assert calls.count == 1 and found.shape == (*shape[:-1], 40)
    assert_near(found, after(_exact(linear, x), *(each.double() for each in more)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate_and_up(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = _linear(dtype), _linear(dtype, bias=False)
    x = torch.randn(shape).to(dtype)
    assert_near(Linear2SiluMul(gate, up)(x), F.silu(_exact(gate, x)) * _exact(up, x))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_result_is_another_tensor(name: str) -> None:
    x, more = torch.randn(3, 24), [torch.randn(3, 40) for _ in range(BLOCKS[name][0])]
    before = [each.clone() for each in (x, *more)]
    getattr(modules, name)(_linear())(x, *more)
    assert all(torch.equal(*each) for each in zip(before, (x, *more), strict=True))


# ---- kinds of Linear ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", (Int8(), Int4(group=None)))
def test_quantised_linears(format: Format, calls: Calls) -> None:
    linear, other = (nn.Linear(64, 40).eval() for _ in range(2))  # in training they compute with floats
    for each in (linear, other):
        quantize_linear(each, format.pack(each.weight.detach()))
    x, y = torch.randn(3, 64), torch.randn(3, 40)
    assert torch.equal(LinearAdd(linear)(x, y), functional_linear_of(linear, x, residuals=[y]))
    torch.testing.assert_close(LinearMul(linear)(x, y), linear(x) * y)
    found = Linear2SiluMul(linear, other)(x)
    torch.testing.assert_close(found, F.silu(linear(x)) * other(x), rtol=1e-4, atol=1e-4)
    mixed = nn.Linear(64, 40)
    found = Linear2SiluMul(linear, mixed)(x)
    torch.testing.assert_close(found, F.silu(linear(x)) * mixed(x), rtol=1e-4, atol=1e-4)
    assert calls.count == 4


def functional_linear_of(linear: Any, x: Tensor, **more: Any) -> Tensor:
    weights = read_weights(Records(), "own", (linear,))
    assert weights is not None
    return functional_linear(x, weights, **more)


def test_a_conv1d(calls: Calls) -> None:
    conv, x = Conv1D(40, 24), torch.randn(3, 24)
    expected = F.silu(conv(x))
    block = LinearSilu(conv)
    torch.testing.assert_close(block(x), expected)
    assert calls.count == 0
    lay_by_outputs(conv)
    torch.testing.assert_close(block(x), expected)
    assert calls.count == 1


def test_weights_are_shared_and_read_at_each_call() -> None:
    linear, x, y = _linear(), torch.randn(3, 24), torch.randn(3, 40)
    block = LinearAdd(linear)
    assert set(block.state_dict()) == {"linear.weight", "linear.bias"}
    for change in (
        lambda: linear.weight.mul_(2),
        lambda: setattr(linear, "weight", nn.Parameter(torch.randn(40, 24))),
        lambda: setattr(linear.weight, "data", torch.randn(40, 24)),
        lambda: setattr(linear, "bias", None),
        lambda: setattr(block, "linear", _linear()),
    ):
        change()
        assert_near(block(x, y), _exact(block.linear, x) + y)
    block.to(torch.bfloat16)
    found = block(x.bfloat16(), y.bfloat16())
    assert_near(found, _exact(block.linear, x.bfloat16()) + y.bfloat16().double())


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))))
def test_copies_read_weights_of_their_own(copied: Callable[[Any], Any]) -> None:
    block, x = LinearSilu(_linear()), torch.randn(3, 24)
    block(x)
    other = copied(block)
    other.linear.weight.zero_()
    assert_near(other(x), F.silu(_exact(other.linear, x)))
    assert_near(block(x), F.silu(_exact(block.linear, x)))


# ---- what kernels must not pass over -----------------------------------------------------------------------------------


class Shifted(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.more = _linear(), _linear(bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.more(x)
        return y


def _hooked() -> nn.Linear:
    linear = _linear()
    linear.register_forward_hook(lambda module, args, output: output + 1)
    return linear


def _pre_hooked() -> nn.Linear:
    linear = _linear()
    linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return linear


def _with_a_forward() -> nn.Linear:
    linear = _linear()
    linear.forward = lambda input: nn.Linear.forward(linear, input) + 1  # type: ignore[method-assign]
    return linear


def _weight_norm() -> nn.Linear:
    linear = nn.utils.parametrizations.weight_norm(_linear())
    linear.parametrizations.weight.original0.mul_(2)
    return linear


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: Shifted(24, 40),
    "adapter": Adapted,
    "hook": _hooked,
    "hook before": _pre_hooked,
    "own forward": _with_a_forward,
    "weight norm": _weight_norm,
    "old weight norm": lambda: nn.utils.weight_norm(_linear()),
    "sequence": lambda: nn.Sequential(_linear(), nn.Tanh()),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_other_modules_are_called(name: str, calls: Calls) -> None:
    linear, x, y = OTHERS[name](), torch.randn(3, 24), torch.randn(3, 40)
    for block in ("LinearSilu", "LinearSiluMul", "LinearAdd"):
        n_more, after = BLOCKS[block]
        found = getattr(modules, block)(linear)(x, *[y][:n_more])
        torch.testing.assert_close(found, after(linear(x), *[y][:n_more]))
    plain = _linear()
    torch.testing.assert_close(Linear2SiluMul(plain, linear)(x), F.silu(plain(x)) * linear(x))
    assert calls.count == 0


def test_gradients() -> None:
    linear, x = _linear(), torch.randn(3, 24)
    with torch.enable_grad():
        LinearSilu(linear)(x).sum().backward()
        ours = linear.weight.grad
        linear.weight.grad = None
        F.silu(linear(x)).sum().backward()
    assert ours is not None and linear.weight.grad is not None
    torch.testing.assert_close(ours, linear.weight.grad)


def test_other_dtypes_and_autocast() -> None:
    linear, x = _linear(torch.float64), torch.randn(3, 24).double()
    torch.testing.assert_close(LinearSilu(linear)(x), F.silu(linear(x)))
    linear = _linear()
    with torch.autocast("cpu", torch.bfloat16):
        found = LinearSilu(linear)(torch.randn(3, 24))
    assert found.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (
            lambda: LinearSilu(_linear())(torch.ones(3, 25)),
            InvalidInput,
            r"x has shape \(3, 25\): \[..., 24\]",
        ),
        (lambda: LinearSilu(_linear())(torch.ones(())), InvalidInput, r"x has shape \(\)"),
        (lambda: LinearSilu(_linear())(torch.ones(3, 24).half()), InvalidInput, "x has dtype torch.float16"),
        (lambda: LinearSilu(_linear())([1.0]), TypeError, "x is a list"),
        (lambda: LinearAdd(_linear())(torch.ones(3, 24), torch.ones(40)), InvalidInput, "y has shape"),
        (lambda: LinearMul(_linear())(torch.ones(3, 24), torch.ones(3, 1)), InvalidInput, "y has shape"),
        (
            lambda: LinearAdd(_linear())(torch.ones(3, 24), torch.ones(3, 40).half()),
            InvalidInput,
            "y has shape .* and dtype torch.float16",
        ),
        (lambda: LinearAdd(_linear())(torch.ones(3, 24), None), TypeError, "y is a NoneType"),
        (lambda: LinearSilu("linear"), TypeError, "linear is a str: a Linear is needed"),  # type: ignore[arg-type]
        (
            lambda: Linear2SiluMul(_linear(), nn.Linear(24, 41)),
            InvalidInput,
            "linear_s and linear_m have sizes",
        ),
        (lambda: LinearAdd(_hooked())(torch.ones(3, 24), torch.ones(40)), InvalidInput, "y has shape"),
    ),
)
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_no_rows() -> None:
    assert LinearAdd(_linear())(torch.ones(0, 24), torch.ones(0, 40)).shape == (0, 40)
