"""Greedy search and sampling, one row of tokens a step."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from ._types import Ids, Model
from .choice import argmax
from .step import Steps
from .stopping import Stopping


def sample(
    model: Model,
    input_ids: Ids,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """`GenerationMixin._sample` for decoder-only models: same results, same random numbers."""
    wants = generation_config.return_dict_in_generate
    scores: tuple | None = () if wants and generation_config.output_scores else None
    logits: tuple | None = () if wants and generation_config.output_logits else None
    attentions: tuple | None = () if wants and generation_config.output_attentions else None
    hidden_states: tuple | None = () if wants and generation_config.output_hidden_states else None
    # processors may write into what they get, and what is returned outlives the step
    keeps_logits = bool(logits_processor) or scores is not None or logits is not None

    stopping = Stopping(stopping_criteria)
    steps = Steps(model, generation_config, model_kwargs)
    pad: Any = generation_config._pad_token_tensor
    finished: Tensor | None = None
    outputs = steps.prompt(input_ids)
    while True:
        next_logits = outputs.logits[:, -1]
        if keeps_logits:
            next_logits = next_logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        next_scores = logits_processor(input_ids, next_logits)
        if scores is not None:
            scores += (next_scores,)
        if logits is not None:
            logits += (next_logits,)
        if attentions is not None:
            attentions += (outputs.attentions,)
        if hidden_states is not None:
            hidden_states += (outputs.hidden_states,)
        del outputs  # the logits of a whole prompt may be large

        if generation_config.do_sample:
            probabilities = torch.softmax(next_scores, dim=-1, dtype=torch.float32)
            tokens = torch.multinomial(probabilities, num_samples=1).squeeze(1)
        else:
            tokens = argmax(next_scores)
        if finished is not None and stopping.pads_finished:
            tokens = torch.where(finished, pad.to(tokens.device), tokens)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)

        hits = stopping(tokens, input_ids.shape[1], input_ids, scores)
        if hits is not None:
            finished = hits if finished is None else finished | hits
        if streamer is not None:
            streamer.put(tokens.cpu())
        if finished is not None and bool(finished.all()):
            break
        outputs = steps.next(tokens, input_ids)

    if streamer is not None:
        streamer.end()
    if not wants:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=scores,
        logits=logits,
        attentions=attentions,
        hidden_states=hidden_states,
        past_key_values=steps.cache,
    )
