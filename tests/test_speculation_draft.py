"""Guesses of a draft model: `generate(assistant_model=...)` in our loop, against requests without one."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import hfopt
from hfopt.cache import IndirectCache
from hfopt.generation.draft import DraftModel
from hfopt.generation.speculation import Guess, Speculation, StepCosts
from tests.generation_cases import (
    CACHE,
    FAMILIES,
    IS_WHOLE,
    NOT_WHOLE,
    VOCABULARY,
    Model,
    llama,
    mistral,
    one_thread,
    prompts,
)
from tests.speculation_cases import Checks

pytestmark = [
    pytest.mark.usefixtures(one_thread.__name__),
    pytest.mark.skipif(not IS_WHOLE, reason=NOT_WHOLE),
]

GREEDY: dict[str, Any] = {"do_sample": False}
MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling": {"do_sample": True},
    "warped": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7},
    "processors": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


def noisy(make: Any = llama, part: float = 0.03) -> Model:
    """A model that mostly says what the one without noise does."""
    model = make()
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += part * parameter.std() * torch.randn_like(parameter)
    return model


DRAFTS: dict[str, Any] = {
    "right": llama,
    "near": noisy,
    "wrong": lambda: llama(num_hidden_layers=1, hidden_size=32, num_attention_heads=2),
}


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    def theirs(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("transformers' own assisted loop runs")

    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", theirs)
    return Checks(monkeypatch)


@pytest.fixture(params=[1, 4, 31])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens of each guess, whatever calls cost on the machine."""
    n: int = request.param
    monkeypatch.setattr(Speculation, "_worth", lambda speculation, n_rows, most: min(n, most))
    return n


@pytest.fixture(scope="module")
def stock() -> Model:
    return llama()


@pytest.fixture(scope="module")
def ours() -> Model:
    return hfopt.optimize(llama())


@pytest.fixture(scope="module", params=list(DRAFTS))
def draft(request: pytest.FixtureRequest) -> Model:
    return hfopt.optimize(DRAFTS[request.param]())


@pytest.fixture(scope="module")
def near() -> Model:
    return hfopt.optimize(noisy())


def seeded(model: Model, **arguments: Any) -> Any:
    torch.manual_seed(5)
    tokens = model.generate(**arguments)
    return tokens, torch.rand(1)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_without_a_draft(
    mode: str, n_rows: int, stock: Model, ours: Model, draft: Model, size: int, checks: Checks
) -> None:
    arguments = {**prompts(n_rows), **MODES[mode], "max_new_tokens": 50}
    expected, random = seeded(stock, **arguments)
    tokens, our_random = seeded(ours, **arguments, assistant_model=draft)
    assert torch.equal(tokens, expected)
    assert torch.equal(our_random, random), "the random streams differ"
    assert checks.calls > 0 and checks.guessed > 0
    is_right = draft.config.num_hidden_layers == 2 and torch.equal(draft.lm_head.weight, ours.lm_head.weight)
    assert not is_right or checks.right == checks.guessed


@pytest.mark.parametrize("mode", MODES)
def test_a_near_draft_is_mostly_right(
    mode: str, ours: Model, near: Model, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of what is drawn: with the random numbers that the loop draws next."""
    monkeypatch.setattr(Speculation, "_worth", lambda speculation, n_rows, most: min(1, most))
    for seed in range(4):
        torch.manual_seed(seed)
        arguments = {**prompts(1), **MODES[mode], "max_new_tokens": 50}
        ours.generate(**arguments, assistant_model=near)
    assert checks.right > checks.guessed / 2, f"{checks.right} of {checks.guessed}"


@pytest.mark.parametrize("name", list(FAMILIES))
def test_families(name: str, size: int, checks: Checks) -> None:
    stock, ours = FAMILIES[name](), hfopt.optimize(FAMILIES[name]())
    if ours.hfopt.by_module is not None:
        pytest.skip("no program")
    draft = hfopt.optimize(noisy(FAMILIES[name]))
    for mode in ("greedy", "sampling"):
        arguments = {**prompts(3), **MODES[mode], "max_new_tokens": 50}
        expected, _ = seeded(stock, **arguments)
        assert torch.equal(seeded(ours, **arguments, assistant_model=draft)[0], expected)
    assert checks.guessed > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_other_types_of_number(dtype: torch.dtype, kv_cache: str | None, size: int, checks: Checks) -> None:
    ours = hfopt.optimize(llama().to(dtype), kv_cache=kv_cache)
    draft = hfopt.optimize(noisy().to(dtype), kv_cache=kv_cache)
    for mode in ("greedy", "sampling"):
        arguments = {**prompts(3), **MODES[mode], "max_new_tokens": 50}
        expected, _ = seeded(ours, **arguments)
        assert torch.equal(seeded(ours, **arguments, assistant_model=draft)[0], expected)
    assert checks.right > 0


@pytest.mark.parametrize("which", [pytest.param("model", marks=pytest.mark.slow), "draft"])
def test_quantised(which: str, ours: Model, near: Model, checks: Checks) -> None:
    model = hfopt.optimize(llama(), quantization="int8") if which == "model" else ours
    draft = hfopt.optimize(noisy(), quantization="int8") if which == "draft" else near
    arguments = {**prompts(1), **GREEDY, "max_new_tokens": 50}
    assert torch.equal(model.generate(**arguments, assistant_model=draft), model.generate(**arguments))
    assert checks.calls > 0


def test_all_outputs_have_the_bits_of_steps(ours: Model, near: Model, size: int, checks: Checks) -> None:
    """Those of rows that have ended too, which go on with padding."""
    free = ours.generate(**prompts(3), **GREEDY, max_new_tokens=30)
    options = {**prompts(3), "max_new_tokens": 30, "eos_token_id": free[:, 20].tolist(), "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    for mode in ("greedy", "sampling"):
        one, _ = seeded(ours, **options, **MODES[mode])
        other, _ = seeded(ours, **options, **MODES[mode], assistant_model=near)
        assert torch.equal(one.sequences, other.sequences)
        for kind in ("logits", "scores"):
            assert len(one[kind]) == len(other[kind])
            assert all(map(torch.equal, one[kind], other[kind]))
    assert checks.right > 0


@pytest.mark.parametrize("mode", ["greedy", "sampling"])
def test_an_end_within_a_guess(
    mode: str, stock: Model, ours: Model, near: Model, size: int, checks: Checks
) -> None:
    arguments = {**prompts(3), **MODES[mode], "max_new_tokens": 30, "pad_token_id": 0}
    free, _ = seeded(stock, **arguments)
    for place in range(10, 39, 4):
        ends = free[:2, place].tolist()
        expected, _ = seeded(stock, **arguments, eos_token_id=ends)
        cache = IndirectCache(ours.config)
        given = {"eos_token_id": ends, "assistant_model": near, CACHE: cache}
        assert torch.equal(seeded(ours, **arguments, **given)[0], expected)
        assert cache.get_seq_length() == expected.shape[1] - 1
    assert checks.right > 0


@pytest.mark.parametrize("mode", ["greedy", "sampling"])
def test_a_cache_of_the_user(mode: str, stock: Model, ours: Model, draft: Model, size: int) -> None:
    theirs: Any = DynamicCache(config=stock.config)
    mine: Any = IndirectCache(ours.config)
    arguments = {**prompts(1), **MODES[mode]}
    for n in (17, 9):  # the second one goes on behind the first
        expected, _ = seeded(stock, **arguments, max_new_tokens=n, **{CACHE: theirs})
        tokens, _ = seeded(ours, **arguments, max_new_tokens=n, **{CACHE: mine}, assistant_model=draft)
        assert torch.equal(tokens, expected)
        assert mine.get_seq_length() == theirs.get_seq_length() == expected.shape[1] - 1
        for one, other in zip(mine.layers, theirs.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=1e-4)
        arguments |= {"input_ids": expected, "attention_mask": torch.ones_like(expected)}


@pytest.mark.parametrize("mode", ["greedy", "sampling"])
def test_few_tokens(mode: str, stock: Model, ours: Model, draft: Model, size: int) -> None:
    for n in range(1, 8):
        for options in ({"max_new_tokens": n}, {"max_length": 9 + n}):
            arguments = {**prompts(2), **MODES[mode], **options}
            expected, _ = seeded(stock, **arguments)
            assert torch.equal(seeded(ours, **arguments, assistant_model=draft)[0], expected)


def test_a_prompt_of_one_token(stock: Model, ours: Model, draft: Model, size: int) -> None:
    arguments = {"input_ids": torch.tensor([[7]]), **GREEDY, "max_new_tokens": 20}
    assert torch.equal(ours.generate(**arguments, assistant_model=draft), stock.generate(**arguments))


class Kept:
    """A streamer of the user; raises behind so many tokens."""

    def __init__(self, most: int = 1000) -> None:
        self.values: list[Tensor] = []
        self.ended = 0
        self.most = most

    def put(self, value: Tensor) -> None:
        self.values.append(value)
        if len(self.values) > self.most:
            raise RuntimeError("enough")

    def end(self) -> None:
        self.ended += 1


class Shifting(LogitsProcessor):
    """A processor of the user that gives something else each time."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.lengths.append(input_ids.shape[1])
        return scores + len(self.lengths) % 3 * torch.linspace(0, 1, scores.shape[1])


class Counting(StoppingCriteria):
    """A criterion of the user."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.lengths.append(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("mode", ["greedy", "sampling"])
def test_code_of_the_user_sees_what_it_sees_without_a_draft(
    mode: str, stock: Model, ours: Model, near: Model, size: int, checks: Checks
) -> None:
    seen = []
    for model, options in ((stock, {}), (ours, {"assistant_model": near})):
        streamer, processor, criterion = Kept(), Shifting(), Counting()
        tokens, _ = seeded(
            model,
            **{**prompts(1), **MODES[mode], "max_new_tokens": 40, "streamer": streamer, **options},
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([criterion]),
        )
        kept = [value.tolist() for value in streamer.values]
        seen.append((tokens.tolist(), kept, streamer.ended, processor.lengths, criterion.lengths))
    assert seen[0] == seen[1]
    assert checks.calls > 0


class RowByRow(StoppingCriteria):
    """A criterion of the user that ends one row after the other."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.tensor([input_ids.shape[1] > 15 + 10 * row for row in range(len(input_ids))])


@pytest.mark.parametrize("mode", ["greedy", "sampling"])
def test_rows_that_end_without_padding(
    mode: str, stock: Model, ours: Model, near: Model, size: int, checks: Checks
) -> None:
    """Without a token that ends rows, those that are finished go on choosing until all are."""
    arguments = {**prompts(3), **MODES[mode], "max_new_tokens": 40}
    results = [
        seeded(model, **arguments, **options, stopping_criteria=StoppingCriteriaList([RowByRow()]))[0]
        for model, options in ((stock, {}), (ours, {}), (ours, {"assistant_model": near}))
    ]
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])
    assert checks.calls > 0


@pytest.mark.parametrize("most", [1, 2, 5, 11])
@pytest.mark.parametrize("mode", ["greedy", "sampling"])
def test_an_exception_leaves_the_cache_right(
    mode: str, most: int, stock: Model, ours: Model, draft: Model, size: int
) -> None:
    lengths = []
    caches: list[Any] = [DynamicCache(config=stock.config), IndirectCache(ours.config)]
    for model, cache, options in zip((stock, ours), caches, ({}, {"assistant_model": draft}), strict=True):
        given = {**prompts(1), **MODES[mode], "max_new_tokens": 40, "streamer": Kept(most), **options}
        with pytest.raises(RuntimeError, match="enough"):
            seeded(model, **given, **{CACHE: cache})
        lengths.append(cache.get_seq_length())
    assert lengths[0] == lengths[1]
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("error", [hfopt.InvalidInput("of the draft"), KeyboardInterrupt()])
def test_a_draft_that_fails(
    error: BaseException, stock: Model, ours: Model, near: Model, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hfopt refuses is no matter of the request; anything else ends it, with its cache as it is without a guess."""
    go_on, n_calls = DraftModel._go_on, [0]

    def failing(guesser: DraftModel, n: int, made: list[Any]) -> None:
        n_calls[0] += 1
        if n_calls[0] > 2:
            raise error
        go_on(guesser, n, made)

    monkeypatch.setattr(DraftModel, "_go_on", failing)
    arguments = {**prompts(1), **GREEDY, "max_new_tokens": 50}
    expected, cache = stock.generate(**arguments), IndirectCache(ours.config)
    options = {CACHE: cache, "assistant_model": near}
    if isinstance(error, hfopt.InvalidInput):
        assert torch.equal(ours.generate(**arguments, **options), expected)
        assert n_calls[0] == 3
        assert cache.get_seq_length() == expected.shape[1] - 1
    else:
        with pytest.raises(KeyboardInterrupt):
            ours.generate(**arguments, **options)
        length = cache.get_seq_length()
        rest = ours.generate(
            expected[:, : length + 1],
            attention_mask=torch.ones(1, length + 1),
            max_length=59,
            **GREEDY,
            **{CACHE: cache},
        )
        assert torch.equal(rest, expected)


@pytest.mark.parametrize("window", [None, 5])
def test_a_draft_with_windows(
    window: int | None, stock: Model, ours: Model, size: int, checks: Checks
) -> None:
    draft = hfopt.optimize(mistral(sliding_window=window))
    with torch.no_grad():
        for mine, parameter in zip(draft.parameters(), stock.parameters(), strict=True):
            mine.copy_(parameter)
    for mode in ("greedy", "sampling"):
        arguments = {**prompts(3), **MODES[mode], "max_new_tokens": 50}
        expected, _ = seeded(stock, **arguments)
        assert torch.equal(seeded(ours, **arguments, assistant_model=draft)[0], expected)
    assert checks.guessed > 0


def test_a_draft_of_a_shorter_context(stock: Model, ours: Model, size: int, checks: Checks) -> None:
    draft = hfopt.optimize(FAMILIES["gptj"](n_positions=24))
    arguments = {**prompts(1), **GREEDY, "max_new_tokens": 50}
    assert torch.equal(ours.generate(**arguments, assistant_model=draft), stock.generate(**arguments))
    assert checks.guessed > 0


def test_threads(stock: Model, ours: Model, draft: Model, size: int) -> None:
    arguments = [{**prompts(1), **GREEDY, "max_new_tokens": 40} for _ in range(4)]
    for row, each in enumerate(arguments):
        each["input_ids"] = each["input_ids"].roll(row, 1)
    expected = [stock.generate(**each) for each in arguments]
    results: list[Any] = [None] * len(arguments)

    def run(index: int) -> None:
        for _ in range(3):
            results[index] = ours.generate(**arguments[index], assistant_model=draft)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, results, expected))


class Costly:
    """Is always right, for as many seconds a token."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.asked: list[int] = []

    def add(self, tokens: np.ndarray) -> None:
        pass

    def meanwhile(self) -> None:
        pass

    def guess(self, n: int) -> Guess:
        self.asked.append(n)
        return Guess(np.zeros((1, n), np.int64))


@pytest.mark.parametrize("seconds", [0.1, 1.0])
def test_a_draft_that_does_not_pay_is_asked_seldom(seconds: float) -> None:
    """However right it is: steps of this one cost as much as those that they save."""
    guesser = Costly(seconds)
    speculation = Speculation(guesser, 7, StepCosts())
    for _ in range(5):
        for n in range(1, 9):
            speculation.note_call(1, n, 1 + 0.1 * (n - 1))
    for _ in range(400):
        speculation.add(np.zeros(1, np.int64))
        guess = speculation.guess(1, 100)
        if guess is not None:
            speculation.note(guess.shape[1], guess.shape[1])
    if seconds < 1:
        assert len(guesser.asked) > 300 and guesser.asked[-1] == 7
    else:
        assert len(guesser.asked) < 20 and set(guesser.asked) == {1}


def test_the_assistant_stays_as_it_is(ours: Model, near: Model, checks: Checks) -> None:
    before = (
        near.generation_config.to_dict(),
        {name: each.clone() for name, each in near.state_dict().items()},
    )
    ours.generate(**prompts(1), max_new_tokens=20, do_sample=True, assistant_model=near)
    assert near.generation_config.to_dict() == before[0]
    assert all(torch.equal(each, before[1][name]) for name, each in near.state_dict().items())
    assert checks.calls > 0


REFUSED: dict[str, Any] = {
    "an assistant that is not optimised": lambda ours, near: {"assistant_model": noisy()},
    "weights of both": lambda ours, near: {"assistant_model": near, "assistant_ensemble_weight": 0.5},
    "lookup too": lambda ours, near: {"assistant_model": near, "prompt_lookup_num_tokens": 3},
    "another cache": lambda ours, near: {"assistant_model": near, CACHE: DynamicCache(config=ours.config)},
    "hooks on it": lambda ours, near: {"assistant_model": hooked(noisy())},
}


def hooked(model: Model) -> Model:
    hfopt.optimize(model).register_forward_hook(lambda *args: None)
    return model


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_left_to_transformers(
    kind: str, ours: Model, near: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, loop = [], GenerationMixin._assisted_decoding

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return loop(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", theirs)
    tokens = ours.generate(**prompts(1), **GREEDY, max_new_tokens=12, **REFUSED[kind](ours, near))
    assert tokens.shape[1] == 21
    assert calls


def test_errors_are_those_of_transformers(stock: Model, ours: Model, near: Model) -> None:
    other = llama()
    other.resize_token_embeddings(VOCABULARY + 1)
    hfopt.optimize(other)
    cases: list[dict[str, Any]] = [
        {"assistant_model": other},
        {"assistant_model": near, "num_return_sequences": 2, "do_sample": True},
        {"assistant_model": near, "use_cache": False},
    ]
    for case in cases:
        messages = []
        for model in (stock, ours):
            with pytest.raises((ValueError, RuntimeError)) as caught:
                model.generate(**prompts(1), max_new_tokens=5, **case)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
