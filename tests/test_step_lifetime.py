"""Programs of copies, of restored and of deleted models; and several threads on one model."""

import copy
import gc
import io
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hfopt
from tests.generation_cases import FAMILIES, Model, llama, one_thread, prompts
from tests.step_cases import (
    MODES,
    assert_program_is_the_modules,
    generated,
    optimized,
    passes,
    programs_of,
    prove,
    rehearsals,
)

__all__ = ["passes", "rehearsals"]  # fixtures

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def _pickled(model: Model) -> Model:
    return pickle.loads(pickle.dumps(model))


def _saved(model: Model) -> Model:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Model], Model]] = {
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "torch.save": _saved,
}


@pytest.fixture
def without_collections() -> Iterator[None]:
    """What is freed is freed by its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# ---- copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_has_a_program_of_its_own(name: str, how: str, passes: list[int]) -> None:
    model = optimized(FAMILIES[name]())
    prove(model)
    expected = generated(model, max_new_tokens=8, do_sample=False).sequences
    other = COPIES[how](model)
    assert programs_of(other) is not programs_of(model)
    assert programs_of(other)._made is None
    assert programs_of(other)._kernels == "hfopt"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    prove(other)
    found = assert_program_is_the_modules(other, passes, max_new_tokens=8, do_sample=False)
    assert torch.equal(found.sequences, expected)


@pytest.mark.usefixtures("without_collections")
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_does_not_keep_the_original(how: str, passes: list[int]) -> None:
    model = optimized(llama())
    prove(model)
    other = COPIES[how](model)
    prove(other)
    alive = [weakref.ref(each) for each in (model, *model.modules(), *model.parameters())]
    del model
    assert not any(each() is not None for each in alive)
    assert_program_is_the_modules(other, passes, max_new_tokens=8, do_sample=False)


@pytest.mark.usefixtures("without_collections")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_deleted_model_is_freed(name: str) -> None:
    model = optimized(FAMILIES[name]())
    prove(model)
    for mode in MODES.values():
        generated(model, mode, max_new_tokens=4)
    hfopt.explain(model)
    alive = [weakref.ref(each) for each in (*model.modules(), *model.parameters(), programs_of(model))]
    del model
    assert not any(each() is not None for each in alive)


@pytest.mark.usefixtures("without_collections")
def test_a_replaced_part_is_freed_with_the_next_step() -> None:
    model = optimized(llama())
    prove(model)
    own = model.lm_head
    alive = [weakref.ref(own), weakref.ref(own.weight)]
    model.lm_head = torch.nn.Linear(64, own.out_features, bias=False)
    del own
    generated(model, max_new_tokens=4)
    assert not any(each() is not None for each in alive)


@pytest.mark.usefixtures("without_collections")
def test_a_request_leaves_no_scratch() -> None:
    model = optimized(llama())
    prove(model)
    program = programs_of(model)._made.program
    generated(model, max_new_tokens=4)
    before = sys.getrefcount(program)
    for mode in MODES.values():
        generated(model, mode, max_new_tokens=4)
    assert sys.getrefcount(program) == before


# ---- the way back ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_collections")
@pytest.mark.parametrize("is_copy", [False, True])
def test_restore_leaves_no_program(is_copy: bool, passes: list[int]) -> None:
    model = optimized(llama())
    prove(model)
    if is_copy:
        model = copy.deepcopy(model)
        prove(model)
    programs = weakref.ref(programs_of(model))
    hfopt.restore(model)
    assert programs() is None
    assert programs_of(model) is None
    assert vars(model).keys() == vars(llama()).keys()
    passes.clear()
    generated(model, max_new_tokens=4)
    assert len(passes) == 4
    optimized(model)
    prove(model)


def test_optimized_twice(passes: list[int]) -> None:
    model = optimized(optimized(llama()))
    prove(model)
    assert_program_is_the_modules(model, passes, max_new_tokens=8, do_sample=False)


# ---- threads -----------------------------------------------------------------------------------------------


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """The results of functions that run in a thread each, and begin together."""
    results: list[Any] = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = works[index]()
        except BaseException as error:  # noqa: BLE001 (raised below)
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _jobs(model: Model, n_jobs: int, n_tokens: int) -> list[Callable[[], Tensor]]:
    modes: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 4},
        {"do_sample": False, "num_beams": 2},
    ]

    def job(index: int) -> Callable[[], Tensor]:
        given = {**prompts(1 + index % 3, 5 + 3 * index), **modes[index % 3], "max_new_tokens": n_tokens}
        return lambda: model.generate(**given)

    return [job(index) for index in range(n_jobs)]


@pytest.mark.parametrize("is_proven", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_threads_on_one_model(name: str, is_proven: bool) -> None:
    model = FAMILIES[name]()
    jobs = _jobs(model, 4, 12)
    expected = [job() for job in jobs]
    optimized(model)
    if is_proven:
        prove(model)
    found = at_once(jobs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert hfopt.explain(model).by_module is None


def test_threads_at_a_table_that_grows() -> None:
    model = llama(max_position_embeddings=8192)

    def job(first: int) -> Callable[[], Tensor]:
        given = prompts(2)
        given["position_ids"] = torch.arange(first - 9, first).repeat(2, 1)
        return lambda: model.generate(**given, max_new_tokens=18, do_sample=False)

    jobs = [job(first) for first in (1015, 2040, 3065, 6000)]
    expected = [job() for job in jobs]
    optimized(model)
    found = at_once(jobs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_hook_comes_and_goes_in_another_thread() -> None:
    """Its owner sees its steps, and the tokens of the others stay what they are."""
    model = llama()
    jobs = _jobs(model, 3, 20)
    expected = [job() for job in jobs]
    optimized(model)
    prove(model)
    calls: list[int] = []

    def meddle() -> None:
        for _ in range(12):
            handle = model.model.norm.register_forward_hook(lambda *_: calls.append(1))
            with torch.no_grad():
                model(**prompts(1, 3))
            handle.remove()

    *found, _ = at_once([*jobs, meddle])
    assert len(calls) >= 12
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert hfopt.explain(model).by_module is None


@pytest.mark.slow
def test_threads_over_many_requests() -> None:
    model = llama()
    jobs = _jobs(model, 8, 80)
    expected = [job() for job in jobs]
    optimized(model)
    for _ in range(25):
        found = at_once(jobs)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
