"""When a row stops: transformers' criteria, most of them answered from the last token alone."""

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList

from .latency import TokenClock


class Stopping:
    """`stopping_criteria` of one request.

    A limit of length is one comparison, an end token one look at the new tokens, and criteria that read
    nothing but the shape get a view of the right one. So sequences are only built for criteria that read
    them (`reads_sequences`: those of a user).
    """

    def __init__(self, stopping_criteria: StoppingCriteriaList):
        by_type: dict[type, list] = {
            MaxLengthCriteria: [],
            EosTokenCriteria: [],
            MaxTimeCriteria: [],
            TokenClock: [],
        }
        self._readers = StoppingCriteriaList(
            [criteria for criteria in stopping_criteria if type(criteria) not in by_type]
        )
        for criteria in stopping_criteria:
            if type(criteria) in by_type:
                by_type[type(criteria)].append(criteria)
        self._lengths = by_type[MaxLengthCriteria]
        self._ends = by_type[EosTokenCriteria]
        self._clocks = by_type[MaxTimeCriteria] + by_type[TokenClock]
        self.reads_sequences = bool(self._readers)
        # transformers' own test for "finished rows are padded"; a user's criterion may have the attribute
        self.pads_finished = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)

    def __call__(
        self, tokens: Tensor, length: int, sequences: Tensor | None, scores: tuple[Tensor, ...] | None
    ) -> Tensor | None:
        """Which rows stop now: bool [n_rows], or None when none does.

        `tokens` int64 [n_rows] are the newest tokens, `length` counts them and all before; `sequences` int64
        [n_rows, length] may be None unless `reads_sequences`. All criteria are asked each time: some count.
        """
        hits: Tensor | None = None
        for limit in self._lengths:
            if length >= limit.max_length:
                hits = torch.ones_like(tokens, dtype=torch.bool)
            elif limit.max_position_embeddings is not None and length > limit.max_position_embeddings:
                limit(tokens[:, None].expand(-1, length), scores)  # for its warning
        for end in self._ends:
            ended = torch.isin(tokens, end.eos_token_id.to(tokens.device))
            hits = ended if hits is None else hits | ended
        for clock in self._clocks:
            stopped = clock(tokens[:, None].expand(-1, length), scores)
            hits = stopped if hits is None else hits | stopped
        if self._readers:
            stopped = self._readers(sequences, scores)
            hits = stopped if hits is None else hits | stopped
        return hits
