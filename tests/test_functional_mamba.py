"""The operations of a Mamba layer against float64, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hfopt import functional
from hfopt.errors import InvalidInput
from hfopt.modules import MambaMixer
from tests.mamba_reference import convolved, scanned, stepped
from tests.pairs import pairs_of
from tests.reference import DTYPES, assert_same_on_threads

_TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-5},
    torch.float16: {"rtol": 1e-3, "atol": 1e-5},
}


def assert_near(ours: Tensor, exact: Tensor) -> None:
    """By torch's own tolerances, relative to the largest value."""
    scale = max(exact.abs().max().item(), 1e-30) if exact.numel() else 1.0
    torch.testing.assert_close(ours.double() / scale, exact / scale, **_TOLERANCES[ours.dtype])


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.clone()


def strided(tensor: Tensor) -> Tensor:
    """The same values as the left half of wider rows."""
    return torch.cat((tensor, torch.full_like(tensor, torch.nan)), -1)[..., : tensor.shape[-1]]


def crossed(tensor: Tensor) -> Tensor:
    """The same values with the last two dimensions the other way round in memory."""
    if tensor.ndim < 2:
        return tensor.clone()
    return tensor.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": contiguous,
    "strided": strided,
    "crossed": crossed,
}

# ---- convolutions ------------------------------------------------------------------------------------------------------

WIDTHS = (1, 2, 4, 7)
LENGTHS = (0, 1, 2, 17, 50)
# activation, whether there is a history, and a bias
CASES = ((None, False, False), ("silu", True, True), ("swish", True, False), ("silu", False, True))


@pytest.mark.parametrize(
    ("dtype", "width", "length", "case", "form"), pairs_of(DTYPES, WIDTHS, LENGTHS, CASES, FORMS)
)
def test_causal_conv1d(
    dtype: torch.dtype, width: int, length: int, case: tuple[Any, bool, bool], form: str
) -> None:
    activation, has_history, has_bias = case
    x, weight = torch.randn(2, 5, length).to(dtype), torch.randn(5, width).to(dtype)
    history = (
        torch.randn(2, 5, width - 1).to(dtype) if has_history else torch.zeros(2, 5, width - 1).to(dtype)
    )
    bias = torch.randn(5).to(dtype) if has_bias else None
    make = FORMS[form]
    exact = convolved(history, x, weight, bias, activation)
    target = make(torch.full_like(history, torch.nan))
    states = make(history) if has_history else None
    out, final = MambaMixer.causal_conv1d_fn(
        make(x), make(weight), bias, states, True, target, activation=activation
    )
    assert out.shape == x.shape and out.dtype == dtype
    assert_near(out, exact)
    assert final is target
    assert torch.equal(final, torch.cat((history, x), -1)[..., length:])
    again, none = functional.causal_conv1d(x, weight, bias, states, activation=activation)
    assert none is None and torch.equal(again, out)
    _, fresh = functional.causal_conv1d(x, weight, bias, states, True, activation=activation)
    assert fresh is not None and torch.equal(fresh, target)


def test_final_states_may_go_where_the_first_ones_were() -> None:
    x, weight, states = torch.randn(1, 3, 1), torch.randn(3, 4), torch.randn(1, 3, 3)
    last = torch.cat((states, x), -1)[..., 1:]
    exact = convolved(states, x, weight, None, "silu")
    out, final = functional.causal_conv1d(x, weight, None, states, True, states)
    assert final is states and torch.equal(states, last)
    assert_near(out, exact)


def test_a_prompt_in_two_parts_has_the_same_bits() -> None:
    x, weight, bias = torch.randn(2, 20, 70), torch.randn(20, 4), torch.randn(20)
    whole, last = functional.causal_conv1d(x, weight, bias, return_final_states=True)
    first, states = functional.causal_conv1d(x[..., :33], weight, bias, return_final_states=True)
    second, final = functional.causal_conv1d(x[..., 33:], weight, bias, states, True)
    assert last is not None and final is not None and torch.equal(final, last)
    torch.testing.assert_close(torch.cat((first, second), -1), whole, rtol=1e-6, atol=1e-6)


# activation, channels, form
UPDATES = (("silu", 37, "contiguous"), (None, 3, "strided"), ("swish", 16, "crossed"))


@pytest.mark.parametrize(
    ("dtype", "width", "more", "length", "case", "circular"),
    pairs_of(DTYPES, (1, 2, 4), (0, 1, 2), (None, 1, 2, 6), UPDATES, (True, False)),
)
def test_causal_conv1d_update(
    dtype: torch.dtype,
    width: int,
    more: int,
    length: int | None,
    case: tuple[Any, int, str],
    circular: bool,
) -> None:
    """Three calls in a row against the whole history; states of width - 1, width and width + 1."""
    activation, n_channels, form = case
    n_rows, size, make = 3, width - 1 + more, FORMS[form]
    weight, bias = torch.randn(n_channels, width).to(dtype), torch.randn(n_channels).to(dtype)
    n_new = 1 if length is None else length
    before = torch.tensor([0, 5, 2**31 - 20], dtype=torch.int32)
    history = torch.randn(n_rows, n_channels, size).to(dtype)
    state = history.clone()
    if circular and size:
        for row, count in enumerate(before.tolist()):
            state[row] = history[row].roll(count % size, -1)
    state = make(state)
    for call in range(3):
        x = torch.randn(n_rows, n_channels, n_new).to(dtype)
        counts = before + call * n_new if circular else None
        exact = convolved(history[..., size - width + 1 :], x, weight, bias, activation)
        given = x[..., 0] if length is None else x
        out = MambaMixer.causal_conv1d_update(make(given), state, make(weight), bias, activation, counts)
        assert out.shape == given.shape and out.dtype == dtype
        assert_near(out.reshape(x.shape), exact)
        history = torch.cat((history, x), -1)[..., n_new:]
        expected = history.clone()
        if circular and size:
            for row, count in enumerate(before.tolist()):
                expected[row] = history[row].roll((count + (call + 1) * n_new) % size, -1)
        assert torch.equal(state, expected)


def test_a_state_in_another_dtype_than_its_inputs() -> None:
    x, weight = torch.randn(2, 5).bfloat16(), torch.randn(5, 4)
    state = torch.randn(2, 5, 4)
    exact = convolved(state[..., 1:], x[..., None], weight, None, None)[..., 0]
    expected = torch.cat((state[..., 1:], x[..., None].float()), -1)
    assert_near(functional.causal_conv1d_update(x, state, weight), exact)
    assert torch.equal(state, expected)


# ---- scans -------------------------------------------------------------------------------------------------------------


def scan_arguments(dtype: torch.dtype, shape: tuple[int, int, int, int], kind: str) -> dict[str, Any]:
    """shape: batch, dim, length, dstate."""
    n_rows, dim, length, dstate = shape
    inputs = {
        "constant": (dim, dstate),
        "one group": (n_rows, dstate, length),
        "groups": (n_rows, 2, dstate, length),
    }[kind]
    return {
        "u": torch.randn(n_rows, dim, length).to(dtype),
        "delta": (torch.rand(n_rows, dim, length) * 0.5).to(dtype),
        "A": -torch.rand(dim, dstate) * 4,
        "B": torch.randn(inputs).to(dtype),
        "C": torch.randn(inputs).to(dtype),
    }


def options(dtype: torch.dtype, arguments: dict[str, Tensor], has_more: bool) -> dict[str, Any]:
    if not has_more:
        return {}
    u = arguments["u"]
    return {
        "D": torch.randn(u.shape[1]),
        "z": torch.randn(u.shape).to(dtype),
        "delta_bias": torch.randn(u.shape[1]) * 3 - 2,
        "delta_softplus": True,
    }


@pytest.mark.parametrize(
    ("dtype", "shape", "kind", "form", "has_more"),
    pairs_of(
        DTYPES,
        ((2, 4, 1, 16), (1, 6, 17, 5), (1, 2, 40, 64), (2, 2, 33, 17)),
        ("constant", "one group", "groups"),
        FORMS,
        (True, False),
    ),
)
def test_selective_scan(
    dtype: torch.dtype, shape: tuple[int, int, int, int], kind: str, form: str, has_more: bool
) -> None:
    arguments = scan_arguments(dtype, shape, kind)
    more = options(dtype, arguments, has_more)
    exact, last = scanned(*arguments.values(), *more.values())
    given: dict[str, Any] = {name: FORMS[form](each) for name, each in arguments.items()}
    result = MambaMixer.selective_scan_fn(**given, **more, return_last_state=True)
    assert isinstance(result, tuple)
    out, state = result
    assert out.shape == exact.shape and out.dtype == dtype and state.dtype == torch.float32
    assert_near(out, exact)
    assert_near(state, last)
    assert torch.equal(MambaMixer.selective_scan_fn(**given, **more), out)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "length"), [(torch.float32, 1025), *(pytest.param(each, 4096, marks=pytest.mark.slow) for each in DTYPES)]
)  # fmt: skip
def test_long_scans(dtype: torch.dtype, length: int) -> None:
    """States that hardly decay, too, so that all rounding errors stay."""
    arguments = scan_arguments(dtype, (1, 4, length, 16), "one group")
    arguments["A"] *= 1e-3
    exact, last = scanned(*arguments.values())
    result = functional.selective_scan(**arguments, return_last_state=True)
    assert isinstance(result, tuple)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    for ours, theirs in zip(result, (exact, last), strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(ours.double() / scale, theirs / scale, rtol=tolerance, atol=tolerance)


def test_mixed_dtypes_are_computed_in_float32() -> None:
    arguments = scan_arguments(torch.bfloat16, (1, 4, 20, 16), "one group")
    arguments["delta"] = arguments["delta"].float() + 1e-3
    exact, _ = scanned(*arguments.values())
    out = functional.selective_scan(**arguments)
    assert isinstance(out, Tensor) and out.dtype == torch.bfloat16
    assert_near(out, exact)


def test_softplus_is_exact_far_below_zero_and_far_above() -> None:
    """For a state of one step and A of 0, out = softplus(delta)."""
    delta = torch.cat((torch.linspace(-85, 40, 251), torch.tensor([-torch.inf, 0.0])))
    ones, nothing = torch.ones(len(delta), 1, 1), torch.zeros(1, 1)
    out = functional.selective_scan(
        ones, delta[:, None, None], nothing, ones[0], ones[0], None, None, None, True
    )
    assert isinstance(out, Tensor)
    exact = torch.logaddexp(delta.double(), torch.zeros(()).double())
    torch.testing.assert_close(out.flatten().double(), exact, rtol=1e-6, atol=0)


def test_infinite_steps_stay_in_their_channel() -> None:
    """Lanes behind the end of a state, which would make a NaN of them, do not count."""
    u, delta = torch.ones(1, 2, 2), torch.tensor([[[1.0, torch.inf], [1.0, 1.0]]])
    arguments: list[Any] = [u, delta, -torch.ones(2, 5), torch.ones(2, 5), torch.ones(2, 5)]
    out = functional.selective_scan(*arguments)
    assert isinstance(out, Tensor) and out[0, 0, 1] == torch.inf
    assert_near(out[:, 1:], scanned(*arguments)[0][:, 1:])
    state = torch.zeros(1, 2, 5)
    ones = torch.ones(1, 5)
    y = functional.selective_state_update(state, u[..., 1], delta[..., 1], arguments[2], ones, ones)
    assert y[0, 0] == torch.inf and y[0, 1] == 5


def test_scans_of_nothing() -> None:
    for shape in ((0, 4, 3, 16), (2, 0, 3, 16), (2, 4, 0, 16)):
        arguments = scan_arguments(torch.float32, shape, "one group")
        result = functional.selective_scan(**arguments, return_last_state=True)
        assert isinstance(result, tuple) and result[0].shape == shape[:3]
        assert result[1].shape == (shape[0], shape[1], 16) and (result[1] == 0).all()


# ---- one step ----------------------------------------------------------------------------------------------------------


def step_arguments(dtype: torch.dtype, n_heads: int, n_groups: int, dim: int, dstate: int) -> dict[str, Any]:
    """Of states with heads."""
    return {
        "state": torch.randn(2, n_heads, dim, dstate),
        "x": torch.randn(2, n_heads, dim).to(dtype),
        "dt": torch.rand(2, n_heads, dim).to(dtype),
        "A": -torch.rand(n_heads, dim, dstate) * 4,
        "B": torch.randn(2, n_groups, dstate).to(dtype),
        "C": torch.randn(2, n_groups, dstate).to(dtype),
    }


def step_options(arguments: dict[str, Any], has_more: bool) -> dict[str, Any]:
    x = arguments["x"]
    if not has_more:
        return {"D": None, "z": None, "dt_bias": None, "dt_softplus": False}
    of_head = torch.randn(x.shape[1:])
    return {
        "D": of_head,
        "z": torch.randn(x.shape).to(x.dtype),
        "dt_bias": of_head * 2 - 1,
        "dt_softplus": True,
    }


SIZES = ((1, 16), (16, 16), (37, 5), (20, 64))  # dim, dstate


@pytest.mark.parametrize(
    ("dtype", "same_state", "sizes", "heads", "form", "has_more"),
    pairs_of(DTYPES, (True, False), SIZES, ((1, 1), (4, 1), (4, 2)), FORMS, (True, False)),
)
def test_selective_state_update_with_heads(
    dtype: torch.dtype,
    same_state: bool,
    sizes: tuple[int, int],
    heads: tuple[int, int],
    form: str,
    has_more: bool,
) -> None:
    arguments = step_arguments(dtype, *heads, *sizes)
    if same_state:
        arguments["state"] = arguments["state"].to(dtype)
    more = step_options(arguments, has_more)
    exact, after = stepped(*arguments.values(), *more.values())
    given: dict[str, Any] = {name: FORMS[form](each) for name, each in arguments.items()}
    out = MambaMixer.selective_state_update(**given, **more)
    assert out.dtype == dtype
    assert_near(out, exact)
    assert_near(given["state"], after)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_more", (True, False))
def test_selective_state_update_without_heads(form: str, has_more: bool) -> None:
    arguments = step_arguments(torch.float32, 1, 1, 37, 16)
    more = step_options(arguments, has_more)
    exact, after = stepped(*arguments.values(), *more.values())
    flat: dict[str, Any] = {
        name: FORMS[form](each[0] if name == "A" else each[:, 0]) for name, each in arguments.items()
    }
    for name in ("D", "dt_bias"):
        more[name] = None if more[name] is None else more[name][0]
    more["z"] = None if more["z"] is None else FORMS[form](more["z"][:, 0])
    out = functional.selective_state_update(**flat, **more)
    assert_near(out, exact[:, 0])
    assert_near(flat["state"], after[:, 0])


def test_what_is_the_same_for_a_head() -> None:
    """Mamba-2's forms of A, dt, D and dt_bias: expanded over channels, A over states too."""
    arguments, of_head = step_arguments(torch.float32, 4, 2, 20, 32), torch.randn(4, 1).expand(4, 20)
    arguments["A"] = -torch.rand(4, 1, 1).expand(4, 20, 32)
    arguments["dt"] = torch.randn(2, 4, 1).expand(2, 4, 20)
    more: list[Any] = [of_head, None, of_head, True]
    exact, after = stepped(*arguments.values(), *more)
    out = functional.selective_state_update(**arguments, D=of_head, dt_bias=of_head, dt_softplus=True)
    assert_near(out, exact)
    assert_near(arguments["state"], after)


def test_steps_one_after_the_other_are_a_scan() -> None:
    arguments = scan_arguments(torch.float32, (2, 20, 9, 16), "one group")
    result = functional.selective_scan(**arguments, return_last_state=True)
    assert isinstance(result, tuple)
    u, delta, a, b, c = arguments.values()
    state = torch.zeros(2, 20, 16)
    for t in range(9):
        y = functional.selective_state_update(state, u[..., t], delta[..., t], a, b[..., t], c[..., t])
        torch.testing.assert_close(y, result[0][..., t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, result[1], rtol=1e-5, atol=1e-5)


# ---- threads, memory, refusals -----------------------------------------------------------------------------------------


def test_bits_do_not_depend_on_threads() -> None:
    scan = scan_arguments(torch.float32, (2, 20, 70, 16), "one group")
    step = step_arguments(torch.float32, 4, 2, 100, 32)
    x, weight, state = torch.randn(2, 300, 80), torch.randn(300, 4), torch.randn(2, 300, 4)
    assert_same_on_threads(lambda: functional.causal_conv1d(x, weight)[0])
    assert_same_on_threads(lambda: functional.causal_conv1d_update(x, state.clone(), weight))
    assert_same_on_threads(lambda: functional.selective_scan(**scan))  # type: ignore[arg-type, return-value]
    assert_same_on_threads(
        lambda: functional.selective_state_update(**step | {"state": step["state"].clone()})
    )


def test_inputs_that_share_memory_with_the_state() -> None:
    memory = torch.randn(2, 5, 4)
    x, state = memory[..., 3].clone(), memory.clone()
    exact = convolved(state[..., 1:], x[..., None], torch.ones(5, 4), None, None)[..., 0]
    out = functional.causal_conv1d_update(memory[..., 3], memory, torch.ones(5, 4))
    assert_near(out, exact)
    assert torch.equal(memory, torch.cat((state[..., 1:], x[..., None]), -1))
    arguments = step_arguments(torch.float32, 1, 1, 5, 16)
    arguments["x"] = arguments["state"][..., 3]
    exact, after = stepped(*arguments.values())
    assert_near(functional.selective_state_update(**arguments), exact)
    assert_near(arguments["state"], after)


def _conv() -> dict[str, Any]:
    return {"x": torch.ones(2, 3, 5), "weight": torch.ones(3, 4), "bias": torch.ones(3)}


def _conv_update() -> dict[str, Any]:
    return _conv() | {"conv_state": torch.ones(2, 3, 4), "cache_seqlens": torch.tensor([1, 2])}


def _scan() -> dict[str, Any]:
    arguments = scan_arguments(torch.float32, (2, 4, 5, 3), "groups")
    return arguments | {"D": torch.ones(4), "z": torch.ones(2, 4, 5), "delta_bias": torch.ones(4)}


def _step() -> dict[str, Any]:
    arguments = step_arguments(torch.float32, 4, 2, 5, 3)
    return arguments | {"D": torch.ones(4, 5), "z": torch.ones(2, 4, 5), "dt_bias": torch.ones(4, 5)}


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "conv": (functional.causal_conv1d, _conv),
    "update": (functional.causal_conv1d_update, _conv_update),
    "scan": (functional.selective_scan, _scan),
    "step": (functional.selective_state_update, _step),
}
WRONG: list[tuple[str, str, Any, str]] = [
    ("conv", "x", torch.ones(2, 3), r"x has shape \(2, 3\)"),
    ("conv", "weight", torch.ones(3, 1, 4), r"\[3, width\]"),
    ("conv", "weight", torch.ones(3, 0), "at least 1"),
    ("conv", "bias", torch.ones(4), r"\(3,\) is needed"),
    ("conv", "bias", torch.ones(3).bfloat16(), "bias has dtype"),
    ("conv", "initial_states", torch.ones(2, 3, 4), "initial_states has shape"),
    ("conv", "activation", "gelu", "'gelu'"),
    ("update", "x", torch.ones(2), "x has shape"),
    ("update", "conv_state", torch.ones(2, 3, 2), "at least 3"),
    ("update", "conv_state", torch.ones(1, 3, 4), "conv_state has shape"),
    ("update", "conv_state", torch.ones(1, 3, 4).expand(2, 3, 4), "share memory"),
    ("update", "cache_seqlens", torch.tensor([1]), r"\[2\] is needed"),
    ("update", "cache_seqlens", torch.tensor([1, -1]), "at least 0"),
    ("update", "cache_seqlens", torch.tensor([1.0, 2.0]), "int32 or int64"),
    ("scan", "u", torch.ones(2, 4), "u has shape"),
    ("scan", "A", torch.ones(4, 0), "A has shape"),
    ("scan", "A", torch.ones(4, 3, dtype=torch.complex64), "A has dtype"),
    ("scan", "B", torch.ones(2, 3, 3, 5), "3 groups"),
    ("scan", "B", torch.ones(2, 0, 3, 5), "0 groups"),
    ("scan", "C", torch.ones(2, 3, 6), "C has shape"),
    ("step", "state", torch.ones(2, 5), "state has shape"),
    ("step", "state", torch.ones(2, 4, 5, 1).expand(2, 4, 5, 3), "share memory"),
    ("step", "A", torch.ones(4, 5), "A has shape"),
    ("step", "B", torch.ones(2, 3, 3), "3 groups"),
    ("step", "C", torch.ones(2, 1, 3), "C has shape"),
    ("conv", "return_final_states", torch.zeros(2), "return_final_states is a Tensor"),
    ("scan", "delta_softplus", torch.zeros(2), "delta_softplus is a Tensor"),
    ("scan", "return_last_state", None, "return_last_state is None"),
    ("step", "dt_softplus", "no", "dt_softplus is 'no'"),
]
# every tensor: of another type, dtype and device
WRONG += [
    (operation, name, value, f"^{name} ")
    for operation, (_, make) in OPERATIONS.items()
    for name, tensor in make().items()
    for value in (
        [1.0],
        tensor.double() if tensor.is_floating_point() else tensor.bool(),
        torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"),
    )
]
# those that others have to fit, of another size
WRONG += [
    (operation, name, torch.ones(5, *tensor.shape[1:]), f"^{name} has shape")
    for operation, (_, make) in OPERATIONS.items()
    for name, tensor in make().items()
    if name not in ("x", "u", "state", "cache_seqlens") or (operation, name) == ("step", "x")
]


@pytest.mark.parametrize(("operation", "name", "value", "message"), WRONG)
def test_what_is_refused(operation: str, name: str, value: Any, message: str) -> None:
    function, make = OPERATIONS[operation]
    arguments = make()
    before = {key: each.clone() for key, each in arguments.items() if "state" in key}
    with pytest.raises(InvalidInput, match=message):
        function(**arguments | {name: value})
    assert all(torch.equal(arguments[key], each) for key, each in before.items())
    function(**arguments)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_freed_memory_is_refused(operation: str) -> None:
    function, make = OPERATIONS[operation]
    for name in make():
        arguments = make()
        arguments[name].untyped_storage().resize_(0)
        with pytest.raises(InvalidInput, match=name):
            function(**arguments)
