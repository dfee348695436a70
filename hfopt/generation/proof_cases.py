"""Requests by which our loops are held against transformers' own: together they use all that a loop reads of its host."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, StoppingCriteria
from transformers.generation import BaseStreamer

from hfopt import host

from ._types import Model, Outputs

GREEDY, SAMPLING, BEAMS, BEAM_SAMPLING = "greedy search", "sampling", "beam search", "beam sampling"
OTHER_LOOPS = "other loops over our cache"

_VOCABULARY = 48
_LENGTH, _LONG = 6, 12
_END = 5
# So many that rows meet one now and then, each at another step; none of them is in a prompt.
_ENDS = [5, 11, 14, 17, 23, 26, 32, 35, 38, 44, 47]
Call = Callable[..., Any]


def tiny_model(has_ties: bool) -> Model:
    """A random Llama; with ties, pairs of tokens have equal logits in each step."""
    sizes: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attn_implementation": "eager",  # which gives attention weights
    }
    config = LlamaConfig(**sizes)
    torch.manual_seed(3)
    model: Model = LlamaForCausalLM(config).float().eval()
    if has_ties:
        with torch.no_grad():
            model.lm_head.weight[_VOCABULARY // 2 :] = model.lm_head.weight[: _VOCABULARY // 2]
    return model


class _Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


class _Damped(LogitsProcessor):
    """Reads sequences and scores, and writes into what it is given, as users' processors do."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter_add_(1, input_ids[:, -1:], torch.full((len(scores), 1), -1.5))


class _Twice(StoppingCriteria):
    """Stops a row when a token has come twice in a row."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] == input_ids[:, -2]


def prompts(*lengths: int) -> dict[str, Tensor]:
    """Distinct tokens, shorter rows padded on the left."""
    longest = max(lengths)
    ids = torch.arange(len(lengths) * longest).view(len(lengths), longest) * 7 % (_VOCABULARY - 8) + 6
    mask = torch.tensor([[int(column >= longest - n) for column in range(longest)] for n in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


def _request(call: Call, options: Mapping[str, Any]) -> Any:
    return call(**prompts(5, 5), **options)


def _padded(call: Call, options: Mapping[str, Any]) -> Any:
    return call(**prompts(6, 3), **options)


def _streamed(call: Call, options: Mapping[str, Any]) -> Any:
    streamer = _Recorder()
    return call(**prompts(5), streamer=streamer, **options), streamer.heard


def _guided(call: Call, options: Mapping[str, Any]) -> Any:
    return call(**prompts(6, 3), logits_processor=[_Damped()], stopping_criteria=[_Twice()], **options)


def _continued(call: Call, options: Mapping[str, Any]) -> Any:
    """All tokens so far, with the cache of the request that made them."""
    first = call(**prompts(5, 5), **options)
    mask = torch.ones_like(first.sequences)
    given = {"input_ids": first.sequences, "attention_mask": mask, str(host.REQUEST_CACHE): cache_of(first)}
    return first, call(**given, **options)


def cache_of(output: Outputs) -> Any:
    """The cache that a request has returned."""
    return host.cache_in(output.values())


@dataclass(frozen=True)
class Case:
    """A request: which mode it belongs to, how it is made, with what options of `generate`."""

    mode: str
    name: str
    request: Callable[[Call, Mapping[str, Any]], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    has_ties: bool = False


_ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
_DRAWN = {"do_sample": True, "top_k": 20, "temperature": 0.9}
_LASTING = {"num_beams": 2, "eos_token_id": _ENDS, "length_penalty": 2.0, "max_new_tokens": _LONG}
_INSIDE = {"output_attentions": True, "output_hidden_states": True}
CASES = (
    Case(GREEDY, "all outputs", _padded, {**_ALL, **_INSIDE}),
    Case(GREEDY, "a streamer and an end", _streamed, {"eos_token_id": _END}),
    Case(GREEDY, "rows that end one by one", _padded, {"eos_token_id": _ENDS, "max_new_tokens": _LONG}),
    Case(GREEDY, "a processor and a criterion", _guided, {**_ALL, "eos_token_id": _END}),
    Case(GREEDY, "a continued cache", _continued, _ALL),
    Case(SAMPLING, "several sequences", _padded, {**_ALL, **_DRAWN, "num_return_sequences": 3}),
    Case(SAMPLING, "a streamer", _streamed, _DRAWN),
    Case(SAMPLING, "rows that end one by one", _padded, {**_DRAWN, "eos_token_id": _ENDS, "max_new_tokens": _LONG}),
    Case(SAMPLING, "a processor and a criterion", _guided, {**_DRAWN, "eos_token_id": _END}),
    Case(BEAMS, "all outputs", _padded, {**_ALL, **_INSIDE, "num_beams": 3}),
    Case(BEAMS, "prompts of one length", _request, {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.4}),
    Case(BEAMS, "ends", _padded, {**_ALL, "num_beams": 3, "eos_token_id": _ENDS, "early_stopping": True}),
    Case(BEAMS, "ends that may be improved", _padded, {**_LASTING, "early_stopping": False}),
    Case(BEAMS, "ends that long texts may improve", _padded, {**_LASTING, "early_stopping": "never"}),
    Case(BEAMS, "a processor and a criterion", _guided, {**_ALL, "num_beams": 3, "num_return_sequences": 2}, True),
    Case(BEAMS, "a continued cache", _continued, {**_ALL, "num_beams": 2, "num_return_sequences": 1}),
    Case(BEAM_SAMPLING, "all outputs", _padded, {**_ALL, **_DRAWN, "num_beams": 3, "num_return_sequences": 2}),
    Case(BEAM_SAMPLING, "a processor and ends", _guided, {**_DRAWN, "num_beams": 2, "eos_token_id": _END}),
    Case(OTHER_LOOPS, "greedy search", _padded, _ALL),
    Case(OTHER_LOOPS, "several sequences", _padded, {**_DRAWN, "num_return_sequences": 3}),
    Case(OTHER_LOOPS, "beam search", _padded, {**_ALL, "num_beams": 3, "num_return_sequences": 2}),
    Case(OTHER_LOOPS, "prompt lookup", _streamed, {"prompt_lookup_num_tokens": 2, "eos_token_id": _END}),
)  # fmt: skip
COMMON = {"max_new_tokens": _LENGTH, "do_sample": False, "pad_token_id": 0}
