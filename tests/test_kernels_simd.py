"""Vector functions against float64."""

import numba
import numpy as np
import pytest

from hfopt.kernels.jit import launch as jit
from hfopt.kernels.simd.functions import exp, quick_tanh
from hfopt.kernels.simd.memory import load, store
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
