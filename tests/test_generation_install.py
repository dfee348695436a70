"""What `install` adds to a model, what survives copies, threads and foreign hooks, and the way back."""

import copy
import functools
import io
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationMixin,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import BaseStreamer

from hfopt.cache import IndirectCache
from hfopt.generation import install, plan, record_latency, uninstall
from tests.generation_cases import (
    CACHE,
    VOCABULARY,
    Model,
    assert_same,
    cache_of,
    gptj,
    llama,
    one_thread,
    prompts,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"num_beams": 4},
    "beam sampling": {"num_beams": 3, "do_sample": True},
}


@pytest.fixture
def model() -> Model:
    return llama()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    letters = [chr(code) for code in range(33, 127)]
    words = ["<pad>", *letters, *(f"{a}{b}" for a in letters for b in letters)][:VOCABULARY]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def tokens_of(model: Model, seed: int = 0, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(**{**prompts(), "max_new_tokens": 12, **arguments})


def rows_read(model: Model, **arguments: Any) -> list[tuple[int, ...]]:
    """The shapes of ids in each forward."""
    shapes: list[tuple[int, ...]] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape))
    )
    tokens_of(model, **arguments)
    hook.remove()
    return shapes


@pytest.mark.parametrize("mode", MODES)
def test_our_loop_runs(model: Model, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(model)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("transformers' own loop")

    monkeypatch.setattr(plan, "refusals", dict)  # which would see that the loops are others now
    for name in ("_sample", "_beam_search"):  # `generate` reads their signatures
        monkeypatch.setattr(GenerationMixin, name, functools.wraps(getattr(GenerationMixin, name))(refuse))
    tokens_of(model, **MODES[mode])


def test_transformers_loop_runs_on_our_cache(model: Model) -> None:
    class Other(type(model)):  # type: ignore[misc]
        def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
            return super()._beam_search(*args, **kwargs)

    other = Other(model.config).eval()
    other.load_state_dict(model.state_dict())
    install(other)
    result = tokens_of(other, num_beams=4, return_dict_in_generate=True)
    assert isinstance(cache_of(result), IndirectCache)
    assert torch.equal(result.sequences, tokens_of(model, num_beams=4))


def test_each_prompt_is_read_once(model: Model) -> None:
    for mode in ("sample", "beam search"):
        copies = {"sample": 3, "beam search": 4}[mode]
        assert rows_read(model, **MODES[mode])[:2] == [(3 * copies, 9), (3 * copies, 1)]
        install(model)
        assert rows_read(model, **MODES[mode])[:2] == [(3, 9), (3 * copies, 1)]
        chunks = rows_read(model, prefill_chunk_size=4, **MODES[mode])
        # one token with a past may be a step, so the last chunk is read in full
        assert chunks[:4] == [(3, 4), (3, 4), (3 * copies, 1), (3 * copies, 1)]
        uninstall(model)


def test_rows_that_differ_are_all_read(model: Model) -> None:
    install(model)
    cache = IndirectCache(model.config, copies=3)
    out = model(input_ids=prompts()["input_ids"], **{CACHE: cache})
    assert out.logits.shape[0] == 3 and cache.copies == 1 and cache.n_rows == 3
    model(input_ids=torch.ones(3, 1, dtype=torch.long), **{CACHE: cache})
    assert cache.get_seq_length() == 10 and cache.n_rows == 3


@pytest.mark.parametrize("return_dict", [True, False])
def test_outputs_are_repeated(model: Model, return_dict: bool) -> None:
    ids = prompts()["input_ids"].repeat_interleave(2, dim=0)
    options = {"return_dict": return_dict, "output_hidden_states": True}
    stock = model(input_ids=ids, **{CACHE: DynamicCache(config=model.config)}, **options)
    install(model)
    cache = IndirectCache(model.config, copies=2)
    ours = model(input_ids=ids, **{CACHE: cache}, **options)
    assert cache.copies == 2 and cache.n_rows == 3
    step = {"input_ids": torch.arange(2, 8)[:, None], "return_dict": return_dict}
    if return_dict:
        assert_same(ours, stock)
        past = cache_of(stock)
    else:
        assert_same(ours[0], stock[0])
        assert_same(ours[2], stock[2])
        past = stock[1]
    next_ours, next_stock = model(**{CACHE: cache}, **step), model(**{CACHE: past}, **step)
    assert cache.n_rows == 6
    assert_same(next_ours[0], next_stock[0])


def test_training_reads_every_row(model: Model) -> None:
    install(model)
    model.train()
    assert rows_read(model, num_beams=4)[0] == (12, 9)


def test_nothing_is_left(model: Model) -> None:
    def state(module: Model) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, dict) else value for name, value in vars(module).items()
        }

    before = state(model)
    install(model)
    install(model)
    assert len(model._forward_hooks) == 1
    uninstall(model)
    assert state(model) == before
    uninstall(model)
    assert state(model) == before


def test_other_hooks_stay(model: Model) -> None:
    calls: list[str] = []
    model.register_forward_hook(lambda *args: calls.append("before"))
    install(model)
    model.register_forward_hook(lambda *args, **kwargs: calls.append("after"), with_kwargs=True)
    uninstall(model)
    model(**prompts())
    assert calls == ["before", "after"] and len(model._forward_hooks_with_kwargs) == 1


def test_what_the_class_overrides_stays() -> None:
    class Own(type(llama())):  # type: ignore[misc]
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return "own"

        def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
            return super()._prepare_cache_for_generation(*args, **kwargs)

    model = Own(llama().config)
    install(model)
    assert model.generate() == "own"
    assert not {"generate", "_prepare_cache_for_generation"} & vars(model).keys()


def copied(model: Model, how: str) -> Model:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_on_its_own(model: Model, how: str) -> None:
    install(model)
    other = copied(model, how)
    assert other.generate._model() is other and other._prepare_cache_for_generation._model() is other
    expected = tokens_of(model, num_beams=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(tokens_of(other, num_beams=3), expected)
    assert rows_read(other, num_beams=3)[0] == (3, 9)
    uninstall(other)
    assert "generate" in vars(model) and "generate" not in vars(other) and not other._forward_hooks
    assert torch.equal(tokens_of(other, num_beams=3), expected)


def test_compiled_model(model: Model) -> None:
    expected = tokens_of(model, max_new_tokens=3, num_beams=2)
    install(model)
    model.compile(backend="eager")  # traces the hooks too
    assert torch.equal(tokens_of(model, max_new_tokens=3, num_beams=2), expected)


def test_threads_share_a_model(model: Model) -> None:
    jobs: list[dict[str, Any]] = [
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 3},
        {},
        {"num_beams": 2, "prefill_chunk_size": 4, "output_scores": True},
    ]
    cases = [{**prompts(2, 5 + i), "max_new_tokens": 40, **job} for i, job in enumerate(jobs)]
    expected = [model.generate(**case) for case in cases]
    install(model)
    results: dict[int, list[Tensor]] = {}

    def work(index: int) -> None:
        results[index] = [model.generate(**cases[index]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, tokens in enumerate(expected):
        assert len(results[index]) == 4 and all(torch.equal(tokens, result) for result in results[index])


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"eos_token_id": list(range(3, VOCABULARY, 5))}]
)
def test_streamer(model: Model, options: dict[str, Any]) -> None:
    stock, ours = Recorder(), Recorder()
    tokens_of(model, streamer=stock, **options)
    install(model)
    tokens = tokens_of(model, streamer=ours, **options)
    assert ours.calls == stock.calls and len(ours.calls) == tokens.shape[1] - 9 + 2


def test_text_streamers(
    model: Model, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    one = prompts(1)
    model.generate(**one, max_new_tokens=12, streamer=TextStreamer(tokenizer, skip_prompt=True))
    printed = capsys.readouterr().out
    install(model)
    model.generate(**one, max_new_tokens=12, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == printed and len(printed) > 12
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30.0)
    thread = threading.Thread(
        target=model.generate, kwargs={**one, "max_new_tokens": 12, "streamer": streamer}
    )
    thread.start()
    assert "".join(streamer) == printed.rstrip("\n")
    thread.join()


def test_beam_search_refuses_a_streamer(model: Model) -> None:
    messages = []
    for change in (uninstall, install):
        change(model)
        with pytest.raises(ValueError, match="streamer") as raised:
            tokens_of(model, num_beams=2, streamer=Recorder())
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("mode", MODES)
def test_stop_strings(model: Model, tokenizer: PreTrainedTokenizerFast, mode: str) -> None:
    word = tokenizer.decode(tokens_of(model, seed=2, **MODES[mode])[0, 9 + 5])
    stock = tokens_of(model, seed=2, stop_strings=[word], tokenizer=tokenizer, **MODES[mode])
    install(model)
    ours = tokens_of(model, seed=2, stop_strings=[word], tokenizer=tokenizer, **MODES[mode])
    assert torch.equal(ours, stock)
    with pytest.raises(ValueError, match="tokenizer"):
        tokens_of(model, stop_strings=[word], **MODES[mode])
    assert torch.equal(tokens_of(model, tokenizer=tokenizer), tokens_of(model))


def test_typos_are_still_found(model: Model) -> None:
    install(model)
    with pytest.raises(ValueError, match="max_tokens"):
        tokens_of(model, max_tokens=3)


class TestLatency:
    @pytest.fixture(params=["stock", "installed"])
    def timed(self, request: pytest.FixtureRequest, model: Model) -> Iterator[Model]:
        if request.param == "installed":
            install(model)
        before = dict(vars(model))
        yield model
        assert vars(model) == before

    @pytest.mark.parametrize("mode", MODES)
    def test_one_entry_a_token(self, timed: Model, mode: str) -> None:
        expected = tokens_of(timed, return_dict_in_generate=True, output_scores=True, **MODES[mode])
        with record_latency(timed) as timings:
            for _ in range(2):
                result = tokens_of(timed, return_dict_in_generate=True, output_scores=True, **MODES[mode])
        assert_same(result, expected)
        assert len(timings.first) == 2 and len(timings.next) == 22
        assert all(seconds > 0 for seconds in timings.first + timings.next)
        tokens_of(timed)
        assert len(timings.first) == 2

    def test_blocks_that_overlap(self, timed: Model) -> None:
        first, second = record_latency(timed), record_latency(timed)
        one, two = first.__enter__(), second.__enter__()
        tokens_of(timed)
        first.__exit__(None, None, None)
        tokens_of(timed)
        second.__exit__(None, None, None)
        tokens_of(timed)
        assert (len(one.first), len(two.first)) == (1, 2)

    def test_criteria_of_the_caller_and_threads(self, timed: Model) -> None:
        def stop(input_ids: Tensor, scores: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 13)

        with record_latency(timed) as timings:
            threads = [
                threading.Thread(target=tokens_of, args=(timed,), kwargs={"stopping_criteria": [stop]})
                for _ in range(3)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(timings.first) == 3 and len(timings.next) == 9

    def test_a_failure_leaves_nothing(self, timed: Model) -> None:
        with pytest.raises(ValueError), record_latency(timed) as timings:
            tokens_of(timed, max_tokens=3)
        assert timings.first == timings.next == []

    def test_tokens_accepted_together(self, timed: Model) -> None:
        with record_latency(timed) as timings:
            tokens = timed.generate(**prompts(1), max_new_tokens=30, prompt_lookup_num_tokens=4)
        assert tokens.shape == (1, 39) and len(timings.first) == 1 and 0 < len(timings.next) <= 29


def test_another_family_keeps_its_own_methods() -> None:
    model, untouched = gptj(), gptj()
    install(model)
    assert not {"generate", "_prepare_cache_for_generation"} & vars(untouched).keys()
    assert torch.equal(tokens_of(model, num_beams=2), tokens_of(untouched, num_beams=2))
