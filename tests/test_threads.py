"""The thread pool of the kernels: torch's own, or Numba's threading layer where there is none."""

import torch

from hfopt import functional
from hfopt.kernels.jit import openmp
from hfopt.machine import env
from tests import fresh

_WITHOUT_RUNTIME = """
import sys, types
# what the module is like in a process without an OpenMP runtime
sys.modules["hfopt.kernels.jit.openmp"] = types.SimpleNamespace(RUNTIME=None)
import threading, torch
import hfopt.kernels.jit
hfopt.kernels.jit.openmp = sys.modules["hfopt.kernels.jit.openmp"]
from hfopt import functional
from hfopt.kernels.jit import launch as jit
x, weight = torch.randn(3, 96), torch.randn(70, 96)
exact, weights = x @ weight.T, functional.LinearWeights.of([weight], [None])
results = {}
def work(name):
    for _ in range(50):
        results[name] = functional.linear(x, weights)
threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(results) == 3
for result in results.values():
    torch.testing.assert_close(result, exact, atol=1e-4, rtol=1e-4)
print(jit.threading_layer())
"""


def test_without_an_openmp_runtime_numbas_layer_serves_several_threads() -> None:
    printed = fresh.run(_WITHOUT_RUNTIME, PATH="", NUMBA_THREADING_LAYER=None, OMP_WAIT_POLICY=None)
    assert printed.strip() in ("omp", "tbb", "workqueue")


def test_no_second_pool_is_loaded() -> None:
    assert openmp.RUNTIME is not None  # torch for Linux brings one
    x, weight = torch.randn(3, 96), torch.randn(70, 96)
    functional.linear(x, functional.LinearWeights.of([weight], [None]))
    assert env.threading_layer() == "torch's OpenMP"
    assert len(env.openmp_copies()) == 1
