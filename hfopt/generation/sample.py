"""Greedy search and sampling, one row of tokens a step."""

from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer

from hfopt import host

from ._types import Ids, Model, Outputs
from .choice import argmax
from .decoding import Choosing
from .sequences import Sequences
from .step import Steps
from .stopping import Stopping, runs_foreign_code


def sample(
    model: Model,
    input_ids: Ids,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Outputs:
    """`GenerationMixin._sample` for decoder-only models: same results, same random numbers."""
    wants = generation_config.return_dict_in_generate
    scores: tuple | None = () if wants and generation_config.output_scores else None
    logits: tuple | None = () if wants and generation_config.output_logits else None
    attentions: tuple | None = () if wants and generation_config.output_attentions else None
    hidden_states: tuple | None = () if wants and generation_config.output_hidden_states else None
    # processors may write into what they get, and what is returned outlives the step
    keeps_logits = bool(logits_processor) or scores is not None or logits is not None

    stopping = Stopping(stopping_criteria)
    is_foreign = runs_foreign_code([*logits_processor, *stopping_criteria, *([streamer] if streamer else [])])
    pad: Any = generation_config._pad_token_tensor
    choosing = None
    if not (keeps_logits or generation_config.do_sample):
        choosing = Choosing(stopping.ends, int(pad) if stopping.pads_finished else 0)
    steps = Steps(model, generation_config, model_kwargs, choosing=choosing, is_alone=not is_foreign)
    sequences = Sequences(input_ids)
    finished: np.ndarray | None = None
    outputs = steps.prompt(input_ids)
    reads_sequences = bool(logits_processor) or stopping.reads_sequences or not steps.plain
    ids: Ids = input_ids
    while True:
        if isinstance(outputs, np.ndarray):
            tokens = outputs
        else:
            next_logits = outputs.logits[:, -1]
            if keeps_logits:
                next_logits = next_logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
            next_scores = logits_processor(ids, next_logits)
            if scores is not None:
                scores += (next_scores,)
            if logits is not None:
                logits += (next_logits,)
            if attentions is not None:
                attentions += (outputs.attentions,)
            if hidden_states is not None:
                hidden_states += (outputs.hidden_states,)
            if generation_config.do_sample:
                probabilities = torch.softmax(next_scores, dim=-1, dtype=torch.float32)
                tokens = torch.multinomial(probabilities, num_samples=1).squeeze(1).numpy()
            else:
                tokens = argmax(next_scores).numpy()
        del outputs  # the logits of a whole prompt may be large

        if finished is not None and stopping.pads_finished:
            tokens = np.where(finished, int(pad), tokens)
        sequences.append(tokens)
        if reads_sequences:
            ids = sequences.ids
        hits = stopping(tokens, sequences.length, ids, scores, is_ahead=steps.is_ahead)
        if hits is not None:
            finished = hits if finished is None else finished | hits
        if streamer is not None:
            streamer.put(torch.from_numpy(tokens.copy()))
        if finished is not None and finished.all():
            break
        # whoever looks at each token gets it before the next one is made
        most = 1 if is_foreign or streamer is not None else stopping.left(sequences.length)
        outputs = steps.next(tokens, ids, most=most, finished=finished)

    if streamer is not None:
        streamer.end()
    input_ids = sequences.ids.clone(memory_format=torch.contiguous_format)
    if not wants:
        return input_ids
    return host.sample_output(
        steps.cache,
        sequences=input_ids,
        scores=scores,
        logits=logits,
        attentions=attentions,
        hidden_states=hidden_states,
    )
