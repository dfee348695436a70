"""Output of a given form: a JSON schema, a regular expression or a grammar says which token may follow."""

from __future__ import annotations

import inspect
import json
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from hfopt.errors import InvalidInput

from .derivation import Derivation, Followed
from .speculation import MOST, InTurn, Speculation, StepCosts

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_RECENT = 4  # texts of a thread that may go on
_LONGEST = 200  # characters of an argument in a message
_LAYOUTS: dict[bool, dict[str, Any]] = {
    False: {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    True: {"whitespace_flexible": True},
}


class Grammar(LogitsProcessor):
    """What a model's answer has to be, for `generate(..., logits_processor=[grammar])` of any model, optimised or not.

    Made by `Grammar.json`, `Grammar.regex` or `Grammar.lark`, once for many requests. An answer begins behind the prompt;
    tokens that it could not go on with get a score of -inf, and an end token is allowed where it may end. A request that
    runs into `max_new_tokens` before is cut off. In our loop of greedy search and sampling, tokens that the grammar leaves
    no choice about are put in without a step each: several are checked in one.

    Threads may share one. A loop that is not ours says nothing but tokens: there, an answer is known by the text that it
    goes on from in the same thread, so that a prompt that ends within an earlier answer goes on in its grammar.

    Needs `pip install "hfopt[structured]"`: the work is that of https://github.com/guidance-ai/llguidance.

    Example:
        >>> import hfopt
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained(hfopt.embedded_model())
        >>> model = hfopt.optimize(AutoModelForCausalLM.from_pretrained(hfopt.embedded_model()))
        >>> fields = {"sorted": {"type": "boolean"}, "size": {"enum": [1, 2]}}
        >>> schema = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
        >>> grammar = hfopt.Grammar.json(schema, tokenizer)
        >>> prompt = tokenizer("Return the list.", return_tensors="pt")
        >>> tokens = model.generate(**prompt, logits_processor=[grammar], max_new_tokens=30, do_sample=False)
        >>> tokenizer.decode(tokens[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True)
        '{"sorted": ..., "size": ...}'
    """

    def __init__(self, matcher: LLMatcher, vocabulary: LLTokenizer) -> None:
        self._matcher = matcher  # behind a prompt; copied for each row
        self._vocabulary = vocabulary
        self._threads = threading.local()

    @classmethod
    def json(
        cls,
        schema: Mapping[str, Any] | str,
        tokenizer: Any,
        *,
        whitespace: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Grammar:
        """JSON by a schema: a dictionary, or its text; `{}` is any JSON.

        tokenizer: a fast one of transformers. whitespace: whether any may stand between the parts; otherwise they are laid
        out as by Python's `json.dumps`, and more tokens are without a choice. eos_token_id: tokens that end an answer, that
        of the tokenizer by default. Raises InvalidInput for a schema with something that is unknown or not supported, and
        ImportError without llguidance.
        """
        library = _library()
        text = _json_text(schema)
        grammar = library.LLMatcher.grammar_from_json_schema(text, overrides=_LAYOUTS[bool(whitespace)])
        return cls._made("schema", schema, grammar, _vocabulary(tokenizer, eos_token_id))

    @classmethod
    def regex(
        cls, pattern: str, tokenizer: Any, *, eos_token_id: int | Sequence[int] | None = None
    ) -> Grammar:
        """A text that a regular expression (syntax: Rust's crate `regex`) matches as a whole. Raises as `json` does."""
        library = _library()
        _check_text("pattern", pattern)
        grammar = library.LLMatcher.grammar_from_regex(pattern)
        return cls._made("pattern", pattern, grammar, _vocabulary(tokenizer, eos_token_id))

    @classmethod
    def lark(
        cls, grammar: str, tokenizer: Any, *, eos_token_id: int | Sequence[int] | None = None
    ) -> Grammar:
        """A context-free grammar in llguidance's form of Lark, whose first rule is `start`. Raises as `json` does."""
        library = _library()
        _check_text("grammar", grammar)
        text = library.LLMatcher.grammar_from_lark(grammar)
        return cls._made("grammar", grammar, text, _vocabulary(tokenizer, eos_token_id))

    @classmethod
    def _made(cls, argument: str, value: Any, grammar: str, vocabulary: LLTokenizer) -> Grammar:
        matcher = _library().LLMatcher(vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidInput(f"{argument}={_short(value)} is no form of an answer: {matcher.get_error()}")
        return cls(matcher, vocabulary)

    def _begin(self, n_rows: int) -> Derivation:
        """The answers of a request, of which there is nothing yet."""
        return Derivation(self._matcher, self._vocabulary, n_rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores float [n_rows, n_logits] for the token behind input_ids int64 [n_rows, length], with -inf for what may not
        follow; a tensor of its own.
        """
        ids = input_ids.cpu().numpy()
        recent: deque[Followed] | None = getattr(self._threads, "recent", None)
        if recent is None:
            recent = self._threads.recent = deque(maxlen=_RECENT)
        followed = next((each for each in recent if each.follow(ids)), None)
        if followed is None:
            followed = Followed(self._begin(len(ids)), ids)
            recent.appendleft(followed)
        return followed.derivation(input_ids, scores)


class _Processors(LogitsProcessorList):
    """Of those that take nothing but tokens and scores, without a look at the signature of each in every step, which takes
    as long as a mask.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for each in self:
            scores = each(input_ids, scores)
        return scores


def begun(
    processors: LogitsProcessorList, n_rows: int, speculation: Speculation | None, costs: StepCosts
) -> tuple[LogitsProcessorList, Speculation | InTurn | None]:
    """The processors of a request that begins, with a derivation for each grammar, and what guesses its tokens: the grammars
    before the speculation of the request.
    """
    parts = [each._begin(n_rows) if type(each) is Grammar else each for each in processors]
    guesses = [Speculation(each, MOST, costs) for each in parts if isinstance(each, Derivation)]
    if type(processors) is LogitsProcessorList and all(map(_takes_two, parts)):
        processors = _Processors(parts)
    elif guesses:
        processors = LogitsProcessorList(parts)
    if not guesses:
        return processors, speculation
    if speculation is not None:
        guesses.append(speculation)
    return processors, InTurn(guesses) if len(guesses) > 1 else guesses[0]


def _takes_two(processor: Any) -> bool:
    """Whether a processor is given tokens and scores alone."""
    try:
        return len(inspect.signature(processor.__call__).parameters) == 2
    except (TypeError, ValueError):
        return False


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError('hfopt.Grammar needs llguidance: pip install "hfopt[structured]"') from error
    return llguidance


_vocabularies: WeakKeyDictionary[Any, dict[Any, LLTokenizer]] = WeakKeyDictionary()


def _vocabulary(tokenizer: Any, eos_token_id: int | Sequence[int] | None) -> LLTokenizer:
    """What llguidance makes of a tokenizer; kept, because large ones take it a second."""
    from llguidance.hf import from_tokenizer

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InvalidInput(
            f"tokenizer is a {type(tokenizer).__name__}: a fast one of transformers is needed (PreTrainedTokenizerFast)"
        )
    ends = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    if ends is None:
        raise InvalidInput("eos_token_id=None: the tokenizer has no end token, so one has to be given")
    # tokens can be added to a tokenizer later
    key = len(tokenizer), tuple(ends) if isinstance(ends, Sequence) else ends
    known = _vocabularies.setdefault(tokenizer, {})
    if key not in known:
        try:
            known[key] = from_tokenizer(tokenizer, eos_token=ends if isinstance(ends, int) else list(ends))
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"eos_token_id={ends!r} and this tokenizer: {error}") from error
    return known[key]


def _json_text(schema: Any) -> str:
    try:
        text = schema if isinstance(schema, str) else json.dumps(dict(schema))
        if isinstance(json.loads(text), dict):
            return text
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"schema={_short(schema)} is no dictionary of JSON, nor its text: {error}"
        ) from error
    raise InvalidInput(f"schema={_short(schema)} is no dictionary of JSON, nor its text")


def _check_text(argument: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InvalidInput(f"{argument} is a {type(value).__name__}: a string is needed")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
