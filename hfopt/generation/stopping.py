"""When a row stops: transformers' criteria, most of them answered from the last token alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from hfopt.host import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, PrefixConstrainedLogitsProcessor

from .agreement import agreed
from .latency import TokenClock

if TYPE_CHECKING:  # it loads Numba
    from hfopt.distributed.ranks import Ranks


def runs_foreign_code(parts: Iterable[Any]) -> bool:
    """Whether one of these (processors, criteria, a streamer) runs code that is neither transformers' nor ours."""
    return any(
        type(each).__module__.partition(".")[0] not in ("transformers", "hfopt")
        or isinstance(each, PrefixConstrainedLogitsProcessor)
        for each in parts
    )


class Stopping:
    """`stopping_criteria` of one request.

    A limit of length is one comparison, an end token one look at the new tokens, and criteria that read
    nothing but the shape get a view of the right one. So sequences are only built for criteria that read
    them (`reads_sequences`: those of a user). ranks: the processes that have the model together; of criteria that may
    differ in them, those of the first one count.
    """

    def __init__(self, stopping_criteria: StoppingCriteriaList, ranks: Ranks | None = None):
        self._ranks = ranks
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
        ends = (criteria.eos_token_id.flatten().tolist() for criteria in by_type[EosTokenCriteria])
        self._ends = frozenset(token for each in ends for token in each)
        self.eos = np.array(sorted(self._ends), np.int64)
        self._times, self._clocks = by_type[MaxTimeCriteria], by_type[TokenClock]
        self.reads_sequences = bool(self._readers)
        # transformers' own test for "finished rows are padded"; a user's criterion may have the attribute
        self.pads_finished = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)

    def left(self, length: int) -> int:
        """How many tokens more can follow `length` tokens, if none of them is in `eos`; 1 if that takes another look."""
        return 1 if self._readers or self._times else self.most(length)

    def most(self, length: int) -> int:
        """How many tokens more the limits of length let follow `length` tokens; 1 if there are none."""
        return int(min((limit.max_length for limit in self._lengths), default=length + 1)) - length

    def __call__(
        self,
        tokens: np.ndarray,
        length: int,
        sequences: Tensor | None,
        scores: tuple[Tensor, ...] | None,
        *,
        is_ahead: bool = False,
    ) -> np.ndarray | None:
        """Which rows stop now: bool [n_rows], or None when none does.

        `tokens` int64 [n_rows] are the newest tokens, `length` counts them and all before; `sequences` int64
        [n_rows, length] may be None unless `reads_sequences`. All criteria are asked each time: some count. is_ahead: the
        next tokens are there already, so that clocks wait for them.
        """
        hits: np.ndarray | None = None
        for limit in self._lengths:
            if length >= limit.max_length:
                hits = np.ones(len(tokens), np.bool_)
            elif limit.max_position_embeddings is not None and length > limit.max_position_embeddings:
                limit(_shaped(tokens, length), scores)  # for its warning
        if not self._ends.isdisjoint(newest := tokens.tolist()):
            hits = _either(hits, np.array([token in self._ends for token in newest]))
        for clock in (*self._times, *(() if is_ahead else self._clocks)):
            hits = _either(hits, clock(_shaped(tokens, length), scores).numpy())
        if self._readers:
            hits = _either(hits, self._readers(sequences, scores).cpu().numpy())
        return agreed(self._ranks, hits, len(tokens)) if self._times or self._readers else hits


def _shaped(tokens: np.ndarray, length: int) -> Tensor:
    return torch.from_numpy(tokens)[:, None].expand(-1, length)


def _either(hits: np.ndarray | None, others: np.ndarray) -> np.ndarray:
    return others if hits is None else hits | others
