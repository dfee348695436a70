"""Kernels compiled for other CPUs, by processes that begin with the first test: compiling takes a minute for each.

Their machine code is kept in the cache, as that for this CPU is.
"""

import functools
import json
from typing import Any

from hfopt.kernels.jit import cpu
from tests import fresh

_PROGRAM = """
import json, os, sys
os.nice(10)
from hfopt.functional.quantized import quantized_linear
from hfopt.kernels import selftest
from hfopt.kernels.jit import cpu
from tests.quantized_cases import FORMATS, expected, noise, quantized_x, weights_of
from tests.test_kernels_quantized import _case

path, *checks = sys.argv[1:]
assert path == cpu.PATH and not cpu.HAS_AVX512_VNNI, cpu.PATH
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

AVX2 = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2"
#: the path of the kernels -> name and features of a CPU
OTHERS: dict[str, tuple[str, str | None]] = {"portable": ("generic", None), "AVX2": ("haswell", AVX2)}


def is_possible(features: str | None) -> bool:
    """Whether this machine could run them."""
    return not features or cpu.FEATURES.issuperset(each.lstrip("+") for each in features.split(","))


def begin(name: str, features: str | None, path: str, *checks: str) -> fresh.Process:
    """Begin the checks in a process that compiles for another CPU."""
    return fresh.Process(_PROGRAM, path, *checks, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features)


def end(process: fresh.Process) -> dict[str, Any]:
    """What it found."""
    finished = process.wait()
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


@functools.cache
def begun(path: str) -> fresh.Process | None:
    """All checks for the CPUs of a path; None if this one cannot run their code."""
    name, features = OTHERS[path]
    return begin(name, features, path, "selftest", "quantized") if is_possible(features) else None
