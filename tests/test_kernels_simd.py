"""Vector functions against float64, and conversions of float16 against numpy's."""

import numba
import numpy as np
import pytest

from hfopt.kernels.jit import cpu
from hfopt.kernels.jit import launch as jit
from hfopt.kernels.simd.functions import exp, quick_tanh
from hfopt.kernels.simd.memory import (
    load,
    load_part,
    load_scalar,
    load_two,
    store,
    store_part,
    store_scalar,
    store_two,
)
from hfopt.kernels.simd.pointer import pointer
from hfopt.kernels.simd.types import LANES


@numba.njit(**jit.OPTIONS)
def _exp(x: np.ndarray, out: np.ndarray) -> None:
    for k in range(0, x.size, LANES):
        store(pointer(out), k, exp(load(pointer(x), k)))


@pytest.mark.parametrize(
    ("low", "high"), ((-87.33, -86.0), (-86.0, -1.0), (-1.0, 1.0), (1.0, 88.0), (88.0, 88.72))
)
def test_exp(low: float, high: float) -> None:
    x = np.random.default_rng(0).uniform(low, high, 1 << 16).astype(np.float32)
    out = np.empty_like(x)
    _exp(x, out)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(out - exact) / np.spacing(exact.astype(np.float32))).max() < 1.5  # ulp


def test_exp_beyond_its_range() -> None:
    inf, nan = np.inf, np.nan
    x = np.array(
        [-inf, inf, nan, 0, -0.0, -87.34, -104, -1e30, 88.73, 1e30, 3e38, -3e38, 1e-40, 0, 0, 0], np.float32
    )
    out = np.empty_like(x)
    _exp(x, out)
    np.testing.assert_array_equal(out, [0, inf, nan, 1, 1, 0, 0, 0, inf, inf, inf, 0, 1, 1, 1, 1])


@numba.njit(**jit.OPTIONS)
def _quick_tanh(x: np.ndarray, out: np.ndarray) -> None:
    for k in range(0, x.size, LANES):
        store(pointer(out), k, quick_tanh(load(pointer(x), k)))


@pytest.mark.parametrize(("low", "high"), ((-37, -3), (-3, -1), (-1, 1), (1, 4)))
def test_quick_tanh(low: float, high: float) -> None:
    """Numbers of both signs with sizes from 10^low to 10^high."""
    rng = np.random.default_rng(0)
    x = (10 ** rng.uniform(low, high, 1 << 16) * rng.choice([-1, 1], 1 << 16)).astype(np.float32)
    out = np.empty_like(x)
    _quick_tanh(x, out)
    exact = np.tanh(x.astype(np.float64))
    assert (np.abs(out - exact) / np.spacing(np.abs(exact).astype(np.float32))).max() < 6  # ulp


def test_quick_tanh_beyond_its_range() -> None:
    inf, nan = np.inf, np.nan
    x = np.array([-inf, inf, nan, 0, -0.0, 3e38, -3e38, 9, -9, 1e30, 0, 0, 0, 0, 0, 0], np.float32)
    out = np.empty_like(x)
    _quick_tanh(x, out)
    expected = [-1, 1, nan, 0, 0, 1, -1, 1, -1, 1, 0, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(out, expected, rtol=2e-7, atol=0)


# ---- float16 -----------------------------------------------------------------------------------------------

# every float16, as its bits
_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.int16)


def _copy(x: np.ndarray, out: np.ndarray) -> None:
    for k in range(0, x.shape[1], LANES):
        store(pointer(out[0]), k, load(pointer(x[0]), k))
        for first in range(0, LANES, 8):
            store_part(pointer(out[1]), k + first, 8, load_part(pointer(x[1]), k + first, 8))
        for i in range(k, k + LANES):
            store_scalar(pointer(out[3]), i, load_scalar(pointer(x[3]), i))
    for k in range(0, x.shape[1], 2 * LANES):
        a, b = load_two(pointer(x[2]), k)
        store_two(pointer(out[2]), k, a, b)


def _converted(x: np.ndarray, dtype: type) -> np.ndarray:
    """The elements, read and written in the four ways, which have to agree."""
    out: np.ndarray = np.zeros((4, x.size), dtype)
    numba.njit(**jit.OPTIONS)(_copy)(np.stack([x] * 4), out)
    for other in out[1:]:
        np.testing.assert_array_equal(other.view(np.uint8), out[0].view(np.uint8))
    return out[0]


@pytest.fixture(params=["instructions", "integers"])
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "instructions" and not cpu.HAS_FLOAT16:
        pytest.skip("this machine has no conversions of float16")
    monkeypatch.setattr(cpu, "HAS_FLOAT16", request.param == "instructions")


def test_every_float16_is_widened_exactly(body: None) -> None:
    expected = _HALVES.view(np.float16).astype(np.float32).view(np.uint32)
    expected[np.isnan(_HALVES.view(np.float16))] |= 0x400000  # quiet
    np.testing.assert_array_equal(_converted(_HALVES, np.float32).view(np.uint32), expected)


def test_rounding_to_float16(body: None) -> None:
    values = _HALVES.view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        middles = (values[:-1] + values[1:]) / 2
        numbers = [values, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, values[1:])]
    ends = [65504, 65519.996, 65520, 65520.004, 65536, 3e38, 2.0**-25, 2.0**-24, 1e-40, 1e-45]
    limits = np.array([*ends, *(-each for each in ends)], np.float32)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18).astype(np.uint32).view(np.float32)
    x = np.concatenate([*numbers, limits, random])
    x = np.pad(x, (0, -x.size % (2 * LANES)))
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    found = _converted(x, np.int16).view(np.float16)
    assert np.isinf(found[: values.size]).sum() == 2 and np.isnan(found[: values.size]).sum() == 2046
    np.testing.assert_array_equal(np.isnan(found), np.isnan(x))
    is_number = ~np.isnan(x)
    np.testing.assert_array_equal(found[is_number].view(np.uint16), expected[is_number].view(np.uint16))
