"""What every test starts from: no network, few threads, the same random numbers."""

import gc
import os

# before transformers is imported: no test may wait for a server
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# before torch is: threads that spin after every launch take more time than all else in tests of small models, and four
# times as much where other work runs on the machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hfopt.bench import roofline
from hfopt.functional import choice, choice_file
from hfopt.machine import env
from tests import other_machines, tomorrow_answers

# Tests of whole models, in which float16 takes the way of bfloat16 or float32 but for what tests of kernels and
# `test_float16.py` look at; programs for it take minutes to compile.
_WHOLE_MODELS = {
    f"test_{name}"
    for name in [
        "adapters",
        "checks",
        "decoders",
        "families",
        "families_alibi",
        "families_gemma4",
        "kv_cache",
        "optimize",
        "quantized_model",
        "speculation_draft",
        "step",
        "step_inputs",
        "step_prompts",
        "step_several",
    ]
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make the cases slow that `thinned` leaves out, and whole models in float16."""
    seen: Counter[str] = Counter()
    for item in items:
        if item.path.stem in _WHOLE_MODELS and torch.float16 in _given(item).values():
            item.add_marker(pytest.mark.slow)
        mark = item.get_closest_marker("thinned")
        if mark is not None:
            name = item.nodeid.partition("[")[0]
            if seen[name] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1


def _given(item: pytest.Item) -> dict[str, Any]:
    """The parameters of a case."""
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec is not None else {}


def pytest_collection_finish(session: pytest.Session) -> None:
    # what imports made is there for good: a collection has a million objects less to go through
    gc.collect()
    gc.freeze()
    fixtures = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if session.config.option.collectonly:
        return
    for path in {_given(item).get("elsewhere") for item in session.items} - {None}:
        other_machines.begun(path)
    if "ask" in fixtures:
        tomorrow_answers.begun(session)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _nothing_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """hfopt's kernels count as twice as fast as torch's; nothing is timed, and the file of this machine not touched."""
    monkeypatch.setattr(choice, "_used", {})
    monkeypatch.setattr(choice, "_measure", lambda operation, dtype, size: [2.0] * choice.PAIRS)
    monkeypatch.setattr(choice_file, "path", lambda n_threads: None)


@pytest.fixture(scope="module")
def quick_limits() -> Iterator[None]:
    """What the machine can do at most is measured in a moment, in its caches: any figure will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "_MIN_BUFFER", 1 << 20)
        patch.setattr(env, "last_level_cache", lambda: 0)
        patch.setattr(roofline.MultiplyAdd, "_ROUNDS", 5)
        yield
