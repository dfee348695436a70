"""Chat: every answer is the one that transformers gives to the whole history, and reads only what is new in it."""

import gc
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria

import hfopt
from hfopt import host
from hfopt.errors import InvalidInput
from tests import model_types
from tests.generation_cases import (
    CACHE,
    LONG,
    VOCABULARY,
    Model,
    llama,
    mistral,
    needs_programs,
    one_thread,
    opt,
    phi4_mini,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

END, CALL = 2, 3
TEMPLATE = """
{%- if tools %}tools {% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}{% endif %}
{%- for message in messages %}{{ message['role'] }} {{ message['content'] }} <end> {% endfor %}
{%- if add_generation_prompt %}assistant{% endif %}
"""
# of answers before, the last word alone
FORGETS = TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'].split(' ')[-1] }}")
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
QUESTIONS = ("w20 w21 w22 w23 w24 w25", "w60 w61 w62", "w40 w41 w42 w43", "w90 w91")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Of words w0 ... w199 and those of the template; <end> and <call> are special tokens."""
    names = {1: "assistant", END: "<end>", CALL: "<call>", 4: "user", 5: "system", 6: "tool", 7: "tools"}
    words = {names.get(index, f"w{index}"): index for index in range(VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    special: dict[str, Any] = {"eos_token": "<end>", "additional_special_tokens": ["<call>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", pad_token="w0", **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model() -> Model:
    return hfopt.optimize(llama())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not _answering()


def _answering() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hfopt-chat")]


def said(chat: hfopt.Chat, *messages: Any) -> str:
    return "".join(chat.send(*messages))


def answer_of(stock: Model, tokenizer: Any, messages: list[dict], **options: Any) -> str:
    """Of transformers alone, to the whole history."""
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, tools=options.pop("tools", None)
    )
    tokens = torch.tensor([ids])
    output = stock.generate(tokens, attention_mask=torch.ones_like(tokens), **{**OPTIONS, **options})
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def check_history(chat: hfopt.Chat, stock: Model, **options: Any) -> None:
    """Hold each answer in a chat against what came before it."""
    for index, message in enumerate(chat.messages):
        if message["role"] == "assistant":
            expected = answer_of(stock, chat.tokenizer, chat.messages[:index], **options)
            assert message["content"] == expected, index


def read_by(model: Model, talk: Callable[[], Any]) -> list[int]:
    """How many tokens `talk` has each call of the model read that is no decode step."""
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    talk()
    handle.remove()
    return [length for length in lengths if length > 1]


def lengths_of(chat: hfopt.Chat) -> list[int]:
    """Of what the template makes of a chat, for each of its answers."""
    return [
        len(
            chat.tokenizer.apply_chat_template(
                chat.messages[:index], add_generation_prompt=True, return_dict=False
            )
        )
        for index, message in enumerate(chat.messages)
        if message["role"] == "assistant"
    ]


# ---- answers ---------------------------------------------------------------------------------------------------


MODELS: dict[str, Callable[[], Model]] = {
    "llama": llama,
    "opt, by a table of positions": lambda: opt(max_position_embeddings=200),
    "mistral, of a window that is left": lambda: mistral(sliding_window=12),
}


@needs_programs
@pytest.mark.parametrize("optimize", [hfopt.optimize, lambda model: model], ids=["optimised", "stock"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_to_the_whole_history(name: str, optimize: Any, tokenizer: Any) -> None:
    chat = hfopt.Chat(optimize(MODELS[name]()), tokenizer, system="w100 w101", **OPTIONS)
    for question in QUESTIONS:
        said(chat, question)
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 4]
    assert len({message["content"] for message in chat.messages}) == 9
    check_history(chat, MODELS[name]())


@pytest.mark.parametrize("optimize", [hfopt.optimize, lambda model: model], ids=["optimised", "stock"])
@pytest.mark.parametrize("name", MODELS)
def test_a_turn_reads_what_is_new(name: str, optimize: Any, tokenizer: Any) -> None:
    model = optimize(MODELS[name]())
    chat = hfopt.Chat(model, tokenizer, **OPTIONS)
    found = read_by(model, lambda: [said(chat, question) for question in QUESTIONS])
    # behind an answer of 8 tokens, the last of which has not been read, come its end, the question and its frame
    assert found == [
        9,
        *(1 + 1 + 1 + len(question.split()) + 1 + 1 for question in QUESTIONS[1:]),
    ]


def test_a_token_that_ends_an_answer_is_no_part_of_it(tokenizer: Any) -> None:
    """Although it is no special one."""
    model, stock = llama(), llama()
    first = answer_of(stock, tokenizer, [{"role": "user", "content": QUESTIONS[0]}]).split(" ")
    assert first[4] not in first[:4]
    options = {**OPTIONS, "eos_token_id": [END, tokenizer.convert_tokens_to_ids(first[4])]}
    chat = hfopt.Chat(hfopt.optimize(model), tokenizer, **options)
    found = read_by(model, lambda: [said(chat, question) for question in QUESTIONS[:2]])
    assert chat.messages[1]["content"] == " ".join(first[:4])
    # the last word has been read, since another token came behind it
    assert found == [9, 1 + 1 + 3 + 1 + 1]


# ---- what cannot simply go on ----------------------------------------------------------------------------------


def test_a_template_that_forgets_part_of_an_answer(model: Model, tokenizer: Any, monkeypatch: Any) -> None:
    """As those of models that think first do: what has been read of it goes."""
    monkeypatch.setattr(tokenizer, "chat_template", FORGETS)
    chat = hfopt.Chat(model, tokenizer, **OPTIONS)
    found = read_by(model, lambda: [said(chat, question) for question in QUESTIONS])
    check_history(chat, llama())
    whole = lengths_of(chat)
    # of each text, all up to the answer before it is known
    assert found == [whole[0], *(each - before for before, each in itertools.pairwise(whole))]


@pytest.mark.parametrize("make", [hfopt.optimize, lambda model: model], ids=["optimised", "stock"])
def test_a_window_that_has_been_left_is_read_anew(make: Any, tokenizer: Any, monkeypatch: Any) -> None:
    """With an answer that is longer than the slack of hfopt's layers."""
    monkeypatch.setattr(tokenizer, "chat_template", FORGETS)
    model = make(mistral(sliding_window=12))
    chat = hfopt.Chat(model, tokenizer, **{**OPTIONS, "max_new_tokens": 200})
    found = read_by(model, lambda: [said(chat, question) for question in QUESTIONS[:2]])
    assert found == lengths_of(chat)
    check_history(chat, mistral(sliding_window=12), max_new_tokens=200)


@pytest.mark.parametrize("make", [hfopt.optimize, lambda model: model], ids=["optimised", "stock"])
@pytest.mark.parametrize("kind", [llama, lambda: mistral(sliding_window=12)], ids=["full", "window"])
def test_requests_that_guess_tokens(kind: Any, make: Any, tokenizer: Any, monkeypatch: Any) -> None:
    """Over a cache that is given to them, transformers makes wrong ones."""
    monkeypatch.setattr(tokenizer, "chat_template", FORGETS)
    ends = {"max_new_tokens": 30, "eos_token_id": END}
    chat = hfopt.Chat(make(kind()), tokenizer, prompt_lookup_num_tokens=3, **{**OPTIONS, **ends})
    for question in QUESTIONS:
        said(chat, question)
    check_history(chat, kind(), **ends)


@needs_programs
@pytest.mark.parametrize("make", [hfopt.optimize, lambda model: model], ids=["optimised", "stock"])
def test_angles_that_follow_from_the_length_of_a_text(make: Any, tokenizer: Any) -> None:
    model = make(phi4_mini())
    chat = hfopt.Chat(model, tokenizer, **{**OPTIONS, "max_new_tokens": 2})
    questions = ("w20 w21", "w60", "w40 w41", *QUESTIONS)
    found = read_by(model, lambda: [said(chat, question) for question in questions])
    whole = lengths_of(chat)
    assert whole[2] <= LONG < whole[3]
    assert found[:3] == [whole[0], *(each - before - 1 for before, each in itertools.pairwise(whole[:3]))]
    assert found[3:] == whole[3:]
    check_history(chat, phi4_mini(), max_new_tokens=2)


@needs_programs
def test_how_long_a_text_has_the_same_angles() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    lengths = {
        sys.maxsize: llama(),
        LONG: phi4_mini(),
        40: llama(rope_parameters=dynamic, max_position_embeddings=40),
        0: llama(),
    }
    lengths[0].model.rotary_emb.rope_type = "of tomorrow"
    for length, model in lengths.items():
        assert host.steady_length(model.modules()) == length
        assert host.steady_length(hfopt.optimize(model).modules()) == length


@needs_programs
def test_recurrent_states_are_read_anew(tokenizer: Any) -> None:
    kind = model_types.config("mamba", vocab_size=VOCABULARY)
    model, stock = (model_types.random_model(kind) for _ in range(2))
    chat = hfopt.Chat(hfopt.optimize(model), tokenizer, **OPTIONS)
    found = read_by(model, lambda: [said(chat, question) for question in QUESTIONS])
    # transformers 5.23 names no cache of these models: our loop hands the request over, and its prompt is read again
    assert [length for length, _ in itertools.groupby(found)] == lengths_of(chat)
    check_history(chat, stock)


def test_without_a_cache(tokenizer: Any) -> None:
    chat = hfopt.Chat(hfopt.optimize(llama()), tokenizer, use_cache=False, **OPTIONS)
    for question in QUESTIONS:
        said(chat, question)
    check_history(chat, llama())


def test_arguments_of_generate(tokenizer: Any) -> None:
    """A configuration, which the limit of an answer goes before; a cache."""
    model = hfopt.optimize(llama())
    whole = said(hfopt.Chat(model, tokenizer, **OPTIONS), QUESTIONS[0])
    word = whole.split()[4]
    config = GenerationConfig(do_sample=False, eos_token_id=[tokenizer.convert_tokens_to_ids(word)])
    chat = hfopt.Chat(model, tokenizer, generation_config=config)
    assert said(chat, QUESTIONS[0]) == " ".join(whole.split()[:4])
    chat.generate_arguments["max_new_tokens"] = 2
    assert len(said(chat, QUESTIONS[1]).split()) == 2
    chat.generate_arguments[CACHE] = hfopt.IndirectCache(model.config)
    with pytest.raises(InvalidInput, match="cache of its own"):
        said(chat, QUESTIONS[1])


def test_strings_that_end_an_answer() -> None:
    """With the embedded model, whose tokenizer is of a kind that transformers finds them with."""
    model = hfopt.load(hfopt.embedded_model(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(hfopt.embedded_model())
    chat = hfopt.Chat(model, tokenizer, stop_strings=["given"])
    assert said(chat, "Return a list of") == " the given"


def test_a_cache_of_codes_goes_on(tokenizer: Any) -> None:
    model = hfopt.optimize(llama(), kv_cache="int8")
    chat = hfopt.Chat(model, tokenizer, **OPTIONS)
    found = read_by(model, lambda: [said(chat, question) for question in QUESTIONS[:2]])
    assert found == [9, 8]


# ---- messages --------------------------------------------------------------------------------------------------


def test_messages_may_be_edited(model: Model, tokenizer: Any) -> None:
    chat = hfopt.Chat(model, tokenizer, system="w100 w101", **OPTIONS)
    for question in QUESTIONS[:3]:
        said(chat, question)
    chat.messages[3]["content"] = "w150 w151"
    del chat.messages[5:]
    found = read_by(model, lambda: said(chat, QUESTIONS[3]))
    assert found == [lengths_of(chat)[-1] - lengths_of(chat)[0] - 8 - 2]  # behind "<end> user"
    chat.messages[:] = chat.messages[:1]
    said(chat, QUESTIONS[1])
    chat.messages = [{"role": "user", "content": "w7"}]
    said(chat)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    check_history(chat, llama())


def test_the_same_question_again(model: Model, tokenizer: Any) -> None:
    """One token at least has to be read."""
    chat = hfopt.Chat(model, tokenizer, **OPTIONS)
    first = said(chat, QUESTIONS[0])
    chat.messages.clear()
    assert said(chat, QUESTIONS[0]) == first


def test_tools_reach_the_template_and_calls_the_user(tokenizer: Any) -> None:
    """Calls are marked by a special token, which is text then; what ends an answer is not."""

    def w180(place: str) -> str:
        """
        Says what the weather is like.

        Args:
            place: where
        """
        return place

    model, stock = llama(), llama()
    options = {**OPTIONS, "sequence_bias": {(CALL,): 40.0}, "max_new_tokens": 3}
    seen: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    chat = hfopt.Chat(model, tokenizer, tools=[w180], **options)
    assert "<call>" in said(chat, QUESTIONS[0]).split()
    assert seen[0][:2] == tokenizer.convert_tokens_to_ids(["tools", "w180"])
    answer = said(chat, {"role": "tool", "name": "w180", "content": "w30 w31"})
    assert seen[3][-5:] == tokenizer.convert_tokens_to_ids(["tool", "w30", "w31", "<end>", "assistant"])
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    expected = answer_of(stock, tokenizer, chat.messages[:3], tools=[w180], **options)
    assert answer.replace("<call>", "").split() == expected.split()

    chat.generate_arguments |= {"sequence_bias": {(END,): 90.0}, "eos_token_id": END}
    assert said(chat, "w3") == ""


def test_the_end_of_an_answer_is_no_text_beside_tools() -> None:
    """With the embedded model, whose end token is a special one and has the id 0."""
    model = hfopt.load(hfopt.embedded_model(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(hfopt.embedded_model())
    chat = hfopt.Chat(model, tokenizer, tools=[{"type": "function", "function": {"name": "none"}}])
    assert said(chat, "Return a list of") == " the given file."


def test_messages_that_the_template_does_not_take(model: Model, tokenizer: Any, monkeypatch: Any) -> None:
    chat = hfopt.Chat(model, tokenizer, **OPTIONS)
    with pytest.raises(InvalidInput, match="messages: the chat template"):
        said(chat)
    said(chat, QUESTIONS[0])
    before = list(chat.messages)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidInput, match="roles must alternate"):
        said(chat, QUESTIONS[1])
    monkeypatch.setattr(tokenizer, "chat_template", "{{ '' }}")
    with pytest.raises(InvalidInput, match="no token"):
        said(chat, QUESTIONS[1])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(InvalidInput, match="chat_template"):
        said(chat, QUESTIONS[1])
    assert chat.messages == before


# ---- threads ---------------------------------------------------------------------------------------------------


class Counted(StoppingCriteria):
    """Stops nothing; counts the tokens, and waits for the reader before it lets the next one come."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.is_read = threading.Semaphore(0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.n_tokens += 1
        assert self.is_read.acquire(timeout=60)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_pieces_come_while_the_answer_is_made(model: Model, tokenizer: Any) -> None:
    counted = Counted()
    chat = hfopt.Chat(model, tokenizer, stopping_criteria=[counted], **OPTIONS)
    counted.is_read.release(2)  # a streamer holds the last word back
    for index, piece in enumerate(chat.send(QUESTIONS[0])):
        assert counted.n_tokens <= index + 3 and piece
        counted.is_read.release()
    assert counted.n_tokens == 8


def test_an_answer_that_is_not_read_to_its_end(model: Model, tokenizer: Any) -> None:
    chat = hfopt.Chat(model, tokenizer, **{**OPTIONS, "max_new_tokens": 400})
    pieces = []
    for piece in chat.send(QUESTIONS[0]):
        pieces.append(piece)
        if len(pieces) == 3:
            break
    gc.collect()
    assert not _answering()
    assert chat.messages[1:] == [{"role": "assistant", "content": "".join(pieces)}]
    whole = answer_of(llama(), tokenizer, chat.messages[:1], max_new_tokens=8)
    assert whole.startswith("".join(pieces))
    for question in QUESTIONS[1:]:
        chat.generate_arguments["max_new_tokens"] = 8
        answer = said(chat, question)
        assert answer == answer_of(llama(), tokenizer, chat.messages[:-1])


def test_generate_stops_where_the_reader_does(model: Model, tokenizer: Any) -> None:
    counted = Counted()
    counted.is_read.release(1000)
    options = {**OPTIONS, "max_new_tokens": 900}
    chat = hfopt.Chat(model, tokenizer, stopping_criteria=[counted], **options)
    pieces = chat.send(QUESTIONS[0])
    next(pieces)
    pieces.close()
    assert 1 <= counted.n_tokens < 900


def test_what_nobody_reads_is_not_made(model: Model, tokenizer: Any) -> None:
    chat = hfopt.Chat(model, tokenizer, **OPTIONS)
    chat.send(QUESTIONS[0])
    assert chat.messages == []


def test_one_answer_at_a_time(model: Model, tokenizer: Any) -> None:
    chat = hfopt.Chat(model, tokenizer, **OPTIONS)
    first = chat.send(QUESTIONS[0])
    begun = next(first)
    assert _answering()
    with pytest.raises(InvalidInput, match="answering"):
        said(chat, QUESTIONS[1])
    rest = "".join(first)
    said(chat, QUESTIONS[1])
    assert chat.messages[1]["content"] == begun + rest
    check_history(chat, llama())


def test_two_chats_at_once(model: Model, tokenizer: Any) -> None:
    chats = [hfopt.Chat(model, tokenizer, **OPTIONS) for _ in range(2)]
    first, second = (chat.send(question) for chat, question in zip(chats, QUESTIONS[:2], strict=True))
    next(first), next(second)
    assert len(_answering()) == 2
    for answer in (second, first):
        assert "".join(answer)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda chat: [said(chat, question) for question in QUESTIONS], chats))
    for chat in chats:
        assert len(chat.messages) == 10
        check_history(chat, llama())


class Failing(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] > 20:
            raise OSError("the disk is full")
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_an_error_of_generate_is_raised(model: Model, tokenizer: Any) -> None:
    chat = hfopt.Chat(model, tokenizer, stopping_criteria=[Failing()], **OPTIONS)
    said(chat, QUESTIONS[0])
    before = list(chat.messages)
    with pytest.raises(OSError, match="disk is full"):
        said(chat, QUESTIONS[2])
    assert chat.messages == before
    del chat.generate_arguments["stopping_criteria"]
    said(chat, QUESTIONS[1])
    check_history(chat, llama())
    chat.generate_arguments["num_beams"] = 2
    with pytest.raises(ValueError, match="streamer"):
        said(chat, QUESTIONS[2])
