"""Beam search and beam sampling.

A step keeps a few numbers per beam and candidate, and no sequence: which beam each new beam grew from, and
its token. A finished sequence is a reference to its last step, and is written out once, by walking back.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from hfopt import host

from ._types import Ids, Model, Outputs
from .collected import Collected
from .pace import Pace
from .passes import Passes
from .selection import continuations, select
from .sequences import Sequences
from .state import installed
from .stopping import Stopping, runs_foreign_code

DEAD = np.float32(-1e9)  # added to the score of what must not be chosen, as in transformers


def beam_search(
    model: Model,
    input_ids: Ids,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Outputs:
    """`GenerationMixin._beam_search` for decoder-only models: same results, same random numbers.

    `input_ids` int64 [n_prompts * num_beams, prompt length]; the other arguments as there.
    """
    collected = Collected(generation_config)
    keeps_log_probs = bool(logits_processor) or generation_config.do_sample or collected.scores is not None

    n_rows, prompt_length = input_ids.shape
    num_beams = int(generation_config.num_beams)
    length = prompt_length
    ends, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
    n_candidates = max(2, 1 + (0 if ends is None else ends.shape[0])) * num_beams
    fill = int(pad or ends[0]) if ends is not None else -1

    stopping = Stopping(stopping_criteria, installed(model).ranks)
    is_foreign = runs_foreign_code([*logits_processor, *stopping_criteria])
    passes = Passes(model, generation_config, model_kwargs, Pace(not is_foreign))
    beams = Beams(n_rows // num_beams, generation_config, prompt_length)
    sequences = Sequences(input_ids)  # grow only if somebody reads them
    outputs = passes.prompt(input_ids)
    reads_sequences = bool(logits_processor) or stopping.reads_sequences or passes.reads_sequences
    while True:
        next_logits = outputs.logits[:, -1]
        if collected.logits is not None:
            next_logits = next_logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
            collected.add_logits(next_logits)
        collected.add_outputs(outputs)
        del outputs  # the logits of a whole prompt may be large

        if keeps_log_probs:
            log_probs = torch.log_softmax(next_logits, dim=-1, dtype=torch.float32)
            log_probs = logits_processor(sequences.ids, log_probs)
            collected.add_scores(log_probs)
            top_scores, top = select(log_probs, beams.scores, n_candidates, generation_config.do_sample)
        else:
            top_scores, top = continuations(next_logits, beams.scores, n_candidates)
        candidates = beams.candidates(top_scores, top, next_logits.shape[-1])

        length += 1
        extended = candidates.extend(sequences.ids) if stopping.reads_sequences else None
        hits = stopping(candidates.tokens, length, extended, collected.scores)
        rows, tokens = beams.advance(candidates, hits)
        if reads_sequences:
            sequences.reorder(rows)
            sequences.append(tokens)
        passes.reorder(torch.from_numpy(rows))
        if beams.done:
            break
        outputs = passes.outputs(tokens, sequences.ids if reads_sequences else None)

    n_best = len(range(num_beams)[: int(generation_config.num_return_sequences)])
    new_tokens, beam_indices, sequences_scores = beams.best(n_best, fill)
    prompts = input_ids.unflatten(0, (-1, num_beams))[:, :n_best].flatten(0, 1)
    best: Ids = torch.cat([prompts, new_tokens], dim=-1)
    if not collected.is_wanted:
        return best
    return host.beam_output(
        passes.cache,
        sequences=best,
        sequences_scores=None if collected.scores is None else sequences_scores,
        beam_indices=beam_indices,
        **collected.fields(),
    )


class Candidates:
    """Continuations of one step, best first.

    `scores` float32, `keys` int64 (beam * n_tokens + token) and `beams` are [n_prompts, n_candidates]; `tokens` int64 are
    flat over both.
    """

    def __init__(self, scores: Tensor, keys: Tensor, n_tokens: int, first_rows: np.ndarray):
        self.scores = scores.numpy()
        self.keys = keys.numpy()
        self.beams, tokens = np.divmod(self.keys, n_tokens)
        self.tokens = tokens.reshape(-1)
        self._first_rows = first_rows

    def extend(self, sequences: Tensor) -> Tensor:
        """The whole sequence of every candidate, int64 [n_prompts * n_candidates, length + 1]."""
        rows = torch.from_numpy((self.beams + self._first_rows).reshape(-1))
        tokens = torch.from_numpy(self.tokens)
        return torch.cat([sequences.index_select(0, rows), tokens[:, None]], dim=-1)


class Beams:
    """The running beams and the best finished sequences of each prompt, by the rules of transformers.

    All arithmetic is float32 in the order in which transformers does it, and equal scores are ordered by
    torch.topk, so that ties fall alike.
    """

    def __init__(self, n_prompts: int, generation_config: GenerationConfig, prompt_length: int):
        # numbers of Python: those of numpy would widen float32, and tensors make tensors of arrays
        self.num_beams = int(generation_config.num_beams)
        self.length_penalty = float(generation_config.length_penalty)
        self.early_stopping = generation_config.early_stopping
        self.max_new_tokens = float(generation_config.max_length) - prompt_length
        self.done = False
        # all beams start equal: only the first may be continued
        self._running = np.zeros((n_prompts, self.num_beams), dtype=np.float32)
        self._running[:, 1:] = DEAD
        # per step int64 [n_prompts, num_beams]: the beam that each beam grew from, and its token
        self._parents: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        # the pool: score, step * num_beams * n_tokens + key (-1: empty), and whether it is finished
        self._scores = np.full((n_prompts, self.num_beams), DEAD)
        self._references = np.full((n_prompts, self.num_beams), -1, dtype=np.int64)
        self._finished = np.zeros((n_prompts, self.num_beams), dtype=np.bool_)
        self._improvable = np.ones((n_prompts, 1), dtype=np.bool_)
        self._n_tokens = 0
        self._prompts = np.arange(n_prompts)[:, None]
        self._first_rows = self._prompts * self.num_beams

    @property
    def scores(self) -> Tensor:
        """Summed log-probabilities of the running beams, float32 [n_prompts, num_beams]."""
        return torch.from_numpy(self._running)

    def candidates(self, scores: Tensor, keys: Tensor, n_tokens: int) -> Candidates:
        self._n_tokens = n_tokens
        return Candidates(scores, keys, n_tokens, self._first_rows)

    def advance(self, candidates: Candidates, hits: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Makes the best candidates the next beams, and pools those that stop here (`hits`, flat bool).

        Returns the row that each new beam grew from, int32, and its token, int64, [n_prompts * num_beams].
        """
        scores, keys = candidates.scores, candidates.keys
        stopped = np.zeros(keys.shape, dtype=np.bool_) if hits is None else hits.reshape(keys.shape)
        self._collect(scores, keys, stopped)

        running = scores + stopped * DEAD
        best = self._prompts, _top(running, self.num_beams)
        self._running = running[best]
        parents, tokens = candidates.beams[best], candidates.tokens.reshape(keys.shape)[best]
        self._parents.append(parents)
        self._tokens.append(tokens)
        self.done = self._is_done(stopped)
        return (parents + self._first_rows).astype(np.int32).reshape(-1), tokens.reshape(-1)

    def _collect(self, scores: np.ndarray, keys: np.ndarray, stopped: np.ndarray) -> None:
        step = len(self._parents)
        stopped = stopped.copy()
        stopped[:, self.num_beams :] = False  # the rest only stands by to keep enough beams running
        final = scores / (step + 1) ** self.length_penalty
        final += (self._finished.all(axis=1, keepdims=True) & (self.early_stopping is True)) * DEAD
        final += ~self._improvable * DEAD
        final += ~stopped * DEAD
        scores = np.concatenate([self._scores, final], axis=1)
        references = np.concatenate([self._references, step * self.num_beams * self._n_tokens + keys], axis=1)
        finished = np.concatenate([self._finished, stopped], axis=1)
        best = self._prompts, _top(scores, self.num_beams)
        self._scores, self._references, self._finished = scores[best], references[best], finished[best]

    def _is_done(self, stopped: np.ndarray) -> bool:
        n_new = len(self._parents)
        grows = self.early_stopping == "never" and self.length_penalty > 0.0
        longest = self.max_new_tokens if grows else n_new
        possible = self._running[:, :1] / longest**self.length_penalty
        worst = np.where(self._finished, self._scores.min(axis=1, keepdims=True), DEAD)
        self._improvable &= (possible > worst).any(axis=1, keepdims=True)
        full = self.early_stopping is True and bool(self._finished.all())
        return not self._improvable.any() or full or bool(stopped.all())

    def best(self, n_best: int, fill: int) -> tuple[Tensor, Ids, Tensor]:
        """The first `n_best` of the pool, as long as the longest of them.

        Tokens int64 [n_prompts * n_best, length] (`fill` after the end), the row that each token grew from
        int32 (-1 after the end), and scores float32 [n_prompts * n_best].
        """
        n_prompts = len(self._references)
        prompt = np.repeat(np.arange(n_prompts), n_best)
        last, keys = divmod(self._references[:, :n_best].reshape(-1), self.num_beams * self._n_tokens)
        length = int(last.max()) + 1
        tokens = np.full((n_prompts * n_best, length), fill, dtype=np.int64)
        beam_indices = np.full((n_prompts * n_best, length), -1, dtype=np.int32)
        beam = np.zeros_like(prompt)
        for step in reversed(range(length)):
            inside, ends = last >= step, last == step
            parent = np.where(ends, keys // self._n_tokens, self._parents[step][prompt, beam])
            token = np.where(ends, keys % self._n_tokens, self._tokens[step][prompt, beam])
            tokens[inside, step] = token[inside]
            beam_indices[inside, step] = (parent + prompt * self.num_beams)[inside]
            beam = np.where(inside, parent, beam)
        scores = self._scores[:, :n_best].reshape(-1)
        return torch.from_numpy(tokens), torch.from_numpy(beam_indices), torch.from_numpy(scores)


def _top(scores: np.ndarray, n_best: int) -> np.ndarray:
    return torch.topk(torch.from_numpy(scores), n_best).indices.numpy()
