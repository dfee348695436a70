"""Greedy search and sampling, one row of tokens a step."""

from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer

from hfopt import host

from ._types import Ids, Model, Outputs
from .collected import Collected
from .derivation import Derivation
from .draft import Choice, DraftModel
from .grammar import begun
from .lookup import PromptLookup
from .pace import CALL_SECONDS, Greedy, Pace
from .passes import Passes
from .selection import argmax, drawn
from .sequences import Sequences
from .speculation import MOST, Speculation
from .state import installed
from .stopping import Stopping, runs_foreign_code

_STREAMED_SECONDS = 0.02  # after which a streamer has a token that was made; no reader sees so little


def sample(
    model: Model,
    input_ids: Ids,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    *,
    lookup: host.Lookup | None = None,
    draft: Model | None = None,
    **model_kwargs: Any,
) -> Outputs:
    """`GenerationMixin._sample` for decoder-only models: same results, same random numbers.

    lookup: how tokens are guessed from the text; draft: the model that guesses them. Neither changes any.
    """
    ranks = installed(model).ranks
    stopping = Stopping(stopping_criteria, ranks)
    is_foreign = runs_foreign_code([*logits_processor, *stopping_criteria])
    if streamer is not None and not host.only_hands_on(streamer):
        is_foreign = True
    wait = 0.0 if is_foreign else CALL_SECONDS if streamer is None else _STREAMED_SECONDS
    pad: Any = generation_config._pad_token_tensor
    collected = Collected(generation_config)
    speculation = None
    if draft is not None:
        choice = Choice(logits_processor, generation_config.do_sample)
        mask, n_known = model_kwargs.get("attention_mask"), host.vocabulary(model)
        guesser = DraftModel(draft, input_ids, mask, choice, generation_config.max_length, n_known, ranks)
        speculation = Speculation(guesser, MOST, installed(model).costs)
    elif lookup is not None:
        lookup_guesser = PromptLookup(input_ids.numpy(), lookup.longest)
        speculation = Speculation(lookup_guesser, lookup.most, installed(model).costs)
    logits_processor, guesses = begun(logits_processor, len(input_ids), speculation, installed(model).costs)
    passes = Passes(model, generation_config, model_kwargs, Pace(not is_foreign, wait, guesses))
    pick = _Pick(logits_processor, generation_config.do_sample, collected)
    greedy = None
    if not (logits_processor or generation_config.do_sample) and collected.is_nothing:
        greedy = Greedy(stopping.eos, int(pad) if stopping.pads_finished else 0)

    sequences = Sequences(input_ids)
    finished: np.ndarray | None = None
    try:
        tokens = pick(passes.prompt(input_ids), input_ids)
        reads_sequences = bool(logits_processor) or stopping.reads_sequences or passes.reads_sequences
        ids: Ids = input_ids
        while True:
            if finished is not None and stopping.pads_finished:
                tokens = np.where(finished, int(pad), tokens)
            sequences.append(tokens)
            if reads_sequences:
                ids = sequences.ids
            hits = stopping(tokens, sequences.length, ids, collected.scores, is_ahead=passes.is_ahead)
            if hits is not None:
                finished = hits if finished is None else finished | hits
            if streamer is not None:
                streamer.put(torch.from_numpy(tokens.copy()))
            if finished is not None and finished.all():
                break
            most = stopping.most(sequences.length)
            padded = finished if stopping.pads_finished else None
            if greedy is None:
                tokens = pick(passes.outputs(tokens, ids, most, padded, 0 if pad is None else int(pad)), ids)
            else:
                tokens = passes.choose(
                    tokens, ids, greedy, max_steps=stopping.left(sequences.length), finished=padded, most=most
                )
    finally:  # in the middle too: Ctrl-C, or a streamer whose client has gone
        passes.take_back()

    if streamer is not None:
        streamer.end()
    input_ids = sequences.ids.clone(memory_format=torch.contiguous_format)
    if not collected.is_wanted:
        return input_ids
    return host.sample_output(passes.cache, sequences=input_ids, **collected.fields())


class _Pick:
    """The next token of each row by the outputs of a step, some of which are kept."""

    def __init__(self, logits_processor: LogitsProcessorList, is_random: bool, collected: Collected) -> None:
        self._logits_processor, self._is_random, self._collected = logits_processor, is_random, collected
        # processors may write into what they get, and what is returned outlives the step
        keeps = not (collected.scores is None and collected.logits is None)
        self._copies = bool(logits_processor) or keeps
        self._derivation: Derivation | None = None
        if len(logits_processor) == 1 and not (is_random or keeps):
            (only,) = logits_processor
            self._derivation = only if isinstance(only, Derivation) else None

    def __call__(self, outputs: Outputs, ids: Ids) -> np.ndarray:
        """int64 [n_rows]; ids: all tokens so far, [n_rows, length]."""
        logits = outputs.logits[:, -1]
        if self._derivation is not None:
            self._collected.add_outputs(outputs)
            return self._derivation.choose(logits)
        if self._copies:
            logits = logits.to(copy=True, dtype=torch.float32, device=ids.device)
        scores = self._logits_processor(ids, logits)
        self._collected.add_scores(scores)
        self._collected.add_logits(logits)
        self._collected.add_outputs(outputs)
        if not self._is_random:
            return argmax(scores).numpy()
        return drawn(scores).numpy()
