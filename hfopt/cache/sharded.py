"""ShardedLayer: a layer of which each of several processes holds some tokens."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from hfopt.cache.appended import Appended
from hfopt.cache.layer import IndirectLayer
from hfopt.cache.row_map import RowMap
from hfopt.errors import InvalidInput

Heads: TypeAlias = tuple[int, int, int]  # of queries, of keys, channels of one


class Ring(Protocol):
    """The processes, as `distributed.Ring` has them; this one is `rank` of `size`."""

    rank: int
    size: int

    def attend_prompt(
        self, qkv: Tensor, appended: Appended, n_tokens: int, scoring: Any, heads: Heads, *, by: Any
    ) -> Tensor: ...

    def attend_step(self, qkv: Tensor, appended: Appended, scoring: Any, heads: Heads) -> Tensor: ...


class Share(NamedTuple):
    """What this process has of a prompt.

    n_tokens: of all processes; n_own: that this one reads.
    """

    ring: Ring
    n_tokens: int
    n_own: int


class ShardedLayer(IndirectLayer):
    """An `IndirectLayer` as long as a prompt and what follows it, with the keys and values of this process's tokens.

    First come all of its tokens of the prompt, then one token a row at a time, which each process stores in its turn. In
    which order keys lie says nothing of where their tokens are. Nothing else can be done with it: rows are not reordered,
    and nothing is removed.
    """

    n_tokens = 0  # of all processes

    def __init__(self, share: Share, rows: RowMap, n_following: int = 0) -> None:
        self.share = share
        super().__init__(rows, n_following)

    def _drop(self) -> None:
        self.n_tokens = 0
        super()._drop()

    def get_seq_length(self) -> int:
        return self.n_tokens

    def append(self, n_rows: int, n_new: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Appended:
        """Room for the new tokens, all of which have to be written; those of other processes are not held after that."""
        share, n_past = self.share, self.n_tokens
        if n_new != (1 if n_past else share.n_own):
            raise InvalidInput(
                f"n_new = {n_new} behind {n_past} tokens: this cache is that of one prompt and its steps"
            )
        if n_past and not self.rows.is_identity:
            raise InvalidInput("the rows of a cache that processes have together cannot be reordered")
        appended = super().append(n_rows, n_new, n_kv_heads, head_dim, dtype)
        if not n_past:
            self.n_tokens = share.n_tokens
            return appended
        if n_past % share.ring.size != share.ring.rank:
            self.prefix_len -= 1
        self.n_tokens += 1
        return appended

    def attend(self, qkv: Tensor, appended: Appended, scoring: Any, heads: Heads, by: Any) -> Tensor:
        """Attention of the tokens that have been appended and written: see `functional.attend`."""
        ring = self.share.ring
        if appended.n_new > 1:
            return ring.attend_prompt(qkv, appended, self.share.n_tokens, scoring, heads, by=by)
        return ring.attend_step(qkv, self.appended(1, 0), scoring, heads)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise InvalidInput("a cache that processes have together is for hfopt's attention only")

    def cropped_length(self, tokens_to_remove: int) -> int:
        raise InvalidInput("a cache that processes have together cannot be cropped")
