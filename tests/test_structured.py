"""Answers of a given form: JSON by a schema, regular expressions and grammars, in our loops and in transformers'."""

import json
import re
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LogitsProcessor

import hfopt
from hfopt.errors import InvalidInput
from hfopt.generation.decoding import Decoding
from hfopt.generation.derivation import Derivation, Followed
from hfopt.generation.speculation import InTurn, Speculation, StepCosts
from tests.generation_cases import FAMILIES, Model, llama, needs_programs, one_thread
from tests.speculation_cases import Checks, steady_costs

llguidance = pytest.importorskip("llguidance")
pytestmark = pytest.mark.usefixtures(one_thread.__name__)

END, PAD = 0, 3
LENGTH = 9  # of the prompts
FIELDS: dict[str, Any] = {
    "name": {"type": "string", "maxLength": 8},
    "age": {"type": "integer", "minimum": 0, "maximum": 120},
    "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
}
SCHEMA = {"type": "object", "properties": FIELDS, "required": [*FIELDS], "additionalProperties": False}
PATTERN = "(north|south)-[0-9]{1,3}(, (east|west)-[a-f]{2})?"
SUM = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,2}/'
MODES: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "top_k": 40},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": True, "num_beams": 2},
    {"do_sample": True, "num_return_sequences": 2},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(hfopt.embedded_model())


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    steady_costs(monkeypatch)
    return Checks(monkeypatch)


def _model(make: Any = llama, **changes: Any) -> Model:
    """With a few tokens more than the tokenizer has."""
    return make(vocab_size=1800, eos_token_id=END, pad_token_id=PAD, **changes)


def _prompts(n_rows: int, length: int = LENGTH) -> dict[str, Tensor]:
    """Distinct tokens, rows 1, 2, ... padded on the left by 3, 6, ..."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.stack([torch.randperm(1700, generator=generator)[:length] + 10 for _ in range(n_rows)])
    shown = torch.ones_like(ids)
    for row in range(n_rows):
        shown[row, : min(3 * row, length - 1)] = 0
    return {"input_ids": torch.where(shown == 1, ids, PAD), "attention_mask": shown}


def _answers(tokenizer: Any, tokens: Tensor) -> list[str]:
    """What stands between the prompt and the end of each row, which has to have one."""
    texts = []
    for row in tokens[:, LENGTH:].tolist():
        assert END in row, "it has been cut off"
        place = row.index(END)
        assert set(row[place + 1 :]) <= {PAD}
        texts.append(tokenizer.decode(row[:place]))
    return texts


def _check_json(text: str) -> None:
    answer = json.loads(text)
    assert list(answer) == [*FIELDS]
    assert len(answer["name"]) <= 8 and 0 <= answer["age"] <= 120 and type(answer["age"]) is int
    assert set(answer["tags"]) <= {"red", "green"} and len(answer["tags"]) <= 3
    assert text == json.dumps(answer, ensure_ascii=False) or "\\" in text


# ---- whole requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FAMILIES))
def test_answers_are_json_and_those_of_transformers(name: str, tokenizer: Any, checks: Checks) -> None:
    stock, ours = _model(FAMILIES[name]), hfopt.optimize(_model(FAMILIES[name]))
    grammar = hfopt.Grammar.json(SCHEMA, tokenizer)
    for n_rows in (1, 3):
        for mode in MODES:
            arguments = {**_prompts(n_rows), **mode, "max_new_tokens": 80, "logits_processor": [grammar]}
            torch.manual_seed(n_rows)
            expected = stock.generate(**arguments)
            torch.manual_seed(n_rows)
            tokens = ours.generate(**arguments)
            assert torch.equal(tokens, expected)
            for answer in _answers(tokenizer, tokens):
                _check_json(answer)
    if ours.hfopt.by_module is None:
        assert checks.guessed == checks.right > 20  # what is forced is always right


@needs_programs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("do_sample", [False, True])
def test_guesses_change_nothing(
    dtype: torch.dtype, do_sample: bool, tokenizer: Any, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hfopt.optimize(_model().to(dtype))
    arguments = {**_prompts(3), "do_sample": do_sample, "max_new_tokens": 80, "return_dict_in_generate": True,
                 "output_scores": True, "output_logits": True,
                 "logits_processor": [hfopt.Grammar.json(SCHEMA, tokenizer)]}  # fmt: skip
    torch.manual_seed(2)
    guessed = model.generate(**arguments)
    assert checks.right > 0
    monkeypatch.setattr(Derivation, "guess", lambda derivation, n: None)
    before = checks.guessed
    torch.manual_seed(2)
    plain = model.generate(**arguments)
    assert checks.guessed == before
    assert torch.equal(plain.sequences, guessed.sequences)
    for kind in ("logits", "scores"):
        for one, other in zip(plain[kind], guessed[kind], strict=True):
            assert torch.equal(one, other)
    # what the model says is left as it was
    assert all(bool(torch.isfinite(each).all()) for each in plain["logits"])
    assert all(bool(torch.isinf(each).any()) for each in plain["scores"])


@pytest.mark.parametrize("is_ours", [False, True])
def test_regular_expressions_and_grammars(is_ours: bool, tokenizer: Any) -> None:
    model = hfopt.optimize(_model()) if is_ours else _model()
    for seed in range(3):
        torch.manual_seed(seed)
        arguments = {**_prompts(4), "do_sample": True, "max_new_tokens": 60}
        pattern = hfopt.Grammar.regex(PATTERN, tokenizer)
        for answer in _answers(tokenizer, model.generate(**arguments, logits_processor=[pattern])):
            assert re.fullmatch(PATTERN, answer)
        sums = hfopt.Grammar.lark(SUM, tokenizer)
        tokens = model.generate(**arguments, temperature=0.1, logits_processor=[sums])
        for row in tokens[:, LENGTH:].tolist():
            answer = tokenizer.decode([token for token in row if token not in (END, PAD)])
            assert re.fullmatch("[0-9+()]*", answer)
            if END in row:
                assert answer.count("(") == answer.count(")") and not answer.endswith("+")


def test_whitespace_of_any_kind(tokenizer: Any) -> None:
    (brace,) = tokenizer.encode("{", add_special_tokens=False)
    prompt, begun = torch.tensor([[5]]), torch.tensor([[5, brace]])
    texts = []
    for whitespace in (False, True):
        grammar = hfopt.Grammar.json(SCHEMA, tokenizer, whitespace=whitespace)
        grammar(prompt, torch.zeros(1, 1800))
        allowed = (grammar(begun, torch.zeros(1, 1800)) == 0).nonzero()[:, 1]
        texts.append([tokenizer.decode([each]) for each in allowed.tolist()])
    assert texts[0] == ['"'] and '"' in texts[1] and " " in texts[1] and len(texts[1]) > 2


def test_end_tokens_of_the_model(tokenizer: Any) -> None:
    """An answer may end with each of those that are given."""
    grammar = hfopt.Grammar.regex("ab", tokenizer, eos_token_id=[END, 7])
    prompt = torch.tensor([[5]])
    ids = torch.tensor([[5, *tokenizer.encode("ab", add_special_tokens=False)]])
    for length in range(1, ids.shape[1] + 1):
        scores = grammar(ids[:, :length], torch.zeros(1, 1800))
    assert prompt.shape[1] < ids.shape[1]
    assert (scores == 0).nonzero()[:, 1].tolist() == [END, 7]
    model = hfopt.optimize(_model())
    tokens = model.generate(
        **_prompts(2), logits_processor=[grammar], eos_token_id=[END, 7], max_new_tokens=9, do_sample=True
    )
    for row in tokens[:, LENGTH:].tolist():
        assert tokenizer.decode([each for each in row if each not in (END, 7, PAD)]) == "ab"


class _Longer(LogitsProcessor):
    """Wants digits, whatever the grammar says."""

    def __init__(self, token: int) -> None:
        self._token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self._token] = torch.inf
        return scores


def test_other_processors_may_decide_otherwise(tokenizer: Any, checks: Checks) -> None:
    """A row that has left its grammar may only end, and no guess overrules what comes behind the grammar."""
    stock, ours = _model(), hfopt.optimize(_model())
    grammar = hfopt.Grammar.json(SCHEMA, tokenizer)
    for order in ([grammar, _Longer(40)], [_Longer(40), grammar]):
        arguments = {**_prompts(2), "do_sample": False, "max_new_tokens": 40, "logits_processor": order}
        assert torch.equal(ours.generate(**arguments), stock.generate(**arguments))
    tokens = ours.generate(
        **_prompts(1), do_sample=False, max_new_tokens=5, logits_processor=[grammar, _Longer(40)]
    )
    assert tokens[0, LENGTH:].tolist() == [40] * 5


class _Shy(hfopt.Grammar):
    """One of the user, that allows some tokens less."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = super().__call__(input_ids, scores)
        place = input_ids.shape[1] % 97
        return scores.masked_fill(
            (scores.isfinite().cumsum(1) > 50) & (torch.arange(1800) % 97 == place), -torch.inf
        )


def test_a_subclass_is_a_processor_of_the_user(tokenizer: Any, checks: Checks) -> None:
    stock, ours = _model(), hfopt.optimize(_model())
    arguments = {**_prompts(2), "do_sample": False, "max_new_tokens": 80,
                 "logits_processor": [_Shy.json(SCHEMA, tokenizer)]}  # fmt: skip
    tokens = ours.generate(**arguments)
    assert torch.equal(tokens, stock.generate(**arguments)) and checks.guessed == 0
    for answer in _answers(tokenizer, tokens):
        _check_json(answer)


@needs_programs
def test_with_lookup(tokenizer: Any, checks: Checks) -> None:
    stock, ours = _model(), hfopt.optimize(_model(), speculation="lookup")
    grammar = hfopt.Grammar.json(SCHEMA, tokenizer)
    for n_rows in (1, 2):
        arguments = {
            **_prompts(n_rows),
            "do_sample": False,
            "max_new_tokens": 80,
            "logits_processor": [grammar],
        }
        assert torch.equal(ours.generate(**arguments), stock.generate(**arguments))
    assert checks.right > 0


def test_assisted_decoding_of_transformers(tokenizer: Any) -> None:
    """It asks for scores behind guessed tokens, and takes some of those back."""
    stock = _model()
    arguments = {**_prompts(1), "do_sample": False, "max_new_tokens": 80,
                 "logits_processor": [hfopt.Grammar.json(SCHEMA, tokenizer)]}  # fmt: skip
    expected = stock.generate(**arguments)
    assert torch.equal(stock.generate(**arguments, prompt_lookup_num_tokens=4), expected)
    assistant = _model(num_hidden_layers=1)
    assert torch.equal(stock.generate(**arguments, assistant_model=assistant), expected)


def test_requests_in_a_row_know_nothing_of_each_other(tokenizer: Any) -> None:
    grammar = hfopt.Grammar.json(SCHEMA, tokenizer)
    for model in (_model(), hfopt.optimize(_model())):
        arguments = {**_prompts(2), "do_sample": False, "logits_processor": [grammar]}
        whole = model.generate(**arguments, max_new_tokens=80)
        model.generate(**arguments, max_new_tokens=4)  # cut off
        assert torch.equal(model.generate(**arguments, max_new_tokens=80), whole)
        longer = _prompts(2, LENGTH + 4)
        tokens = model.generate(**longer, do_sample=False, logits_processor=[grammar], max_new_tokens=80)
        _answers(tokenizer, tokens[:, 4:])


@pytest.mark.parametrize("is_ours", [False, True])
def test_threads_share_a_grammar(is_ours: bool, tokenizer: Any) -> None:
    model = hfopt.optimize(_model()) if is_ours else _model()
    grammar = hfopt.Grammar.json(SCHEMA, tokenizer)
    cases = [
        {**_prompts(n), "do_sample": False, "max_new_tokens": 80, "logits_processor": [grammar]}
        for n in (1, 2, 3)
    ]
    expected = [model.generate(**each) for each in cases]
    results: dict[int, list[Tensor]] = {}

    def work(place: int) -> None:
        results[place] = [model.generate(**cases[place]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for place in range(3):
        assert len(results[place]) == 4
        assert all(torch.equal(each, expected[place]) for each in results[place])


class _PerRequest(LogitsProcessor):
    """As xgrammar's and llguidance's own: matchers of rows in an object for one request, scores changed in place."""

    def __init__(self, grammar: str, vocabulary: Any, n_rows: int) -> None:
        self._matchers = [llguidance.LLMatcher(vocabulary, grammar, log_level=0) for _ in range(n_rows)]
        self._is_prompt = True
        self.n_calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        from llguidance.numpy import (
            allocate_token_bitmask,
            apply_token_bitmask_inplace,
            fill_next_token_bitmask,
        )

        assert len(input_ids) == len(scores) == len(self._matchers)
        self.n_calls += 1
        mask = allocate_token_bitmask(len(scores), scores.shape[1])
        for row, matcher in enumerate(self._matchers):
            if not (self._is_prompt or matcher.is_stopped()):
                matcher.consume_token(int(input_ids[row, -1]))
            fill_next_token_bitmask(matcher, mask, row)
        self._is_prompt = False
        apply_token_bitmask_inplace(scores.numpy(), mask)
        return scores


@needs_programs
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 5}], ids=["plain", "lookup"])
def test_processors_of_others_run_in_our_loop(
    options: dict[str, Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llguidance.hf import from_tokenizer

    steps = []
    logits = Decoding.logits

    def counted(decoding: Decoding, tokens: np.ndarray, *args: Any) -> Tensor | None:
        made = logits(decoding, tokens, *args)
        steps.append((len(tokens), made is not None))
        return made

    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA))
    vocabulary = from_tokenizer(tokenizer, n_vocab=1800)
    stock, ours = _model(), hfopt.optimize(_model())
    monkeypatch.setattr(Decoding, "logits", counted)
    for n_rows in (1, 3):
        tokens = []
        for model, more in ((stock, {}), (ours, options)):
            processor = _PerRequest(grammar, vocabulary, n_rows)
            tokens.append(
                model.generate(
                    **_prompts(n_rows),
                    **more,
                    do_sample=False,
                    max_new_tokens=40,
                    logits_processor=[processor],
                )
            )
        assert torch.equal(*tokens)
        assert steps == [(n_rows, True)] * (processor.n_calls - 1)
        steps.clear()


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema, words",
    [
        ({"type": "foo"}, "Invalid type: foo"),
        ({"$ref": "#/nowhere"}, "/nowhere"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"if": {}}, "Unimplemented keys"),
        ("{", "is no dictionary of JSON"),
        ("[]", "is no dictionary of JSON"),
        ({"default": object()}, "is no dictionary of JSON"),
        (5, "is no dictionary of JSON"),
        (None, "is no dictionary of JSON"),
    ],
)
def test_a_bad_schema(schema: Any, words: str, tokenizer: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^schema.*") as error:
        hfopt.Grammar.json(schema, tokenizer)
    assert words in str(error.value)


def test_other_bad_arguments(tokenizer: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^pattern='\('"):
        hfopt.Grammar.regex("(", tokenizer)
    with pytest.raises(InvalidInput, match=r"^pattern is a int"):
        hfopt.Grammar.regex(3, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"^grammar='start: foo'"):
        hfopt.Grammar.lark("start: foo", tokenizer)
    with pytest.raises(InvalidInput, match=r"^tokenizer is a str"):
        hfopt.Grammar.regex("a", "path")
    for ends in (99999, [], -1, [1.5]):
        with pytest.raises(InvalidInput, match=r"^eos_token_id="):
            hfopt.Grammar.regex("a", tokenizer, eos_token_id=ends)  # type: ignore[arg-type]
    endless = AutoTokenizer.from_pretrained(hfopt.embedded_model())
    endless.eos_token = None
    with pytest.raises(InvalidInput, match=r"^eos_token_id=None"):
        hfopt.Grammar.regex("a", endless)


def test_any_json_and_text_of_a_schema(tokenizer: Any) -> None:
    schemas: list[Any] = [{}, json.dumps(SCHEMA)]
    for schema in schemas:
        assert isinstance(hfopt.Grammar.json(schema, tokenizer), hfopt.Grammar)


def test_a_token_that_is_added_later(tokenizer: Any) -> None:
    grown = AutoTokenizer.from_pretrained(hfopt.embedded_model())
    hfopt.Grammar.regex("a", grown)
    grown.add_tokens(["<answer>"])
    grammar = hfopt.Grammar.regex("<answer>", grown)
    allowed = (grammar(torch.tensor([[5]]), torch.zeros(1, 1800)) == 0).nonzero()[:, 1].tolist()
    assert len(grown) - 1 in allowed or allowed == grown.encode("<")[:1]


def test_a_model_with_fewer_logits_than_tokens(tokenizer: Any) -> None:
    grammar = hfopt.Grammar.regex("[ab]", tokenizer)
    assert grammar(torch.tensor([[5]]), torch.zeros(1, 900)).shape == (1, 900)
    with pytest.raises(InvalidInput, match="10 logits"):
        grammar(torch.tensor([[5]]), torch.zeros(1, 10))


def test_without_llguidance(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (
        lambda: hfopt.Grammar.json({}, tokenizer),
        lambda: hfopt.Grammar.regex("a", tokenizer),
        lambda: hfopt.Grammar.lark('start: "a"', tokenizer),
    ):
        with pytest.raises(ImportError, match=r'pip install "hfopt\[structured\]"'):
            make()


# ---- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scores(dtype: torch.dtype, tokenizer: Any) -> None:
    grammar = hfopt.Grammar.regex("[a-z]+", tokenizer)
    derivation = grammar._begin(2)
    scores = torch.randn(2, 1800).to(dtype)
    before = scores.clone()
    result = derivation(torch.zeros(2, 0, dtype=torch.int64), scores)
    assert torch.equal(scores, before) and result.dtype is dtype
    kept = ~result.isinf()
    assert torch.equal(result[kept], scores[kept]) and bool((result[~kept] == -torch.inf).all())
    expected = [
        token
        for token in range(len(tokenizer))
        if re.fullmatch("[a-z]+", tokenizer.decode([token])) and token > 9
    ]
    assert kept[0].nonzero()[:, 0].tolist() == kept[1].nonzero()[:, 0].tolist() == expected


def test_a_grammar_beyond_limits(tokenizer: Any) -> None:
    derivation = hfopt.Grammar.regex("[a-z]+", tokenizer)._begin(2)
    derivation._rows[1]._matcher.consume_token(len(tokenizer) - 1)  # as other errors, it cannot be undone
    with pytest.raises(InvalidInput, match=r"^the grammar cannot go on \(\w+\): [^\n]+$"):
        derivation(torch.zeros(2, 0), torch.zeros(2, 1800))


def test_rows_in_another_order(tokenizer: Any) -> None:
    """As beams have them: each row has the state of its own text."""
    grammar = hfopt.Grammar.regex("(ab|cd|ef)+", tokenizer)
    one = {each: tokenizer.encode(each, add_special_tokens=False)[0] for each in "abcdef"}
    prompt = np.array([[5, 6]] * 3)

    def step(*texts: str) -> np.ndarray:
        return np.concatenate([prompt, np.array([[one[each] for each in text] for text in texts])], 1)

    followed = Followed(grammar._begin(3), prompt)
    for texts in (
        ("a", "c", "e"),
        ("ef", "ef", "ab"),
        ("abc", "efe", "efa"),
        ("ef", "ab", "ab"),
        ("abe", "abc", "efa"),
    ):
        assert followed.follow(step(*texts))
        scores = followed.derivation(torch.zeros(3, 0), torch.zeros(3, 1800))
        fresh = grammar._begin(3)
        for tokens in step(*texts)[:, 2:].T:
            fresh.add(tokens)
        assert torch.equal(scores, fresh(torch.zeros(3, 0), torch.zeros(3, 1800)))
    before = followed._ids
    for others in (step("cde", "abc", "efa"), step("abea", "abca", "cdab"), prompt, step("a", "a", "a")[:2]):
        assert not followed.follow(others)
    assert followed._ids is before


def test_guesses_of_rows_that_end(tokenizer: Any) -> None:
    derivation = hfopt.Grammar.regex("x(abcdefgh|y)", tokenizer)._begin(2)
    x, y, a = (tokenizer.encode(each, add_special_tokens=False)[0] for each in "xya")
    forced = derivation.guess(9)
    assert forced is not None and forced.tokens.tolist() == [[x], [x]] and forced.chance == 1
    derivation.add(np.array([x, x]))
    assert derivation.guess(9) is None  # there is a choice
    derivation.add(np.array([y, a]))
    guess = derivation.guess(9)  # all that the first row may do is end
    assert guess is not None and guess.tokens.shape == (2, 1) and guess.tokens[0, 0] == END
    rest = tokenizer.encode("bcdefgh", add_special_tokens=False)
    derivation.add(np.array([END, guess.tokens[1, 0]]))
    assert derivation.guess(9) is None  # nobody has said what follows an end
    derivation.add(np.array([PAD, rest[1]]))
    later = derivation.guess(9)
    assert later is not None and later.tokens.tolist() == [[PAD] * len(rest[2:]), rest[2:]]
    assert derivation.guess(1).tokens.shape == (2, 1)  # type: ignore[union-attr]
    for token in rest[2:]:
        derivation.add(np.array([PAD, token]))
    assert derivation.guess(9) is None  # nothing but the end


class _Fixed:
    seconds = 0.0

    def __init__(self, token: int | None) -> None:
        self.token, self.n_added = token, 0

    def add(self, tokens: np.ndarray) -> None:
        self.n_added += 1

    def meanwhile(self) -> None:
        pass

    def guess(self, n: int) -> Any:
        from hfopt.generation.speculation import Guess

        return None if self.token is None else Guess(np.full((1, n), self.token))


def test_the_first_that_has_a_guess_is_asked() -> None:
    parts = _Fixed(None), _Fixed(7)
    both = InTurn([Speculation(each, 5, StepCosts()) for each in parts])
    both.add(np.zeros(1, np.int64))
    assert [each.n_added for each in parts] == [1, 1]
    assert set(both.guess(1, 9)[0].tolist()) == {7}  # type: ignore[index]
    both.note(2, 2)
    parts[0].token = 4
    assert set(both.guess(1, 9)[0].tolist()) == {4}  # type: ignore[index]
    assert both.ahead(8) >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_logits", [1792, 1800, 900])
def test_the_best_allowed_token_is_that_of_all_scores(
    dtype: torch.dtype, n_logits: int, tokenizer: Any
) -> None:
    derivation = hfopt.Grammar.regex("[a-z]+", tokenizer)._begin(3)
    ended = [tokenizer.encode("a")[0], END, tokenizer.encode("b")[0]]
    derivation.add(np.array(ended))
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(3, 0, dtype=torch.int64)
    allowed = derivation(ids, torch.zeros(3, n_logits)).isfinite()
    logits = torch.randn(3, n_logits, generator=generator)
    cases = [logits, torch.where(allowed, logits, 9.0), torch.where(allowed, 2.0, logits), allowed + logits]
    cases += [torch.where(allowed, -torch.inf, logits), torch.full_like(logits, -torch.inf)]
    cases += [torch.where(torch.arange(n_logits) == 77, torch.nan, logits), logits.round()]
    for case in cases:
        case = case.to(dtype)
        before = case.clone()
        expected = derivation(ids, case.float()).argmax(-1)
        assert derivation.choose(case).tolist() == expected.tolist()
        assert torch.equal(case.nan_to_num(1e4), before.nan_to_num(1e4))


def test_no_allowed_token_has_a_logit(tokenizer: Any) -> None:
    derivation = hfopt.Grammar.regex("[ab]", tokenizer)._begin(1)
    with pytest.raises(InvalidInput, match="10 logits"):
        derivation.choose(torch.zeros(1, 10))
