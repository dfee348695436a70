"""Guessed tokens: prompt lookup in our loop, against requests without a guess."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

import hfopt
from hfopt.cache import IndirectCache
from hfopt.errors import InvalidInput
from hfopt.generation.lookup import PromptLookup
from hfopt.generation.speculation import Guess, Speculation, StepCosts
from tests.generation_cases import (
    CACHE,
    FAMILIES,
    llama,
    mistral,
    one_thread,
    prompts,
)
from tests.speculation_cases import Checks, cycling, pair, steady_costs

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

LOOKUP = {"prompt_lookup_num_tokens": 6}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    steady_costs(monkeypatch)
    return Checks(monkeypatch)


def _repeating(n_rows: int, length: int = 24) -> dict[str, Tensor]:
    """Prompts of which the second half begins as the first one does, the last row behind padding."""
    given = prompts(n_rows, length)
    ids = given["input_ids"]
    ids[:, length // 2 :] = ids[:, : length - length // 2]
    return given


@pytest.mark.parametrize("name", list(FAMILIES))
def test_tokens_are_those_without_guesses(name: str, checks: Checks) -> None:
    stock, ours = pair(FAMILIES[name])
    for n_rows in (1, 3):
        for options in (
            {"do_sample": False},
            {"do_sample": False, "repetition_penalty": 1.02},
            {"do_sample": True, "top_k": 5, "temperature": 0.3},
        ):
            arguments = {**_repeating(n_rows), **options, "max_new_tokens": 50}
            torch.manual_seed(5)
            expected = stock.generate(**arguments)
            torch.manual_seed(5)
            assert torch.equal(ours.generate(**arguments, **LOOKUP), expected)
    if ours.hfopt.by_module is None:
        assert 0 < checks.right <= checks.guessed == checks.checked
    else:
        assert checks.guessed == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_a_check_has_the_bits_of_steps(dtype: torch.dtype, kv_cache: str | None, checks: Checks) -> None:
    model = hfopt.optimize(cycling(llama()).to(dtype), kv_cache=kv_cache)
    arguments = {**_repeating(2), "max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True,
                 "output_logits": True, "output_scores": True}  # fmt: skip
    plain, guessed = model.generate(**arguments), model.generate(**arguments, **LOOKUP)
    assert checks.right > 0
    assert torch.equal(plain.sequences, guessed.sequences)
    for kind in ("logits", "scores"):
        for one, other in zip(plain[kind], guessed[kind], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("quantization", ["int8", "int4", "nf4"])
def test_quantised_models(quantization: str, checks: Checks) -> None:
    model = hfopt.optimize(cycling(llama(hidden_size=128)), quantization=quantization)
    arguments = {**_repeating(1), "max_new_tokens": 40, "do_sample": False}
    assert torch.equal(model.generate(**arguments), model.generate(**arguments, **LOOKUP))
    assert checks.right > 0


def test_windows_that_a_text_outgrows(checks: Checks) -> None:
    stock, ours = pair(mistral, 0.05, sliding_window=9)
    for n_rows in (1, 2):
        arguments = {**_repeating(n_rows, 40), "max_new_tokens": 50, "do_sample": False}
        assert torch.equal(ours.generate(**arguments, **LOOKUP), stock.generate(**arguments))
    assert ours.hfopt.by_module is None and checks.right > 0


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_cache_of_the_user_ends_as_without_guesses(do_sample: bool, checks: Checks) -> None:
    model = hfopt.optimize(cycling(llama()))
    arguments = {**_repeating(1), "max_new_tokens": 17, "do_sample": do_sample, "temperature": 0.1}
    caches = [IndirectCache(model.config) for _ in range(2)]
    tokens = []
    for cache, options in zip(caches, ({}, LOOKUP), strict=True):
        torch.manual_seed(1)
        tokens.append(model.generate(**arguments, **options, **{CACHE: cache}))
    assert torch.equal(*tokens) and checks.guessed > 0
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == tokens[0].shape[1] - 1
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def test_an_end_within_a_guess(checks: Checks) -> None:
    stock, ours = pair(llama)
    arguments = {**_repeating(3), "max_new_tokens": 40, "do_sample": False}
    free = stock.generate(**arguments)
    for place in range(26, 60, 3):
        options = {"eos_token_id": int(free[0, place]), "pad_token_id": 0}
        expected = stock.generate(**arguments, **options)
        cache = IndirectCache(ours.config)
        assert torch.equal(ours.generate(**arguments, **options, **LOOKUP, **{CACHE: cache}), expected)
        assert cache.get_seq_length() == expected.shape[1] - 1
    assert checks.right > 0


class _Kept:
    """A streamer of the user."""

    def __init__(self, raises_at: int | None = None) -> None:
        self.tokens: list[Tensor] = []
        self._raises_at = raises_at

    def put(self, value: Tensor) -> None:
        if len(self.tokens) == self._raises_at:
            raise ConnectionError
        self.tokens.append(value)

    def end(self) -> None:
        self.tokens.append(torch.tensor([-1]))


def test_streamers_get_each_token(checks: Checks) -> None:
    model = hfopt.optimize(cycling(llama()))
    arguments = {**_repeating(1), "max_new_tokens": 30, "do_sample": False}
    plain, guessed = _Kept(), _Kept()
    model.generate(**arguments, streamer=plain)
    model.generate(**arguments, streamer=guessed, **LOOKUP)
    assert checks.right > 0
    assert [each.tolist() for each in plain.tokens] == [each.tolist() for each in guessed.tokens]


@pytest.mark.parametrize("do_sample", [False, True])
def test_an_exception_leaves_no_guess_in_the_cache(do_sample: bool, checks: Checks) -> None:
    model = hfopt.optimize(cycling(llama()))
    for n in range(3, 30, 4):
        cache = IndirectCache(model.config)
        arguments = {**_repeating(1), "max_new_tokens": 40, "do_sample": do_sample, "temperature": 0.05}
        with pytest.raises(ConnectionError):
            model.generate(**arguments, **LOOKUP, **{CACHE: cache}, streamer=_Kept(raises_at=n))
        assert cache.get_seq_length() == 24 + n - 1
    assert checks.guessed > 0


class _Halt(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 41)


class _Forbid(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, input_ids[:, -1] % 3] = -torch.inf
        return scores


def test_code_of_the_user(checks: Checks) -> None:
    stock, ours = pair(llama)
    arguments = {**_repeating(1), "max_new_tokens": 50, "do_sample": False, "stopping_criteria": [_Halt()],
                 "logits_processor": LogitsProcessorList([_Forbid()])}  # fmt: skip
    expected = stock.generate(**arguments)
    assert expected.shape[1] == 41
    assert torch.equal(ours.generate(**arguments, **LOOKUP), expected)
    assert checks.guessed > 0


def test_the_last_positions_of_a_table(checks: Checks) -> None:
    """Nothing is guessed beyond what the model has rows for, or the request asks for."""
    stock, ours = pair(FAMILIES["opt"])
    for n_new in (1, 2, 7, 72):
        arguments = {**_repeating(1), "max_new_tokens": n_new, "do_sample": False}
        assert torch.equal(ours.generate(**arguments, **LOOKUP), stock.generate(**arguments))
    assert checks.right > 0


def test_optimize_with_lookup(checks: Checks) -> None:
    stock, ours = cycling(llama()), hfopt.optimize(cycling(llama()), speculation="lookup")
    arguments = {**_repeating(1), "max_new_tokens": 50}
    for options in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": False, "use_cache": False}):
        assert torch.equal(ours.generate(**arguments, **options), stock.generate(**arguments, **options))
    assert checks.right > 0
    assert "next tokens are guessed from the text" in str(ours.hfopt)
    hfopt.restore(ours)
    assert torch.equal(ours.generate(**arguments), stock.generate(**arguments))
    with pytest.raises(InvalidInput, match="speculation is 'oracle'"):
        hfopt.optimize(llama(), speculation="oracle")  # type: ignore[arg-type]


def test_several_prompts_of_one_row_each_raise_nothing() -> None:
    """transformers takes one row at a time only."""
    _, ours = pair(llama)
    with pytest.raises(ValueError, match="num_return_sequences"):
        ours.generate(**_repeating(1), num_return_sequences=2, do_sample=True, **LOOKUP)


def test_threads(checks: Checks) -> None:
    model = hfopt.optimize(cycling(llama()))
    cases = [{**_repeating(n), "max_new_tokens": 30, "do_sample": False} for n in (1, 2, 3)]
    expected = [model.generate(**each) for each in cases]
    results: dict[int, Tensor] = {}

    def work(place: int) -> None:
        for _ in range(5):
            results[place] = model.generate(**cases[place], **LOOKUP)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(torch.equal(results[place], expected[place]) for place in range(3))


# ---- the parts -------------------------------------------------------------------------------------------------------


def _followed(tokens: list[int], longest: int, n: int) -> list[int]:
    """What followed the last n-gram where it stood last, by a scan."""
    for length in range(min(longest, len(tokens)), 0, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                return tokens[end : end + n]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 9))
def test_lookup_finds_what_a_scan_finds(tokens: list[int], longest: int, n: int) -> None:
    first, rest = tokens[:5], tokens[5:]
    lookup = PromptLookup(np.array([first]), longest)
    for token in rest:
        lookup.add(np.array([token]))
    guess, expected = lookup.guess(n), _followed(tokens, longest, n)
    assert (guess is None) == (not expected)
    if guess is not None:
        assert guess.tokens.shape == (1, n) and guess.tokens[0, : len(expected)].tolist() == expected


def _guessed(lookup: PromptLookup, n: int = 3) -> tuple[int, list[int]] | None:
    guess = lookup.guess(n)
    return None if guess is None else (guess.kind, guess.tokens[0].tolist())


def test_a_copy_goes_on_behind_a_word_that_was_edited() -> None:
    original = list(range(100, 140))
    lookup = PromptLookup(np.array([[*original, *original[:3]]]), 3)
    assert _guessed(lookup) == (3, [103, 104, 105])
    for token in (103, 1):
        lookup.add(np.array([token]))
    assert _guessed(lookup) == (0, [105, 106, 107])  # 104 is another
    lookup.add(np.array([105]))
    assert _guessed(lookup) == (0, [106, 107, 108])
    for token in (106, 107):
        lookup.add(np.array([token]))
    assert _guessed(lookup) == (3, [108, 109, 110])
    lookup.add(np.array([2]))
    assert _guessed(lookup) == (0, [109, 110, 111])
    lookup.add(np.array([3]))
    assert _guessed(lookup) is None  # two in a row: the text has left the original


def test_a_copy_that_does_not_go_on_is_not_followed() -> None:
    original = list(range(100, 190))
    lookup = PromptLookup(np.array([original]), 3)
    kinds = []
    for first in range(0, 60, 6):  # parts of three tokens, and what is in no original behind them
        for token in original[first : first + 3]:
            lookup.add(np.array([token]))
        assert _guessed(lookup) == (3, original[first + 3 : first + 6])
        lookup.add(np.array([1000 + first]))
        kinds.append(_guessed(lookup))
        lookup.add(np.array([2000 + first]))
        assert _guessed(lookup) is None
    assert kinds[0] == (0, original[4:7]) and set(kinds[1:]) == {None}


def test_costs_between_those_that_are_known() -> None:
    costs = StepCosts()
    assert costs.seconds(1, 4) == 0
    costs.note(1, 1, 1.0)
    assert costs.seconds(2, 1) == 0 and costs.seconds(1, 1) == 1 and costs.seconds(1, 3) > 1
    costs.note(1, 1 + 4, 9.0)  # a first call is slow
    assert costs.seconds(1, 5) < 3
    for _ in range(50):
        costs.note(1, 1, 1.0)
        costs.note(1, 5, 2.0)
    assert costs.seconds(1, 5) == pytest.approx(2, rel=0.01)
    assert costs.seconds(1, 3) == pytest.approx(1.5, rel=0.01)
    costs.note(1, 3, 100.0)  # once, and perhaps for a reason that has gone
    assert costs.seconds(1, 3) == pytest.approx(1.5, rel=0.01)
    for _ in range(3):
        costs.note(1, 3, 1.9)
    assert costs.seconds(1, 3) > 1.7


class _Sure:
    """Knows a token for each place."""

    seconds = 0.0

    def add(self, tokens: np.ndarray) -> None:
        pass

    def meanwhile(self) -> None:
        pass

    def guess(self, n: int) -> Guess:
        return Guess(np.zeros((1, n), np.int64))


def test_guessing_stops_where_it_does_not_pay() -> None:
    speculation = Speculation(_Sure(), 7, StepCosts())
    for n in range(1, 9):
        speculation.note_call(1, n, 1 + 0.1 * (n - 1))
    sizes, n_steps = [], 400
    for _ in range(n_steps):
        speculation.add(np.zeros(1, np.int64))
        guess = speculation.guess(1, 100)
        if guess is not None:
            sizes.append(guess.shape[1])
            speculation.note(guess.shape[1], 0)
    assert sum(sizes) < 0.1 * n_steps and sizes[-1] == 1
    right = []
    for _ in range(100):
        speculation.add(np.zeros(1, np.int64))
        if (guess := speculation.guess(1, 100)) is not None:
            right.append(guess.shape[1])
            speculation.note(guess.shape[1], guess.shape[1])
    assert not right or right[-1] >= right[0]


def test_right_guesses_grow_to_what_is_allowed() -> None:
    speculation = Speculation(_Sure(), 7, StepCosts())
    sizes = []
    for _ in range(30):
        speculation.add(np.zeros(1, np.int64))
        guess = speculation.guess(1, 100)
        assert guess is not None
        sizes.append(guess.shape[1])
        speculation.note_call(1, 1 + sizes[-1], 1 + 0.05 * sizes[-1])
        speculation.note(sizes[-1], sizes[-1])
    assert sizes[-1] == 7 and max(sizes) == 7
