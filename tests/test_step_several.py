"""Several greedy tokens in one call: the tokens of one at a time, and nothing kept from who looks at each of them."""

import _thread
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

import hfopt
from hfopt.cache import IndirectCache
from hfopt.errors import InvalidInput
from hfopt.generation import decoding
from hfopt.program.run import Run
from tests.generation_cases import (
    CACHE,
    FAMILIES,
    Model,
    cache_of,
    llama,
    one_thread,
    opt,
    prompts,
)
from tests.reference import DTYPES
from tests.step_cases import bits, modules_alone, passes, proven, proven_family, rehearsals
from tests.test_step_inputs import HEADS, N_LOGITS, N_TOKENS, program

__all__ = ["passes", "rehearsals"]  # fixtures

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

WHOLE = {"do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens a row each call of `choose` made."""
    found: list[int] = []
    original = Run.choose

    def noting(*args: Any, **kwargs: Any) -> Any:
        chosen = original(*args, **kwargs)
        found.append(len(chosen))
        return chosen

    monkeypatch.setattr(Run, "choose", noting)
    return found


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets every call take so many seconds a token, as far as its caller can see."""

    def use(seconds: float) -> None:
        class Clock:
            """Instead of the module `time`."""

            now, begins = 0.0, True

            @classmethod
            def perf_counter(cls) -> float:
                cls.begins = not cls.begins
                if cls.begins:
                    cls.now += seconds * cls.n_steps
                return cls.now

            n_steps = 1

        original = Run.choose

        def noting(*args: Any, **kwargs: Any) -> Any:
            chosen = original(*args, **kwargs)
            Clock.n_steps = len(chosen)
            return chosen

        monkeypatch.setattr(decoding, "time", Clock)
        monkeypatch.setattr(Run, "choose", noting)

    return use


def unpadded(n_rows: int, length: int = 9) -> dict[str, Tensor]:
    ids = prompts(n_rows, length)["input_ids"].clamp(min=2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def assert_tokens_of_the_modules(model: Model, **given: Any) -> Any:
    """The same tokens, and the same cache."""
    ours = model.generate(**{**WHOLE, **given})
    with modules_alone(model):
        theirs = model.generate(**{**WHOLE, **given})
    assert torch.equal(ours.sequences, theirs.sequences)
    for one, other in zip(cache_of(ours).layers, cache_of(theirs).layers, strict=True):
        assert torch.equal(bits(one.keys), bits(other.keys))
        assert torch.equal(bits(one.values), bits(other.values))
    return ours.sequences


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens(name: str, dtype: torch.dtype, n_rows: int, passes: list[int], calls: list[int]) -> None:
    model = proven_family(name, dtype)
    passes.clear()
    calls.clear()
    model.generate(**unpadded(n_rows), **WHOLE, max_new_tokens=60)
    assert sum(calls) == 59 and len(calls) < 20 and not passes
    assert_tokens_of_the_modules(model, **unpadded(n_rows), max_new_tokens=60)


def test_calls_grow_to_what_is_allowed(steady: Callable[[float], None], calls: list[int]) -> None:
    model = proven_family("llama")
    for seconds, sizes in (
        (0.2, [1] * 99),
        (0.09, [1] + [2] * 49),
        (0.06, [1, 2] + [3] * 32),
        (0.001, [1, 2, 4, 8, 16, 32, 32, 4]),
    ):
        calls.clear()
        steady(seconds)
        model.generate(**unpadded(1), max_new_tokens=100, do_sample=False)
        assert calls == sizes


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("is_padded", [False, True])
def test_rows_that_end(n_rows: int, is_padded: bool) -> None:
    """Every token that a row emits, as the one that ends it."""
    model = proven_family("llama")
    given: dict[str, Any] = prompts(n_rows) if is_padded else unpadded(n_rows)
    if is_padded:
        given["attention_mask"][0, :2] = 0
    free = model.generate(**given, max_new_tokens=40, do_sample=False)
    for place in (9, 10, 11, 12, 20, 30, 47, 48):
        ends = free[:, place].tolist()
        for end in (ends[:1], ends[-1:], ends, [*ends, 3, 4]):
            found = assert_tokens_of_the_modules(
                model, **given, max_new_tokens=40, eos_token_id=end, pad_token_id=0
            )
            assert found.shape[1] <= 49


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_masks_wider_than_the_keys(name: str, n_rows: int, calls: list[int]) -> None:
    # the mask grows in steps of 256; the others have 96 positions
    given = unpadded(n_rows, 205 if name == "llama" else 9)
    given["attention_mask"][0, :4] = 0
    assert_tokens_of_the_modules(proven_family(name), **given, max_new_tokens=80)
    assert max(calls) > 4


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_the_cache_grows_within_a_call(length: int, calls: list[int]) -> None:
    model = proven_family("llama")
    assert_tokens_of_the_modules(model, **unpadded(2, length), max_new_tokens=150)
    assert max(calls) > 4


def test_a_cache_that_is_gone_on_with(calls: list[int]) -> None:
    model = proven_family("llama")

    def turns() -> Any:
        first = model.generate(**unpadded(2), **WHOLE, max_new_tokens=30, eos_token_id=5, pad_token_id=0)
        ids = torch.cat([first.sequences, torch.full((2, 3), 7)], 1)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE: cache_of(first)},
            **WHOLE,
            max_new_tokens=30,
        )

    ours = turns()
    with modules_alone(model):
        theirs = turns()
    assert torch.equal(ours.sequences, theirs.sequences)
    assert cache_of(ours).get_seq_length() == cache_of(theirs).get_seq_length()
    assert max(calls) > 4


def test_positions_that_end(calls: list[int]) -> None:
    model = proven(opt())
    found = assert_tokens_of_the_modules(model, **unpadded(1, 40), max_new_tokens=56)
    assert found.shape[1] == 96
    with pytest.raises(InvalidInput, match="96"):
        model.generate(**unpadded(1, 40), max_new_tokens=100, do_sample=False)


# ---- who looks at each token ---------------------------------------------------------------------------------------


class _Streamer(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.calls: list[int] | None = None

    def put(self, value: Tensor) -> None:
        if self.calls is not None:
            self.seen.append(sum(self.calls))

    def end(self) -> None:
        pass


class _Counter(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_one_at_a_time_for_who_looks(calls: list[int]) -> None:
    model = proven_family("llama")
    streamer = _Streamer()
    streamer.calls = calls
    lookers: list[dict[str, Any]] = [
        {"streamer": streamer},
        {"stopping_criteria": StoppingCriteriaList([_Counter()])},
        {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(100.0)])},
        {"max_time": 100.0},
    ]
    expected = model.generate(**unpadded(1), max_new_tokens=20, do_sample=False)
    for given in lookers:
        calls.clear()
        found = model.generate(**unpadded(1), max_new_tokens=20, do_sample=False, **given)
        assert torch.equal(found, expected)
        assert calls == [1] * 19
    # the prompt, then each token before the next one is made
    assert streamer.seen == [0, *range(20)]


def test_tokens_of_a_call_share_its_time(calls: list[int]) -> None:
    model = proven_family("llama")
    calls.clear()
    begin = time.perf_counter()
    with hfopt.record_latency(model) as latency:
        model.generate(**unpadded(1), max_new_tokens=40, do_sample=False)
    total = time.perf_counter() - begin
    assert len(latency.next) == 39 == sum(calls)
    assert 0 < sum(latency.next) + sum(latency.first) <= total
    first = 0
    for size in calls:
        assert len(set(latency.next[first : first + size])) == 1
        first += size


def test_an_interruption(calls: list[int]) -> None:
    model = proven(llama(num_hidden_layers=4, max_position_embeddings=1 << 17))
    expected = model.generate(**unpadded(1), max_new_tokens=20, do_sample=False)
    timer = threading.Timer(0.5, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        model.generate(**unpadded(1), max_new_tokens=100_000, do_sample=False)
    assert max(calls) > 1
    assert torch.equal(model.generate(**unpadded(1), max_new_tokens=20, do_sample=False), expected)


# ---- the operation -------------------------------------------------------------------------------------------------


def chosen(n_rows: int, n_steps: int, *, of: Any = None, **changes: Any) -> Any:
    """`choose` behind a token in every row, and the cache."""
    made = of or program()
    cache = IndirectCache()
    layout = *HEADS[1:], torch.float32
    for layer in range(2):
        cache.append(layer, n_rows, 1, *layout)
        cache.layers[layer].prefix[:, :, :, 0] = 0.1
    appended = cache.append_everywhere(n_rows, n_steps, [layout] * len(cache.layers))
    arguments = {
        "tokens": np.arange(n_rows, dtype=np.int64),
        "positions": np.arange(n_rows, dtype=np.int64),
        "appended": appended,
    }
    return made.steps(n_rows).choose(**{**arguments, **changes}), cache


def test_one_step_after_the_other() -> None:
    made = program()
    together, _ = chosen(2, 6, of=made)
    alone, cache = chosen(2, 1, of=made)
    tokens = [alone[0]]
    for index in range(1, len(together)):
        appended = cache.append_everywhere(2, 1, [(*HEADS[1:], torch.float32)] * len(cache.layers))
        (one,) = made.steps(2).choose(tokens[-1], np.arange(2) + index, appended)
        tokens.append(one)
    assert np.array_equal(together, np.stack(tokens))


def test_tokens_that_the_table_has_not_end_a_call() -> None:
    """The model has more logits than tokens."""
    for seed in range(20):
        torch.manual_seed(seed)
        found, _ = chosen(1, 30)
        assert (found[:-1] < N_TOKENS).all()
        assert len(found) == 30 or N_TOKENS <= found[-1, 0] < N_LOGITS


def test_padding_follows_finished_rows() -> None:
    made = program()
    found, _ = chosen(2, 5, finished=np.array([False, True]), pad=7, of=made)
    free, _ = chosen(1, 5, of=made)
    assert (found[:, 1] == 7).all()
    assert np.array_equal(found[:, 0], free[:, 0])


WRONG_ENDS: dict[str, dict[str, np.ndarray]] = {
    "rows": {"finished": np.zeros(1, np.bool_)},
    "finished as numbers": {"finished": np.zeros(2, np.int64)},
    "end tokens of another type": {"eos": np.empty(0, np.int32)},
    "end tokens in rows": {"eos": np.empty((1, 1), np.int64)},
}


@pytest.mark.parametrize("name", WRONG_ENDS)
def test_wrong_ends(name: str) -> None:
    with pytest.raises(InvalidInput):
        chosen(2, 2, **WRONG_ENDS[name])


@pytest.mark.parametrize("index", [-1, N_TOKENS, 1 << 40])
def test_a_first_token_outside_the_table(index: int) -> None:
    with pytest.raises(InvalidInput, match="no such rows"):
        chosen(2, 3, tokens=np.array([0, index]))


def test_a_step_with_logits_is_one() -> None:
    cache = IndirectCache()
    layout = *HEADS[1:], torch.float32
    for layer in range(2):
        cache.append(layer, 1, 1, *layout)
    appended: Any = cache.append_everywhere(1, 2, [layout] * len(cache.layers))
    with pytest.raises(InvalidInput, match="2 tokens"):
        program().steps(1).logits(np.zeros(1, np.int64), np.zeros(1, np.int64), appended)
