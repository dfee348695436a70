"""Attention of processes that have a whole model each, and some tokens of a long prompt: context parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hfopt.distributed.group import shared_segment
from hfopt.distributed.ranks import Ranks
from hfopt.functional import Kernels, Mask, Scoring, attend, attend_part, join_parts
from hfopt.kernels.shared import member as layout

if TYPE_CHECKING:
    from hfopt.cache.appended import Appended
    from hfopt.cache.sharded import Heads
    from hfopt.distributed.segment import Segment

_PATIENCE = 1800.0  # seconds for which ranks wait for each other at a layer of a prompt
_CAUSAL = Mask("causal")


class Ring:
    """The ranks of one machine that share long prompts.

    A prompt is cut into 2 n chunks for n ranks, and rank r has chunks r and 2 n - 1 - r, so that all have as many keys to
    look at (the order of https://github.com/zhuzilin/ring-flash-attention). Attention is that of
    https://arxiv.org/abs/2310.01889, blocks of keys in their order with a running softmax, but that keys and values do not
    go round: in each layer all ranks write theirs into memory that they share, and read those of others where they are.

    Behind the prompt a rank keeps keys and values of its own tokens only. Each new token is attended to in n parts, whose
    unfinished softmaxes are joined in the order of ranks, with the same bits on all of them.

    ranks: all of one machine. refusal: in words, why each of them reads all of every prompt, or None.
    """

    refusal: str | None = None

    def __init__(self, ranks: Ranks) -> None:
        self.rank, self.size = ranks.rank, ranks.size
        self._group, self._processes = ranks.shared, ranks.group
        self._segment: Segment | None = None
        self._capacity = self._turn = 0

    def __deepcopy__(self, memo: Any) -> Ring:
        return self  # prompts of a copied model are shared with the same ranks

    def chunks(self, n_tokens: int) -> list[slice]:
        """The tokens that this rank has of a prompt, in two pieces."""
        n_chunks = 2 * self.size
        ends = [n_tokens * index // n_chunks for index in range(n_chunks + 1)]
        return [slice(ends[index], ends[index + 1]) for index in (self.rank, n_chunks - 1 - self.rank)]

    def attend_prompt(
        self,
        qkv: Tensor,
        appended: Appended,
        n_tokens: int,
        scoring: Scoring,
        heads: Heads,
        *,
        by: Kernels,
    ) -> Tensor:
        """`attend` of this rank's tokens of a prompt to all that come before them.

        qkv: [n_rows, n_own, channels], as for `attend`; appended: with the keys and values of those tokens and no others.
        All ranks call it for the same layers of the same prompt. Raises `InvalidInput`, `RankError`.
        """
        n_rows, chunks = len(appended.prefix_row), self.chunks(n_tokens)
        own, shape = appended.prefix, (2, n_rows, heads[1], n_tokens, heads[2])
        keys = self._shared(shape, own.dtype)
        place = 0
        for chunk in chunks:
            n = chunk.stop - chunk.start
            keys[:, :, :, chunk] = own[:, :n_rows, :, place : place + n]
            place += n
        self._group.barrier()
        attended = []
        for chunk, given in zip(
            chunks, qkv.split([each.stop - each.start for each in chunks], 1), strict=True
        ):
            seen = appended._replace(prefix=keys, prefix_len=chunk.stop, n_new=given.shape[1], buffers=None)
            attended.append(attend(given.contiguous(), seen, _CAUSAL, scoring, *heads, by=by))
        return torch.cat(attended, 1)

    def attend_step(
        self,
        qkv: Tensor,
        appended: Appended,
        scoring: Scoring,
        heads: Heads,
    ) -> Tensor:
        """`attend` of one new token a row to the tokens of all ranks.

        appended: with the tokens of this rank, the new one among them in one rank only. All ranks call it with the same
        queries. Raises `InvalidInput`, `RankError`.
        """
        part = attend_part(qkv, appended, scoring, *heads)
        parts = self._group.all_gather(part, 1)
        return join_parts(parts, scoring, heads[0], heads[2], qkv.dtype)

    def of_last(self, logits: Tensor) -> Tensor:
        """Those of the last token of a prompt, which rank 0 has; of all ranks in place."""
        return self._group.broadcast(logits)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """In the block, a prompt is read together, in which ranks may wait for each other for long. An exception ends the
        group: the others would take what this rank does next for its part of the prompt.
        """
        try:
            with self._group.limited(_PATIENCE):
                yield
        except BaseException:
            self._group.close()
            raise

    def meet(self) -> None:
        """Wait for all ranks behind a prompt that each has read for itself, some faster than others."""
        with self._group.limited(_PATIENCE):
            self._group.barrier()

    def _shared(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Memory of all ranks for keys and values of a layer, which none reads any more.

        Two buffers in turn: who writes to one has passed the barrier of the layer that had the other, before which all had
        done with this one.
        """
        n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        n_needed = -(-n_bytes // layout.PAGE) * layout.PAGE
        if n_needed > self._capacity:
            # the memory of a segment is in so many buffers of each rank
            each = -(-2 * n_needed // (layout.BUFFERS * self.size * layout.PAGE)) * layout.PAGE
            self._segment = None
            self._segment = shared_segment(self.rank, self.size, each, self._processes)
            self._capacity = n_needed
        assert self._segment is not None
        self._turn = 1 - self._turn
        first = layout.buffers_at(self.size) + self._turn * self._capacity
        return self._segment.bytes[first : first + n_bytes].view(dtype).reshape(shape)
