"""Chat: messages in, text out while it is made, over a cache that goes on from answer to answer."""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from hfopt import host
from hfopt.cache import crop_to
from hfopt.errors import InvalidInput
from hfopt.words import in_words

Message = dict[str, Any]
Past = tuple[Cache, list[int]]  # what has been read, and its tokens


class Chat:
    """A conversation with a model, optimised or not. Each answer reads only what is new since the one before.

    Args:
        model: what answers, by its `generate`.
        tokenizer: its tokenizer, which has a chat template.
        system: text of a first message of the role "system".
        tools: functions or JSON schemas, which the chat template names to the model. Its calls are text, in the form that
            the model has learnt; so special tokens, apart from those that end an answer, are part of the text then.
        max_new_tokens: of each answer, at most.
        generate_arguments: for `generate`, in each answer: `do_sample`, `temperature`, ...

    `messages`, a list of dicts as chat templates take them, is the whole conversation. It may be edited between two answers,
    as `tools` and `generate_arguments` may: what is read anew begins at the first token that is another one then. A cache
    that cannot go back (of a window that has been left, of recurrent states), or whose angles follow from the length of a
    text that has become too long, is read anew as a whole. For other weights or adapters begin another Chat.

    Example:
        >>> import hfopt, torch
        >>> from transformers import AutoTokenizer
        >>> model = hfopt.load(hfopt.embedded_model(), dtype=torch.float32)
        >>> tokenizer = AutoTokenizer.from_pretrained(hfopt.embedded_model())
        >>> chat = hfopt.Chat(model, tokenizer, max_new_tokens=16, do_sample=False)
        >>> for piece in chat.send("Return a list of"):
        ...     print(piece, end="")
         the given file.
        >>> answer = "".join(chat.send("Return True if"))
        >>> [message["role"] for message in chat.messages]
        ['user', 'assistant', 'user', 'assistant']
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        tools: list[Callable[..., Any] | dict[str, Any]] | None = None,
        max_new_tokens: int = 512,
        **generate_arguments: Any,
    ) -> None:
        self.model: Any = model  # transformers leaves `generate` untyped
        self.tokenizer, self.tools = tokenizer, tools
        self.generate_arguments = {"max_new_tokens": max_new_tokens, **generate_arguments}
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._past: Past | None = None
        self._turn = threading.Lock()

    def send(self, *messages: str | Message) -> Generator[str, None, None]:
        """Pieces of the answer to these messages, and to all before them; a text is a message of the role "user".

        None are needed where `messages` ends with one that waits for an answer. `generate` runs in a thread of its own from
        the first piece on, and is stopped where the iterator is closed: `messages` then get what has been said until then.
        An error leaves them as they were: InvalidInput for messages that the chat template refuses, and while another answer
        of this chat is under way; those of `generate`.
        """
        if host.cache_in(self.generate_arguments.values()) is not None:
            raise InvalidInput("generate_arguments: a chat has a cache of its own")
        if not self._turn.acquire(blocking=False):
            raise InvalidInput("send: this chat is answering; read that answer to its end, or close it")
        try:
            sent = [
                {"role": "user", "content": message} if isinstance(message, str) else message
                for message in messages
            ]
            ids = self._ids([*self.messages, *sent])
            settings = self._settings()
            past, self._past = self._past, None
            ends = getattr(settings, "eos_token_id", None)
            ends = torch.as_tensor([] if ends is None else ends).flatten()
            text, stop = _Text(self.tokenizer, ends, skip_special_tokens=not self.tools), _Stop()
            said = []
            with ThreadPoolExecutor(1, "hfopt-chat") as pool:
                request = pool.submit(self._generate, ids, past, settings, text, stop)
                request.add_done_callback(lambda _: text.text_queue.put(text.stop_signal))
                try:
                    for piece in filter(None, text):
                        said.append(piece)
                        yield piece
                finally:
                    stop.asked.set()
                    self._past = request.result()
                    self.messages += [*sent, {"role": "assistant", "content": "".join(said)}]
        finally:
            self._turn.release()

    def _ids(self, messages: list[Message]) -> list[int]:
        """What the model reads of a conversation."""
        try:
            ids: Any = self.tokenizer.apply_chat_template(
                messages, tools=self.tools, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # of a template, which may raise anything
            raise InvalidInput(
                f"messages: the chat template does not take them ({in_words(error)})"
            ) from error
        if not ids:
            raise InvalidInput("messages: the chat template makes no token of them")
        return ids

    def _settings(self) -> GenerationConfig | None:
        """What `generate` makes of its arguments; None in a release that does not tell."""
        prepare = getattr(self.model, host.PREPARE_CONFIG, None)
        if prepare is None:
            return None
        arguments = self.generate_arguments
        others = {name: value for name, value in arguments.items() if name not in host.GENERATE_ORDER}
        return host.settings_in(prepare(arguments.get("generation_config"), **others))

    def _generate(
        self, ids: list[int], past: Past | None, settings: GenerationConfig | None, text: _Text, stop: _Stop
    ) -> Past | None:
        """Put the answer into `text`; the cache behind it, with the tokens that are in it."""
        arguments = dict(self.generate_arguments)
        criteria = StoppingCriteriaList([*(arguments.pop("stopping_criteria", None) or ()), stop])
        if past is not None and self._goes_on(past, ids, settings):
            arguments[str(host.REQUEST_CACHE)] = past[0]
        tokens = torch.tensor([ids], device=self.model.device)
        output = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            tokenizer=self.tokenizer,  # for stop strings
            streamer=text,
            stopping_criteria=criteria,
            return_dict_in_generate=True,
            **arguments,
        )
        cache, sequence = host.cache_in(output.values()), output.sequences[0].tolist()
        length = host.cached_length(cache)
        # the last token has not been read; a cache that is longer has more than this text in it
        if cache is None or length is None or length >= len(sequence):
            return None
        return cache, sequence[:length]

    def _goes_on(self, past: Past, ids: list[int], settings: GenerationConfig | None) -> bool:
        """Crop a cache to what it has in common with the new text, of which one token at least is to be read; False if it
        is of no use for that.
        """
        arguments = self.generate_arguments
        if host.REQUEST_CACHE is None or settings is None or arguments.get("custom_generate") is not None:
            return False
        # other loops do not all know what to do with a cache: assisted ones read the whole text behind it
        if settings.get_generation_mode(arguments.get("assistant_model")) not in host.MODES:
            return False
        cache, held = past
        n_common = len([*itertools.takewhile(bool, map(operator.eq, held, ids[:-1]))])
        if not n_common or max(len(held), len(ids)) > host.steady_length(self.model.modules()):
            return False
        return crop_to(cache, n_common)


class _Text(TextIteratorStreamer):
    """The pieces of an answer, without the tokens that end it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Tensor, skip_special_tokens: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=skip_special_tokens)
        self._ends = ends

    def put(self, value: Tensor) -> None:
        is_prompt = self.next_tokens_are_prompt
        super().put(value if is_prompt else value[~torch.isin(value, self._ends)])


class _Stop(StoppingCriteria):
    """Stops behind the next token, once it is asked to."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)
