"""Kernels, torch and `generate` in forked processes: the parent's results or an error that says what helps, no hang."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import fresh

# What every parent begins with. A child that takes longer than LIMIT seconds counts as hanging.
_START = """
import ctypes, json, os, select, signal, sys, threading, types
if "without torch's OpenMP" in sys.argv:
    # what the module is like in a process without such a runtime
    sys.modules["hfopt.kernels.jit.openmp"] = types.SimpleNamespace(RUNTIME=None)
    import hfopt.kernels.jit
    hfopt.kernels.jit.openmp = sys.modules["hfopt.kernels.jit.openmp"]
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LIMIT = 60
torch.manual_seed(3)
x, weight = torch.randn(3, 512), torch.randn(2048, 512)
vector = torch.randn(1 << 20)

def torch_alone():
    "Enough work for all of torch's threads."
    return torch.sigmoid(vector)

def linear():
    "The same for a kernel; its bits do not depend on their number."
    from hfopt import functional
    return functional.linear(x, functional.LinearWeights.of([weight], [None]))

def tokens():
    with torch.no_grad():
        ids = torch.arange(2, 26).view(2, 12)
        return model.generate(ids, max_new_tokens=12, do_sample=False)

def results():
    return [work() for work in works]

def n_threads():
    return len(os.listdir("/proc/self/task"))

def compared():
    "Whether the results are the parent's, and whether a team of several threads has begun for them."
    before = n_threads()
    found = results()
    same = all(map(torch.equal, found, expected))
    return ["same" if same else "different", n_threads() > before]

def on(count):
    def work():
        torch.set_num_threads(count)
        return compared()
    return work

def in_a_thread(work):
    def inner():
        answers = []
        thread = threading.Thread(target=lambda: answers.append(work()))
        thread.start()
        thread.join()
        return answers[0]
    return inner

def answer_of(work, fork=os.fork):
    read, write = os.pipe()
    child = fork()
    if child == 0:
        try:
            answer = work()
        except Exception as error:
            answer = [type(error).__name__, str(error)]
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], LIMIT)
    if not ready:
        os.kill(child, signal.SIGKILL)
    answer = os.read(read, 1 << 16) if ready else b'["hangs", ""]'
    os.close(read)
    os.waitpid(child, 0)
    return json.loads(answer or b'["died", ""]')

def c_fork():
    "As a server that is written in C does it: Python hears of it only afterwards, in the child."
    python = ctypes.PyDLL(None)
    child = python.fork()
    if child == 0:
        python.PyOS_AfterFork_Child()
    return child

def llama():
    import hfopt
    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)
    return hfopt.optimize(LlamaForCausalLM(config).eval(), kernels="hfopt")

works = [torch_alone, linear]
"""


def _children(program: str, **variables: str) -> dict[str, Any]:
    """What each child of a parent, a new process that runs `program`, says of itself."""
    done = subprocess.run(
        [sys.executable, "-c", _START + program],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _children_without_runtime(program: str, layer: str) -> dict[str, Any]:
    """The same where a layer of Numba is the pool: only torch's OpenMP asks whether the parent was forked itself."""
    printed = fresh.run(_START + program, "without torch's OpenMP", NUMBA_THREADING_LAYER=layer)
    answers: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return answers


ON_SEVERAL, ON_ONE = ["same", True], ["same", False]


def test_children_of_a_parent_with_one_thread() -> None:
    """As a server with `--preload` and OMP_NUM_THREADS=1 does it."""
    answers = _children(
        """
model = llama()
works.append(tokens)
expected = results()
cases = {"as it is": compared, "two threads": on(2), "a grandchild": lambda: answer_of(compared)}
print(json.dumps({name: answer_of(work) for name, work in cases.items()}))
""",
        OMP_NUM_THREADS="1",
    )
    assert answers == {"as it is": ON_ONE, "two threads": ON_SEVERAL, "a grandchild": ON_ONE}


def _is_clear_error(answer: list[str]) -> bool:
    return answer[0] == "ForkedProcess" and "torch.set_num_threads(1)" in answer[1] and "spawn" in answer[1]


@pytest.fixture(scope="module")
def of_several() -> dict[str, Any]:
    """Children of a parent with two threads; of those behind "unprepared", nobody ended the idle threads before the fork."""
    return _children(
        """
import multiprocessing
torch.set_num_threads(2)
model = llama()
works.append(tokens)
expected = results()
cases = {
    "as it is": compared,
    "one thread": on(1),
    "in a thread": in_a_thread(compared),
    "a grandchild": lambda: [compared(), answer_of(compared)],
}
answers = {name: answer_of(work) for name, work in cases.items()}
answers["the parent"] = compared()
with multiprocessing.get_context("fork").Pool(2) as pool:
    answers["two workers"] = [each.get(LIMIT)[0] for each in [pool.apply_async(compared) for _ in range(4)]]
torch.set_num_threads(1)
compared()
answers["two threads after one"] = answer_of(on(2))
torch.set_num_threads(2)
compared()

unprepared = {
    "as it is": linear,
    "one thread": on(1),
    "then two": lambda: [torch.set_num_threads(1), linear(), torch.set_num_threads(2), linear()],
    "in a thread": in_a_thread(compared),
    "a grandchild": lambda: (torch.set_num_threads(1), answer_of(compared))[1],
}
answers["fork in C"] = {name: answer_of(work, c_fork) for name, work in unprepared.items()}
from hfopt.kernels.jit import openmp
openmp.release_threads = lambda: False
answers["old libgomp"] = {name: answer_of(work) for name, work in unprepared.items()}
print(json.dumps(answers))
"""
    )


def test_children_of_a_parent_with_several_threads_get_threads_of_their_own(
    of_several: dict[str, Any],
) -> None:
    assert of_several["as it is"] == of_several["in a thread"] == ON_SEVERAL
    assert of_several["one thread"] == ON_ONE
    assert of_several["a grandchild"] == [ON_SEVERAL, ON_SEVERAL]
    assert of_several["two workers"] == ["same"] * 4
    assert of_several["two threads after one"] == ON_SEVERAL


def test_the_parent_gets_its_threads_back(of_several: dict[str, Any]) -> None:
    assert of_several["the parent"] == ON_SEVERAL


@pytest.mark.parametrize("kind", ["fork in C", "old libgomp"])
def test_where_threads_are_missing_one_thread_serves(of_several: dict[str, Any], kind: str) -> None:
    children = of_several[kind]
    assert _is_clear_error(children["as it is"]) and _is_clear_error(children["then two"])
    assert children["one thread"] == children["a grandchild"] == ON_ONE


@pytest.mark.parametrize("kind", ["fork in C", "old libgomp"])
def test_a_thread_that_the_child_starts_misses_no_others(of_several: dict[str, Any], kind: str) -> None:
    assert of_several[kind]["in a thread"] == ON_SEVERAL


def test_children_of_a_parent_in_which_only_torch_had_threads() -> None:
    answers = _children(
        """
torch.set_num_threads(2)
works = [torch_alone]
expected = results()
def loads_kernels_itself():
    # nobody can end the threads that torch's pool had before: the child must not try it when it forks in turn
    torch.set_num_threads(1)
    works.append(linear)
    expected[:] = results()
    return answer_of(compared)
answers = {"before kernels are loaded": answer_of(loads_kernels_itself)}
import hfopt.kernels.jit.launch
answers["torch"] = answer_of(compared)
answers["kernel"] = answer_of(lambda: list(linear().shape))
print(json.dumps(answers))
"""
    )
    assert answers == {"before kernels are loaded": ON_ONE, "torch": ON_SEVERAL, "kernel": [3, 2048]}


def test_numbas_openmp_serves_children_on_one_thread() -> None:
    answers = _children_without_runtime(
        """
torch.set_num_threads(2)
works = [linear]
expected = results()
print(json.dumps({"two threads": answer_of(compared), "one thread": answer_of(on(1))}))
""",
        "omp",
    )
    assert _is_clear_error(answers["two threads"])
    assert answers["one thread"] == ON_ONE


def test_numbas_workqueue_starts_anew_by_itself() -> None:
    answers = _children_without_runtime(
        """
torch.set_num_threads(2)
works = [linear]
expected = results()
from hfopt.kernels.jit import launch as jit
# another thread is in a kernel when this one forks
threading.Thread(target=jit._workqueue_lock.acquire).start()
print(json.dumps({"as it is": answer_of(compared)}))
""",
        "workqueue",
    )
    assert answers == {"as it is": ON_SEVERAL}
