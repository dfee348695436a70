"""Models that transformers has split over processes."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hfopt
from tests.parallel_memory import save
from tests.parallel_work import FAMILIES, MASK, PROMPT, STEPS
from tests.ranks import Ranks, results

QUICK = ("llama", "opt")
N_KILLS, LOADED = 200, 12.0  # seconds in which a process loads a model and makes its first requests


def call(name: str, *arguments: Any) -> tuple[str, tuple[Any, ...]]:
    return f"tests.parallel_work:{name}", arguments


def tokens_of(size: int, *names: str) -> None:
    for name, found in zip(
        names, results(size, *(call("tokens_are_theirs", each) for each in names)), strict=True
    ):
        assert found == [[True] * 4] * size, name


def test_tokens_are_those_of_transformers() -> None:
    tokens_of(2, *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - set(QUICK)))
def test_tokens_of_other_families(name: str) -> None:
    tokens_of(2, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_four_processes(name: str) -> None:
    tokens_of(4, name)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"quantization": "int8", "kv_cache": "int8"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_bits_are_the_same_in_all_processes_and_in_each_run(options: dict[str, Any]) -> None:
    (found,) = results(2, call("logits", "llama", torch.bfloat16, options))
    first, *others = (each for of_rank in found for each in of_rank)
    assert all(torch.equal(first, each) for each in others)


def test_of_equal_logits_the_first_is_chosen_whoever_has_it() -> None:
    cases: tuple[tuple[list[int], int], ...] = (([800], 800), ([300, 800], 300), ([700, 800], 700))
    calls = [call("largest", tokens) for tokens, _ in cases]
    for (_, expected), found in zip(cases, results(2, *calls), strict=True):
        assert all((tokens == expected).all() for tokens in found)


def test_processes_that_ask_for_different_things_are_told_so() -> None:
    ((found, other),) = results(2, call("different_requests"))
    assert found == other
    for name, said in zip(("inputs", "max_new_tokens", "the random state of torch"), found, strict=True):
        assert said.startswith(f"{name} of rank 1 is another than that of rank 0")


def test_a_process_that_is_killed_ends_the_request_of_the_others() -> None:
    (((said, seconds),), nothing) = Ranks(2, call("one_is_killed", 7)).wait(killed=[1])
    assert said.startswith("rank 1 (pid ") and "has ended" in said and not nothing
    assert seconds < 10


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(N_KILLS))
def test_a_process_may_be_killed_at_any_moment(moment: int) -> None:
    ranks = Ranks(2, call("until_killed"))
    ranks.begin()
    time.sleep(random.Random(moment).uniform(0, LOADED))
    os.kill(ranks.processes[1].id, signal.SIGKILL)
    begin = time.monotonic()
    ((said,), nothing) = ranks.wait(killed=[1])
    assert said and not nothing
    assert time.monotonic() - begin < 10
    assert not list(Path("/dev/shm").glob("hfopt-*"))


def test_parts_stay_on_disk(tmp_path: Path) -> None:
    sizes: Any = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 1000}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8)).save_pretrained(tmp_path)
    given = {"input_ids": PROMPT, "attention_mask": MASK, **STEPS, "do_sample": False}
    whole: Any = hfopt.load(tmp_path)
    expected = whole.generate(**given)
    for tokens, step, size in results(2, call("from_disk", str(tmp_path), 0.6))[0]:
        assert torch.equal(tokens, expected)
        assert 0 < step < size


def test_quantised_parts_are_not_saved() -> None:
    ((said, _),) = results(2, call("parts_are_not_saved"))
    assert "save a model that is not split" in said


def test_what_is_saved_is_the_whole_model() -> None:
    assert results(2, call("saved")) == [[True, True]]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_memory_of_each_process_is_that_of_its_part(
    quantization: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And some 70 MB for temporaries, measured: less than the part as floats takes, of which about half is read in place
    from the pages of the file. In 8 bits that would not be enough if the floats stayed.
    """
    # what is freed goes back to the system: glibc may keep up to 240 MB of it for what comes next
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096}
    save(tmp_path / "small", **sizes, num_hidden_layers=1)  # for which the same kernels are compiled
    save(tmp_path / "large", **sizes, num_hidden_layers=24)
    half = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")) // 2
    options = {} if quantization is None else {"quantization": quantization}
    task = "tests.parallel_memory:growth", (str(tmp_path / "small"), str(tmp_path / "large"), options)
    (found,) = results(2, task)
    assert all(0 < each < half for each in found), (found, half)
