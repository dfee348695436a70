"""Requests as servers make them: stop strings, healed prompts, allowed tokens, limits of time, scores.

All of them run in our loops, and a program makes their steps.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria, TextStreamer

import hfopt
from hfopt import host
from hfopt.generation import plan
from tests.generation_cases import (
    FAMILIES,
    VOCABULARY,
    Model,
    assert_same,
    llama,
    needs_programs,
    one_thread,
    prompts,
)
from tests.step_cases import optimized, passes, prove, rehearsals

__all__ = ["passes", "rehearsals"]  # fixtures
pytestmark = pytest.mark.usefixtures(one_thread.__name__)

LETTERS = "abcdefghijklm"
N_PROMPT, N_NEW = 9, 14
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beam search": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Its texts are read letter by letter, and it has a token for each pair of letters too."""
    words = ["<pad>", "<s>", *LETTERS, *(f"{a}{b}" for a in LETTERS for b in LETTERS)]
    words += [f"{number:02d}" for number in range(VOCABULARY - len(words))]
    made = Tokenizer(BPE({word: index for index, word in enumerate(words)}, merges=[]))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module", params=["llama", "opt"])
def stock(request: pytest.FixtureRequest) -> Model:
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def ours(stock: Model) -> Model:
    model = optimized(copy.deepcopy(stock))
    if host.missing() is None:
        prove(model)
    return model


def generated(model: Model, given: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(**{**prompts(3, N_PROMPT), "max_new_tokens": N_NEW, **(given or {}), **options})


def texts(tokenizer: PreTrainedTokenizerFast, tokens: Any) -> list[str]:
    """What follows the prompts; beams without end tokens are filled with -1."""
    return [str(tokenizer.decode(row[row >= 0])) for row in tokens[:, N_PROMPT:]]


def letters() -> dict[str, Any]:
    """Prompts of letters, of which the second is padded; tokens of letters begin at 2."""
    ids = torch.tensor([[2, 9, 5, 7, 4, 12, 3, 8, 6], [0, 0, 0, 4, 11, 3, 13, 2, 10]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


class TestStopStrings:
    @pytest.mark.parametrize("ends", [None, list(range(40, 44))], ids=["no end", "ends"])
    @pytest.mark.parametrize("mode", MODES)
    def test_across_tokens(
        self,
        stock: Model,
        ours: Model,
        tokenizer: PreTrainedTokenizerFast,
        mode: str,
        ends: list[int] | None,
        passes: list[int],
    ) -> None:
        options: dict[str, Any] = {**MODES[mode], "eos_token_id": ends}
        free = generated(stock, **options)
        pieces = [str(tokenizer.decode(token)) for token in free[0, N_PROMPT + 2 : N_PROMPT + 4]]
        stop = pieces[0][-1] + pieces[1]
        assert stop not in tokenizer.get_vocab()
        options |= {"stop_strings": [stop, "a string that never comes"], "tokenizer": tokenizer}
        expected = generated(stock, **options)
        passes.clear()
        found = generated(ours, **options)
        assert torch.equal(found, expected)
        assert stop in texts(tokenizer, found)[0] or "num_beams" in options
        if host.missing() is None:
            assert passes == []

    def test_all_rows_stop(self, stock: Model, ours: Model, tokenizer: PreTrainedTokenizerFast) -> None:
        stops: list[str] = [text[6:10] for text in texts(tokenizer, generated(stock))]
        options: dict[str, Any] = {"stop_strings": stops, "tokenizer": tokenizer}
        found = generated(ours, **options)
        assert torch.equal(found, generated(stock, **options)) and found.shape[1] < N_PROMPT + N_NEW

    def test_in_the_configuration(
        self, stock: Model, ours: Model, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        config = copy.deepcopy(stock.generation_config)
        config.stop_strings = [texts(tokenizer, generated(stock))[0][5:8]]
        options = {"generation_config": config, "tokenizer": tokenizer, "max_new_tokens": N_NEW}
        assert torch.equal(generated(ours, **options), generated(stock, **options))

    def test_without_a_tokenizer(self, stock: Model, ours: Model, tokenizer: PreTrainedTokenizerFast) -> None:
        generated(ours, stop_strings="ab", tokenizer=tokenizer)  # which the next request does not find
        messages = []
        for model in (stock, ours):
            with pytest.raises(ValueError, match="tokenizer") as raised:
                generated(model, stop_strings="ab")
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


def test_a_criterion_that_ends_single_rows(stock: Model, ours: Model) -> None:
    """Without end tokens, rows that have stopped go on until all have."""

    class First(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.arange(len(input_ids)) < input_ids.shape[1] - N_PROMPT - 3

    found = generated(ours, stopping_criteria=[First()])
    assert torch.equal(found, generated(stock, stopping_criteria=[First()]))
    assert found.shape[1] == N_PROMPT + 6


class TestHealing:
    @pytest.mark.parametrize("mode", MODES)
    def test_prompts_end_otherwise(
        self, stock: Model, ours: Model, tokenizer: PreTrainedTokenizerFast, mode: str, passes: list[int]
    ) -> None:
        options = {**MODES[mode], "token_healing": True, "tokenizer": tokenizer}
        expected = generated(stock, letters(), **options)
        passes.clear()
        found = generated(ours, letters(), **options)
        assert torch.equal(found, expected)
        healed, given = found[:, :N_PROMPT], letters()["input_ids"]
        assert torch.equal(healed[:, :-1], given[:, :-1]) and (healed[:, -1] != given[:, -1]).any()
        if host.missing() is None:
            assert passes == []

    def test_with_stop_strings_and_a_streamer(
        self,
        stock: Model,
        ours: Model,
        tokenizer: PreTrainedTokenizerFast,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        one = {name: each[:1] for name, each in letters().items()}
        free = generated(stock, one, token_healing=True, tokenizer=tokenizer)
        options = {
            "token_healing": True,
            "stop_strings": texts(tokenizer, free)[0][6:9],
            "tokenizer": tokenizer,
        }
        found, printed = [], []
        for model in (stock, ours):
            found.append(generated(model, one, streamer=TextStreamer(tokenizer), **options))
            printed.append(capsys.readouterr().out)
        assert torch.equal(*found) and printed[0] == printed[1] and found[0].shape[1] < free.shape[1]

    def test_without_a_tokenizer(self, stock: Model, ours: Model) -> None:
        for model in (stock, ours):
            with pytest.raises(ValueError, match="token healing"):
                generated(model, letters(), token_healing=True)


@needs_programs
class TestMethods:
    """The two that are given the tokenizer."""

    NAMES = host.CRITERIA, host.HEAL

    def test_copies(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = hfopt.optimize(llama())
        options: dict[str, Any] = {"stop_strings": "a", "token_healing": True, "tokenizer": tokenizer}
        expected = generated(model, letters(), **options)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(vars(other)[name]._model() is other for name in self.NAMES)
            assert torch.equal(generated(other, letters(), **options), expected)
            hfopt.restore(other)
            assert not set(self.NAMES) & vars(other).keys()
        assert set(self.NAMES) <= vars(model).keys()

    @pytest.mark.parametrize("name", NAMES)
    def test_those_of_a_class_stay(
        self, name: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stock = llama()
        kind = type(stock)
        theirs = getattr(kind, name)
        own = type("Own", (kind,), {name: lambda self, *args, **kwargs: theirs(self, *args, **kwargs)})
        stock.__class__ = own
        model = hfopt.optimize(copy.deepcopy(stock))
        assert name not in vars(model)
        options: dict[str, Any] = {
            "tokenizer": tokenizer,
            **({"stop_strings": "a"} if name == host.CRITERIA else {"token_healing": True}),
        }
        assert plan.plan_of(model, options).loop is None
        assert plan.plan_of(model, {}).loop is not None
        assert torch.equal(generated(model, letters(), **options), generated(stock, letters(), **options))

    def test_a_release_that_gives_them_something_else(
        self, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = hfopt.optimize(llama())
        options: dict[str, Any] = {"tokenizer": tokenizer, "stop_strings": "a"}
        assert plan.plan_of(model, options).loop is not None
        monkeypatch.setattr(
            type(model), host.CRITERIA, lambda self, settings, criteria, processor=None: criteria
        )
        assert plan.plan_of(model, options).loop is None


ALL: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
SERVED: dict[str, dict[str, Any]] = {
    "allowed tokens": {"prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1]) % 7 + 3 + row, 50, 51]},
    "time": {"max_time": 3600.0},
    "no time": {"max_time": 0.0},
    "ends": {"eos_token_id": list(range(40, 50))},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "logits": {"return_dict_in_generate": True, "output_logits": True},
    "all": {"max_time": 3600.0, "repetition_penalty": 1.2, "prefix_allowed_tokens_fn": lambda row, ids: [3, 9, 60], **ALL},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("request_of", SERVED)
def test_requests(stock: Model, ours: Model, request_of: str, mode: str, passes: list[int]) -> None:
    options = {**SERVED[request_of], **MODES[mode]}
    expected = generated(stock, **options)
    if host.missing() is None:
        assert plan.plan_of(ours, {**prompts(3, N_PROMPT), **options}).loop is not None
    passes.clear()
    assert_same(generated(ours, **options), expected)
    if host.missing() is None:
        assert passes == []
