"""Streamers: transformers' own are given tokens soon after they are made, those of a user each one before the next is made.

And clients that go away in the middle: the cache is as long as it is behind transformers' own loop.
"""

import asyncio
import copy
import io
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AsyncTextIteratorStreamer,
    DynamicCache,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import BaseStreamer

from hfopt import host
from hfopt.cache import IndirectCache
from hfopt.program.run import Run
from tests.generation_cases import CACHE, Model, llama, mistral, needs_programs, one_thread, opt, prompts
from tests.step_cases import proven
from tests.test_generation_text import tokenizer
from tests.test_step_several import calls, steady

__all__ = ["calls", "steady", "tokenizer"]  # fixtures
pytestmark = [needs_programs, pytest.mark.usefixtures(one_thread.__name__)]

N_PROMPT, N_NEW = 9, 40
WINDOW = 16
MODELS: dict[str, Callable[..., Model]] = {
    "llama": llama,
    "opt": opt,
    "window": lambda: mistral(sliding_window=WINDOW, max_position_embeddings=256),
}


@pytest.fixture(scope="module", params=MODELS)
def stock(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def ours(stock: Model) -> Model:
    return proven(copy.deepcopy(stock))


def prompt() -> dict[str, Any]:
    """One row, of which two tokens are padding."""
    given = prompts(1, N_PROMPT)
    given["attention_mask"][:, :2] = 0
    given["input_ids"] = given["input_ids"] * given["attention_mask"]
    return given


def generated(model: Model, **options: Any) -> Any:
    return model.generate(**{**prompt(), "max_new_tokens": N_NEW, "do_sample": False, **options})


class Gone(Exception):
    """The client is not there any more."""


class Printer(TextStreamer):
    """Of a user, though it does what transformers' does."""


class Recorder(BaseStreamer):
    """Raises when it is given the prompt and so many tokens more."""

    def __init__(self, n_tokens: int, error: BaseException) -> None:
        self.n_left, self.error = n_tokens + 1, error

    def put(self, value: Tensor) -> None:
        self.n_left -= 1
        if self.n_left < 0:
            raise self.error

    def end(self) -> None:
        pass


def with_own_end(tokenizer: PreTrainedTokenizerFast) -> TextStreamer:
    """transformers' own class, but its texts go to a function of the user."""
    streamer: Any = TextIteratorStreamer(tokenizer)
    streamer.on_finalized_text = lambda text, stream_end=False: None
    return streamer


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        (0.03, [1] * 39),
        (0.012, [1] + [2] * 19),
        (0.006, [1, 2] + [4] * 9),
        (0.0001, [1, 2, 4, 8, 16, 8]),
    ],
)
def test_no_token_waits_long(
    tokenizer: PreTrainedTokenizerFast,
    seconds: float,
    sizes: list[int],
    steady: Callable[[float], None],
    calls: list[int],
) -> None:
    """The first of a call waits for all others; its steps are as many as fit into 20 ms, by the time that steps take."""
    model = proven(llama())
    calls.clear()
    steady(seconds)
    generated(model, streamer=TextIteratorStreamer(tokenizer))
    assert calls == sizes and all((size - 1) * seconds <= 0.02 for size in sizes)


def test_who_looks_at_each_token(
    ours: Model, tokenizer: PreTrainedTokenizerFast, steady: Callable[[float], None], calls: list[int]
) -> None:
    steady(0.0001)
    for streamer in (Printer(tokenizer), with_own_end(tokenizer), Recorder(N_NEW, Gone())):
        calls.clear()
        generated(ours, streamer=streamer)
        assert calls == [1] * (N_NEW - 1)


def test_whose_code_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    assert host.only_hands_on(TextStreamer(tokenizer, skip_prompt=True))
    assert not host.only_hands_on(Printer(tokenizer))
    assert not host.only_hands_on(with_own_end(tokenizer))
    assert not host.only_hands_on(Recorder(0, Gone()))


async def _read(model: Model, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=generated, args=(model,), kwargs={"streamer": streamer})
    thread.start()
    pieces = [text async for text in streamer]
    thread.join()
    return pieces


def test_texts(
    stock: Model, ours: Model, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    printed, iterated, awaited = [], [], []
    for model in (stock, ours):
        generated(model, streamer=TextStreamer(tokenizer))
        printed.append(capsys.readouterr().out)
        streamer = TextIteratorStreamer(tokenizer)
        generated(model, streamer=streamer)
        iterated.append(list(streamer))
        awaited.append(asyncio.run(_read(model, tokenizer)))
    assert printed[0] == printed[1] and len(printed[0]) > N_NEW
    assert iterated[0] == iterated[1] and len(iterated[0]) == N_NEW + 2
    assert awaited[0] == awaited[1] and len(awaited[0]) == N_NEW + 1


# ---- clients that go away ------------------------------------------------------------------------------------------


class _Pipe(io.StringIO):
    """Of whose reader nothing is left after some texts."""

    n_left = 26  # two for each token

    def write(self, text: str) -> int:
        self.n_left -= 1
        if self.n_left < 0:
            raise BrokenPipeError
        return super().write(text)


def _closed(tokenizer: PreTrainedTokenizerFast) -> Any:
    async def made() -> Any:
        return AsyncTextIteratorStreamer(tokenizer)

    return asyncio.run(made())


def _full(tokenizer: PreTrainedTokenizerFast) -> Any:
    streamer = TextIteratorStreamer(tokenizer, timeout=0.01)
    streamer.text_queue = queue.Queue(maxsize=12)
    return streamer


GONE: dict[str, tuple[Callable[[PreTrainedTokenizerFast], Any], type[BaseException]]] = {
    "a full queue": (_full, queue.Full),
    "a broken pipe": (TextStreamer, BrokenPipeError),
    "a closed loop": (_closed, RuntimeError),
    "a streamer of the user": (lambda tokenizer: Recorder(11, Gone()), Gone),
    "Ctrl-C": (lambda tokenizer: Recorder(11, KeyboardInterrupt()), KeyboardInterrupt),
}


@pytest.mark.parametrize("case", GONE)
def test_the_cache_behind_a_client_that_is_gone(
    stock: Model,
    ours: Model,
    tokenizer: PreTrainedTokenizerFast,
    case: str,
    calls: list[int],
    steady: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, error = GONE[case]
    steady(0.0001)
    caches = [DynamicCache(config=stock.config), IndirectCache(ours.config)]
    for model, cache in zip((stock, ours), caches, strict=True):
        calls.clear()
        with monkeypatch.context() as patched:
            if case == "a broken pipe":
                patched.setattr(sys, "stdout", _Pipe())
            with pytest.raises(error):
                generated(model, streamer=make(tokenizer), **{CACHE: cache})
    length = caches[0].get_seq_length()
    assert caches[1].get_seq_length() == length
    if case != "a closed loop":  # which fails with the prompt
        assert length > N_PROMPT + 8
    if make in (_full, TextStreamer):
        assert sum(calls) > length - N_PROMPT  # tokens were made ahead
    whole = generated(stock)[:, : length + 1]
    mask = torch.ones_like(whole)
    mask[:, :2] = 0
    goes_on = {"input_ids": whole, "attention_mask": mask, "max_new_tokens": 8}
    found = [
        generated(model, **goes_on, **{CACHE: cache})
        for model, cache in zip((stock, ours), caches, strict=True)
    ]
    assert torch.equal(*found)


def test_a_call_that_is_interrupted(ours: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the kernel, where Python answers Ctrl-C."""
    sizes: list[int] = []
    original = Run.choose

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        chosen = original(*args, **kwargs)
        sizes.append(len(chosen))
        if len(chosen) > 2:
            raise KeyboardInterrupt
        return chosen

    monkeypatch.setattr(Run, "choose", interrupted)
    cache = IndirectCache(ours.config)
    with pytest.raises(KeyboardInterrupt):
        generated(ours, **{CACHE: cache})
    assert cache.get_seq_length() == N_PROMPT + sum(sizes[:-1])
