"""Kernels compiled for other CPUs. Their machine code is kept in the cache, as that for this one is."""

import json
import math
from subprocess import CompletedProcess
from typing import Any

import pytest

from hfopt.kernels import _target
from tests import fresh
from tests.test_kernels_quantized import CLOSE

_PROGRAM = """
import json, sys
from hfopt.functional.quantized import quantized_linear
from hfopt.kernels import _target, selftest
from tests.quantized_cases import FORMATS, expected, noise, quantized_x, weights_of
from tests.test_kernels_quantized import _case

path, *checks = sys.argv[1:]
assert path == _target.PATH and not _target.HAS_AVX512_VNNI, _target.PATH
found = {}
if "selftest" in checks:
    found["wrong"] = [result for result in selftest.run() if not result[1]]
if "quantized" in checks:
    found["noise"], found["sums"] = {}, []
    for form in FORMATS:
        x, matrices = _case(7, [37], 256, form)
        weights = weights_of(matrices, [None], form)
        for compute, near in ("int8", quantized_x(x, form)), ("float", x.double().numpy()):
            given = quantized_linear(x, weights, compute=compute)
            found["noise"][f"{form} {compute}"] = noise(given, expected(near, matrices, [None]))
        found["sums"].append(quantized_linear(x.bfloat16(), weights).double().sum().item())
print(json.dumps(found))
"""

_AVX2 = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2"
_SKYLAKE = _AVX2 + ",+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd"
_OTHERS = {"portable": ("generic", None), "AVX2": ("haswell", _AVX2)}


def _elsewhere(name: str, features: str | None, path: str, *checks: str) -> fresh.Process:
    variables = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    return fresh.Process(_PROGRAM, (path, *checks), variables)


def _is_possible(features: str | None) -> bool:
    return not features or _target.FEATURES.issuperset(each.lstrip("+") for each in features.split(","))


@pytest.fixture(scope="module")
def finished() -> dict[str, CompletedProcess[str]]:
    """Processes for the CPUs whose code this one can run. Compiling takes a minute each, at the same time."""
    chosen = {path: other for path, other in _OTHERS.items() if _is_possible(other[1])}
    processes = [_elsewhere(*other, path, "selftest", "quantized") for path, other in chosen.items()]
    return dict(zip(chosen, fresh.run_all(processes), strict=True))


def _found(finished: dict[str, CompletedProcess[str]], path: str) -> dict[str, Any]:
    if path not in finished:
        pytest.skip("this machine could not run them")
    assert finished[path].returncode == 0, finished[path].stderr
    found: dict[str, Any] = json.loads(finished[path].stdout.splitlines()[-1])
    return found


def _assert_quantized(found: dict[str, Any]) -> None:
    assert {name: noise for name, noise in found["noise"].items() if not noise < CLOSE} == {}
    assert all(map(math.isfinite, found["sums"]))


@pytest.mark.parametrize("path", _OTHERS)
def test_selftest(path: str, finished: dict[str, CompletedProcess[str]]) -> None:
    assert _found(finished, path)["wrong"] == []


@pytest.mark.parametrize("path", _OTHERS)
def test_quantized(path: str, finished: dict[str, CompletedProcess[str]]) -> None:
    _assert_quantized(_found(finished, path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "features", "path"),
    [
        # vpdpbusd of 32 bytes, in the encoding of AVX-512 instead of AVX-VNNI's
        ("haswell", _AVX2 + ",+avx512vl,+avx512vnni", "AVX2"),
        ("skylake-avx512", _SKYLAKE, "AVX-512"),
    ],
)
def test_quantized_on_more_machines(name: str, features: str, path: str) -> None:
    if not _is_possible(features):
        pytest.skip("this machine could not run them")
    (done,) = fresh.run_all([_elsewhere(name, features, path, "quantized")])
    _assert_quantized(_found({path: done}, path))
