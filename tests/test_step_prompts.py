"""Prompts by the program have the bits that the modules give, in the logits and in the cache."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hfopt.cache import AppendedEverywhere, IndirectCache
from hfopt.errors import CacheFull, InvalidInput
from hfopt.functional import Mask
from hfopt.generation import prefill as generation
from hfopt.kernels.linear.rows import ROW_LIMIT
from hfopt.program import programs, rehearsal
from hfopt.program import run as program_run
from hfopt.program.program import Program
from tests.generation_cases import (
    CACHE,
    FAMILIES,
    VOCABULARY,
    Model,
    cache_of,
    gptj,
    llama,
    one_thread,
    opt,
    prompts,
)
from tests.pairs import pairs_of
from tests.reference import DTYPES
from tests.step_cases import (
    ALL_OUTPUTS,
    MODES,
    assert_program_is_the_modules,
    assert_same_bits,
    bits,
    generated,
    modules_alone,
    passes,
    programs_of,
    prove,
    proven,
    proven_family,
    rehearsals,
)
from tests.test_step_inputs import HEADS, N_LOGITS, N_TOKENS, everywhere, program

__all__ = ["passes", "rehearsals"]  # fixtures

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

LONG: dict[str, Callable[[], Model]] = {
    "llama": llama,
    "gptj": lambda: gptj(n_positions=400),
    "opt": lambda: opt(max_position_embeddings=400),
}
LENGTHS = (1, 2, 7, 64, 65, 200)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3}


@functools.cache
def proven_long(name: str, dtype: torch.dtype = torch.float32) -> Model:
    return proven(LONG[name]().to(dtype))


@pytest.fixture
def small() -> Model:
    return proven_family("llama")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_lengths(name: str, dtype: torch.dtype, passes: list[int]) -> None:
    model = proven_long(name, dtype)
    for length in LENGTHS:
        for n_rows in (1, 3):
            assert_program_is_the_modules(model, passes, **prompts(n_rows, length), **GREEDY)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_rows, length", [(ROW_LIMIT, 1), (ROW_LIMIT + 1, 1), (2, 32), (ROW_LIMIT + 1, 2)])
def test_rows(n_rows: int, length: int, dtype: torch.dtype, passes: list[int]) -> None:
    """The kernels of few rows and those of many, for all tokens and for the last ones."""
    assert_program_is_the_modules(proven_family("llama", dtype), passes, **prompts(n_rows, length), **GREEDY)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("mode", ["beams", "several of a prompt"])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_several_rows(name: str, mode: str, is_shared: bool, passes: list[int]) -> None:
    model = proven_long(name)

    def run() -> Any:
        # only a cache of our own knows which rows share a prompt
        given = {} if is_shared else {CACHE: IndirectCache(model.config)}
        return generated(model, {**prompts(2, 70), "max_new_tokens": 6, **MODES[mode], **given})

    passes.clear()
    ours = run()
    assert not passes
    with modules_alone(model):
        assert_same_bits(ours, run())


@pytest.mark.parametrize(("dtype", "attention", "mode"), pairs_of(DTYPES, ["sdpa", "eager"], MODES))
def test_masks(dtype: torch.dtype, attention: str, mode: str, passes: list[int]) -> None:
    model = proven(llama(attn_implementation=attention).to(dtype))
    given = prompts(3, 40)
    assert_program_is_the_modules(model, passes, **given, max_new_tokens=4, **MODES[mode])
    generator = torch.Generator().manual_seed(3)
    given["attention_mask"] = torch.rand(3, 40, generator=generator).gt(0.4).long()
    given["attention_mask"][:, -1] = 1
    assert_program_is_the_modules(model, passes, **given, max_new_tokens=4, **MODES[mode])
    given["attention_mask"][:] = 1
    assert_program_is_the_modules(model, passes, **given, max_new_tokens=4, **MODES[mode])


@pytest.mark.parametrize("name", FAMILIES)
def test_threads(name: str) -> None:
    model = proven_long(name)
    results = []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        results.append(generated(model, {**prompts(3, 200), **GREEDY}))
    assert_same_bits(*results)


# ---- a cache from before -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n_cropped", "n_more"), pairs_of(FAMILIES, [0, 3, 9], [1, 2, 64, 65]))
def test_a_second_turn(name: str, n_cropped: int, n_more: int, passes: list[int]) -> None:
    """Of beams, which have a suffix; all of which may be cropped away."""
    model = proven_long(name)
    more = torch.randint(2, VOCABULARY, (4, n_more), generator=torch.Generator().manual_seed(2))
    for given in ({"num_beams": 4, "num_return_sequences": 4, **prompts(1)}, prompts(4)):

        def run(given: dict[str, Any] = given) -> Any:
            before = generated(model, {**given, "do_sample": False, "max_new_tokens": 8})
            cache, sequences = cache_of(before), before.sequences
            mask = given["attention_mask"].repeat_interleave(4 // len(given["attention_mask"]), 0)
            n_kept = cache.get_seq_length() - n_cropped
            if n_cropped:
                cache.crop(-n_cropped)
            ids = torch.cat([sequences[:, :n_kept], more], 1)
            n_seen = min(mask.shape[1], n_kept)
            new = torch.ones(4, ids.shape[1] - n_seen, dtype=torch.long)
            mask = torch.cat([mask[:, :n_seen], new], 1)
            return model.generate(ids, attention_mask=mask, **{CACHE: cache}, **GREEDY, **ALL_OUTPUTS)

        passes.clear()
        ours = run()
        assert not passes
        with modules_alone(model):
            assert_same_bits(ours, run())


def test_a_cache_that_was_emptied(small: Model, passes: list[int]) -> None:
    def run(method: str) -> Any:
        cache = cache_of(generated(small, {**prompts(2), **GREEDY}))
        if method == "crop":
            cache.crop(-cache.get_seq_length())
        else:
            cache.reset()
        return generated(small, {**prompts(2, 20), **GREEDY, CACHE: cache})

    for method in ("crop", "reset"):
        passes.clear()
        ours = run(method)
        assert not passes
        with modules_alone(small):
            assert_same_bits(ours, run(method))


def test_prompts_in_chunks(small: Model, passes: list[int]) -> None:
    given = {**prompts(2, 30), **GREEDY, "prefill_chunk_size": 13}
    assert_program_is_the_modules(small, passes, n_calls=5, **given)


# ---- what modules have to do ---------------------------------------------------------------------------------


def prompt_by_modules(model: Model, passes: list[int], **given: Any) -> None:
    """The prompt goes module by module, the two steps behind it do not."""
    given = {**prompts(2, 30), **GREEDY, **given}
    passes.clear()
    ours = generated(model, copy.copy(given))
    assert passes == [30]
    with modules_alone(model):
        given[CACHE] = None
        assert_same_bits(ours, generated(model, given))


def test_a_cache_without_layers(small: Model, passes: list[int]) -> None:
    prompt_by_modules(small, passes, **{CACHE: IndirectCache()})


def test_a_long_prompt(small: Model, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: Program = programs_of(small)._made.program
    work = 2 * 30 * (made.listing.n_bytes + 30 * made.listing.cached_bytes) // 4
    assert made.work(2, 30, 30) == work
    monkeypatch.setattr(generation, "_MAX_WORK", work)
    assert_program_is_the_modules(small, passes, **prompts(2, 30), **GREEDY)
    monkeypatch.setattr(generation, "_MAX_WORK", work - 1)
    prompt_by_modules(small, passes)


@pytest.mark.parametrize("operation, size", [("linear", 60), ("attention", 30)])
def test_torchs_kernels(
    operation: str, size: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = proven(llama())
    asked: list[tuple[str, int]] = []

    def takes_torch(by: str, *what: Any) -> bool:
        asked.append((what[0], what[2]))
        return asked[-1] == (operation, size)

    monkeypatch.setattr(programs_of(model), "_kernels", "auto")
    monkeypatch.setattr(programs, "takes_torch", takes_torch)
    prompt_by_modules(model, passes)
    assert (operation, size) in asked


@pytest.mark.parametrize("is_quicker", [True, False])
def test_few_tokens_where_torchs_kernels_are_quicker(
    is_quicker: bool, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between those, modules take time: the whole call is measured, once for a number of threads."""
    model, asked = proven(llama()), []

    def measured(*arguments: Any) -> bool:
        asked.append(arguments)
        return is_quicker

    def of(n_rows: int, n_new: int) -> bool:
        with torch.no_grad():
            return programs_of(model).of(model, n_rows, n_new) is not None

    monkeypatch.setattr(programs, "takes_torch", lambda by, *what: by == "torch" or what[2] > 8)
    monkeypatch.setattr(programs, "is_quicker", measured)
    for by, is_program in (("auto", is_quicker), ("torch", False), ("hfopt", True)):
        monkeypatch.setattr(programs_of(model), "_kernels", by)
        assert of(1, 16) is of(2, 16) is of(16, 1) is is_program
    monkeypatch.setattr(programs_of(model), "_kernels", "auto")
    assert of(1, 8) and not of(1, 33) and not of(33, 1)
    assert len(asked) == 1


def test_a_program_is_timed_beside_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = proven(llama())
    program, race = programs_of(model)._made.program, rehearsal._Stage.race
    taken: Iterator[tuple[float, float]] = iter(())

    def timed(self: Any, n_new: int) -> tuple[float, float]:
        assert all(seconds > 0 for seconds in race(self, n_new))
        return next(taken)

    monkeypatch.setattr(rehearsal._Stage, "race", timed)
    # the first pair compiles, and of the others the shortest counts
    for ours, is_quicker in ((1.5, True), (2.5, False)):
        taken = iter([(0.1, 9.0), (ours, 3.0), (4.0, 2.0), (5.0, 5.0)])
        assert rehearsal.is_quicker(model, program) is is_quicker
    taken = iter(())
    monkeypatch.setattr(rehearsal, "_RACED_BYTES", 0)
    assert not rehearsal.is_quicker(model, program)


def test_attention_of_others(passes: list[int]) -> None:
    """Nobody knows what its mask is."""
    AttentionInterface.register("theirs", sdpa_attention_forward)
    model = proven(llama())
    model.config._attn_implementation = "theirs"
    passes.clear()
    generated(model, {**prompts(1, 30), **GREEDY})
    assert passes == [30, 1, 1]


def test_negative_positions(small: Model, passes: list[int]) -> None:
    given = {**prompts(1, 30), **GREEDY, "position_ids": torch.arange(-3, 27)[None]}
    prompt_by_modules(small, passes, **{**given, **prompts(2, 30)})


def test_a_method_of_the_instance(passes: list[int]) -> None:
    model = proven(llama())
    calls: list[int] = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(model)._prefill(model, *args, **kwargs)

    model._prefill = own
    prove(model)
    passes.clear()
    calls.clear()
    generated(model, {**prompts(2, 30), **GREEDY})
    assert passes == [30] and calls == [1]


# ---- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_second", [False, True])
@pytest.mark.parametrize("name", ["gptj", "opt"])
def test_positions_that_the_model_has_not(name: str, is_second: bool, passes: list[int]) -> None:
    """The cache is left as it was."""
    model = FAMILIES[name]()
    model.config.max_position_embeddings = 10**6  # the gate believes it
    proven(model)
    cache = IndirectCache(model.config)
    if is_second:
        generated(model, {**prompts(2), **GREEDY, CACHE: cache})
    n_past = cache.get_seq_length()
    ids = torch.full((2, n_past + 30), 5)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: cache, **GREEDY}
    positions = torch.arange(n_past + 30)[None].repeat(2, 1)
    positions[1, -1] = 96
    passes.clear()
    with pytest.raises(InvalidInput, match="no such rows"):
        generated(model, {**given, "position_ids": positions})
    assert not passes and cache.get_seq_length() == n_past
    if not is_second:
        given = {**prompts(3, 4), CACHE: cache, **GREEDY}  # an empty one takes any rows
    generated(model, given)
    assert not passes


def test_no_memory_for_the_cache(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfopt.cache.storage._UNCHECKED_BYTES", 0)
    monkeypatch.setattr("hfopt.cache.storage.available_memory", lambda: 1000)
    cache = IndirectCache(small.config)
    with pytest.raises(CacheFull):
        generated(small, {**prompts(2), **GREEDY, CACHE: cache})
    monkeypatch.undo()
    assert cache.get_seq_length() == 0
    generated(small, {**prompts(3), **GREEDY, CACHE: cache})


def appended(n_rows: int, n_new: int, n_layers: int = 2, n_past: int = 0) -> AppendedEverywhere:
    cache = IndirectCache()
    for layer in range(n_layers):
        if n_past:
            cache.append(layer, n_rows, n_past, *HEADS[1:], torch.float32)
    last = [cache.append(layer, n_rows, n_new, *HEADS[1:], torch.float32) for layer in range(n_layers)]
    return everywhere(last)


def given(n_rows: int = 3, n_new: int = 5) -> dict[str, Any]:
    """Arguments that are right."""
    return {
        "program": program(),
        "tokens": np.arange(n_rows * n_new).reshape(n_rows, n_new),
        "positions": np.arange(n_new)[None],
        "appended": appended(n_rows, n_new),
        "mask": Mask("causal"),
    }


WRONG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "tokens of one dimension": lambda a: {"tokens": a["tokens"][0]},
    "fewer tokens": lambda a: {"tokens": a["tokens"][:, :4]},
    "more rows": lambda a: {"tokens": np.zeros((4, 5), np.int64)},
    "no rows": lambda a: {"tokens": np.zeros((0, 5), np.int64)},
    "tokens of another type": lambda a: {"tokens": a["tokens"].astype(np.int32)},
    "fewer positions": lambda a: {"positions": a["positions"][:, :4]},
    "positions of two rows": lambda a: {"positions": np.zeros((2, 5), np.int64)},
    "positions of one dimension": lambda a: {"positions": a["positions"][0]},
    "positions of another type": lambda a: {"positions": a["positions"].astype(np.float64)},
    "fewer layers": lambda a: {"appended": appended(3, 5, 1)},
    "other rows": lambda a: {"appended": appended(2, 5)},
    "fewer new tokens": lambda a: {"appended": appended(3, 4)},
    "a length that is too short": lambda a: {
        "appended": a["appended"]._replace(first=a["appended"].first._replace(prefix_len=4))
    },
    "another mask": lambda a: {"mask": Mask("unsupported")},
    "a mask of fewer keys": lambda a: {"mask": Mask("bytes", np.ones((3, 5, 4), np.uint8))},
    "a mask of fewer rows": lambda a: {"mask": Mask("bytes", np.ones((2, 5, 5), np.uint8))},
    "a mask of another type": lambda a: {"mask": Mask("bytes", np.ones((3, 5, 5), np.bool_))},
    "a token outside the table": lambda a: {"tokens": a["tokens"] + N_TOKENS - 14},
    "a negative token": lambda a: {"tokens": a["tokens"] - 1},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_prompt_is_refused(name: str) -> None:
    arguments = given()
    layers = [each.prefix for each in arguments["appended"].buffers]
    for layer in layers:
        layer[:] = 7.0
    with pytest.raises(InvalidInput):
        program_run.prefill(**{**arguments, **WRONG[name](arguments)})
    assert all((layer == 7.0).all() for layer in layers)
    assert program_run.prefill(**arguments).isfinite().all()
    for layer in layers:
        assert not (layer[:, :, :, :5] == 7.0).any() and (layer[:, :, :, 5:] == 7.0).all()


def test_scratch_of_a_prompt_makes_no_step() -> None:
    run = program_run.Run(program(), 1, 2)
    with pytest.raises(InvalidInput, match="scratch"):
        run.logits(np.zeros(1, np.int64), np.zeros(1, np.int64), appended(1, 1))
    for sizes in ((0, 2), (2, 0), (-1, 2), (2, -1)):
        with pytest.raises(InvalidInput, match="n_rows"):
            program_run.Run(program(), *sizes)


def token_by_token(made: Program, tokens: np.ndarray, cache: IndirectCache) -> Tensor:
    """Logits of the last step."""
    for column in range(tokens.shape[1]):
        layers = [cache.append(layer, len(tokens), 1, *HEADS[1:], made.dtype) for layer in range(2)]
        positions = np.full(len(tokens), column)
        logits = made.steps(len(tokens)).logits(tokens[:, column], positions, everywhere(layers))
    return logits


@pytest.mark.parametrize("n_new", [1, 2, 19])
def test_a_prompt_is_its_tokens_one_by_one(n_new: int) -> None:
    arguments = given(2, n_new)
    arguments["tokens"] %= N_TOKENS
    ours = program_run.prefill(**arguments)
    assert ours.shape == (2, 1, N_LOGITS)
    theirs = token_by_token(arguments["program"], arguments["tokens"], IndirectCache())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_rows, n_new", [(1, 3), (3, 40), (1, 90)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_written_around_arena_and_logits(
    name: str, dtype: torch.dtype, n_rows: int, n_new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = proven_family(name, dtype)
    built: Program = programs_of(model)._made.program
    tokens = np.arange(n_rows * n_new).reshape(n_rows, n_new)
    torch.set_num_threads(2)
    guard = 256
    spare: list[np.ndarray] = []  # the scratch of the kernels
    results = []
    for is_guarded in (False, True):
        cache = IndirectCache(model.config)
        room = cache.append_everywhere(n_rows, n_new, built.layouts)
        assert room is not None
        size, n_bytes = built.row_bytes * n_rows * n_new, n_rows * built.n_logits * dtype.itemsize
        memory = np.full(size + 2 * guard + 64, 0xA5, np.uint8)
        first = -(-(memory.ctypes.data + guard) // 64) * 64 - memory.ctypes.data
        logits = np.full(n_bytes + 2 * guard, 0xA5, np.uint8)
        out = torch.from_numpy(logits)[guard : guard + n_bytes].view(dtype).view(n_rows, 1, built.n_logits)
        begin: Any = program_run.Run.__init__

        def moved(self: Any, *args: Any, begin: Any = begin, at: int = memory.ctypes.data + first) -> None:
            begin(self, *args)
            self.arena = at
            spare.append(np.full(self.scratch_bytes + guard + 64, 0xA5, np.uint8))
            self.scratch = -(-spare[0].ctypes.data // 64) * 64

        with monkeypatch.context() as patch:
            if is_guarded:
                patch.setattr(program_run.Run, "__init__", moved)
                patch.setattr(program_run, "_empty_logits", lambda run, out=out: out)
            found = built.prefill(tokens, np.arange(n_new)[None], room, Mask("causal"))
            results.append(found.clone())
        if is_guarded:
            assert (memory[:first] == 0xA5).all() and (memory[first + size :] == 0xA5).all()
            assert not (memory[first : first + size] == 0xA5).all()
            assert (spare[0][-guard:] == 0xA5).all() and not (spare[0][:-guard] == 0xA5).all()
            assert (logits[:guard] == 0xA5).all() and (logits[guard + n_bytes :] == 0xA5).all()
    assert torch.equal(bits(results[0]), bits(results[1]))
