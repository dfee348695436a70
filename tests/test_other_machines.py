"""Kernels compiled for other CPUs."""

import math
from typing import Any

import pytest

from tests.other_machines import AVX2, OTHERS, begin, begun, end, is_possible
from tests.test_kernels_quantized import CLOSE

_SKYLAKE = AVX2 + ",+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd"


# most CPUs have AVX2
@pytest.fixture(
    scope="module",
    params=[pytest.param(path, marks=pytest.mark.slow if path == "portable" else []) for path in OTHERS],
)
def elsewhere(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the kernels found in a process that conftest began."""
    process = begun(request.param)
    if process is None:
        pytest.skip("this machine could not run them")
    return end(process)


def _assert_quantized(found: dict[str, Any]) -> None:
    assert {name: noise for name, noise in found["noise"].items() if not noise < CLOSE} == {}
    assert all(map(math.isfinite, found["sums"]))


def test_selftest(elsewhere: dict[str, Any]) -> None:
    assert elsewhere["wrong"] == []


def test_quantized(elsewhere: dict[str, Any]) -> None:
    _assert_quantized(elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "features", "path"),
    [
        # vpdpbusd of 32 bytes, in the encoding of AVX-512 instead of AVX-VNNI's
        ("haswell", AVX2 + ",+avx512vl,+avx512vnni", "AVX2"),
        ("skylake-avx512", _SKYLAKE, "AVX-512"),
    ],
)
def test_quantized_on_more_machines(name: str, features: str, path: str) -> None:
    if not is_possible(features):
        pytest.skip("this machine could not run them")
    _assert_quantized(end(begin(name, features, path, "quantized")))


@pytest.mark.slow
def test_pairs_of_bfloat16_where_there_are_no_tiles() -> None:
    features = _SKYLAKE + ",+avx512bf16"
    if not is_possible(features):
        pytest.skip("this machine could not run them")
    found = end(begin("skylake-avx512", features, "AVX-512 BF16", "selftest", "quantized"))
    assert found["wrong"] == []
    _assert_quantized(found)
