"""Attention over the keys and values of an IndirectCache: projections, norms of heads, rotation, cache, output."""

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from hfopt.errors import UnsupportedModel
from hfopt.functional import Epilogue, Scoring
from hfopt.functional.linear import Rows
from hfopt.host import ROLES
from hfopt.patches.angles import (
    Angles,
    AngleTables,
    computed_tables,
    digest_of,
    handed_down,
    is_pair,
    looked_up,
    stored_tables,
)
from hfopt.patches.block import Block
from hfopt.patches.guards import attention_obstacle
from hfopt.patches.ops import Ops, X
from hfopt.patches.rotation import Rotation, kind_of

SCALES = ("scaling", "softmax_scale", "inv_norm_factor")  # attributes with a factor of the scores
_DIVISOR = "scale_attn"  # or with a divisor


class HeadNorm(NamedTuple):
    """A norm of `count` heads of `size` channels from a channel on; path: the module below the attention."""

    path: str
    first: int
    count: int
    size: int


@dataclass(frozen=True)
class AttentionSpec:
    """Names and sizes of the projections, and which channels turn together ("half": d and d + rot / 2).

    inputs: Linears that give, side by side, the query, key and value heads. norms: of queries and keys. rows: (first row, rows) of the heads in a single input, in
    the order of kernels, if it has another one. clip: what limits queries, keys and values, an attribute or a
    field of the configuration; softcap: likewise what limits scores. layer_type: for which angles are, where there are several kinds. stores: as in
    `AttentionParts`.
    """

    inputs: tuple[str, ...]
    output: str
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotation: Rotation
    norms: tuple[HeadNorm, ...] = ()
    norms_last: bool = False  # behind the rotation
    n_positions: int | None = None  # of a table of its own
    rows: Rows = ()
    clip: str | None = None
    softcap: str | None = None
    layer_type: str | None = None
    stores: bool = True

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(norm.path.partition(".")[0] for norm in self.norms))

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key heads, channels of one)."""
        return self.n_heads, self.n_kv_heads, self.head_dim

    @property
    def reads_heads(self) -> tuple[int, int] | None:
        """(key heads, channels of one) in the cache of another layer, if it has none of its own."""
        return None if self.stores else (self.n_kv_heads, self.head_dim)

    @property
    def rotation_kind(self) -> str:
        """In `functional.ROTATIONS`."""
        return kind_of(self.rotation)


class Attention(Block):
    """What all kinds share; they differ in where the angles come from."""

    layer_idx: int
    live: ClassVar[tuple[str, ...]] = ("layer_idx", *SCALES, _DIVISOR)
    takes = ROLES

    def run(self, ops: Ops[X], x: X, residuals: Sequence[X] = ()) -> X:
        spec = self._hfopt.spec
        inputs, output = (
            ops.weights(self, "inputs", spec.inputs, spec.rows),
            ops.weights(self, "output", (spec.output,)),
        )
        past = ops.past(self, x)
        qkv = ops.linear(x, inputs)
        limit = None if spec.clip is None else setting(self, spec.clip)
        if limit is not None:
            qkv = ops.clamp(qkv, limit)
        n_rotated = spec.n_heads + (spec.n_kv_heads if spec.stores else 0)
        if spec.norms_last:
            ops.rotate(self, qkv, past, n_rotated)
        for norm in spec.norms:
            ops.norm_heads(self, qkv, *norm)
        if spec.stores:
            past = ops.store(self, qkv, past, rotates=not spec.norms_last)
        elif not spec.norms_last:
            ops.rotate(self, qkv, past, n_rotated)
        attended = ops.attend(self, qkv, past)
        return ops.linear(attended, output, Epilogue(residuals=residuals))

    @property
    def scoring(self) -> Scoring:
        """How scores come about."""
        state = self.__dict__
        if _DIVISOR in state:
            scale = 1.0 / float(state[_DIVISOR])
        else:
            scale = next((float(state[name]) for name in SCALES if name in state), 1.0)
        softcap = self._hfopt.spec.softcap
        return Scoring(scale, None if softcap is None else setting(self, softcap))

    def idle_reason(self) -> str | None:
        return super().idle_reason() or attention_obstacle(self)

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        """What gives cos and sin of a call with these arguments; None if kernels cannot take them."""
        raise NotImplementedError

    def angle_tables(self, rotary: Any, dtype: torch.dtype) -> AngleTables | None:
        """cos and sin by position; None if positions are in the hidden states already.

        rotary: the model's module that computes them, if it has one. Raises UnsupportedModel.
        """
        raise NotImplementedError


class RotaryAttention(Attention):
    """Llama's: the model hands down cos and sin."""

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        if not is_pair(position_embeddings):
            return None
        return handed_down(*position_embeddings, self._hfopt.spec.rotation)

    def angle_tables(self, rotary: Any, dtype: torch.dtype) -> AngleTables | None:
        spec = self._hfopt.spec
        return computed_tables(rotary, dtype, spec.rotation, spec.layer_type)


class UnrotatedAttention(Attention):
    """OPT's: positions are in the hidden states already."""

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        return (lambda *_: (None, None)) if position_embeddings is None else None

    def angle_tables(self, rotary: Any, dtype: torch.dtype) -> None:
        return None


class TableAttention(Attention):
    """GPT-J's: sin and cos come out of a table, by position; out of the layer's own, or handed down by the model."""

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        if self._hfopt.spec.n_positions is None:
            if not is_pair(position_embeddings):
                return None
            return handed_down(*position_embeddings[::-1], self._hfopt.spec.rotation)
        if type(position_ids) is not torch.Tensor or position_ids.dim() != 2:
            return None
        table: Any = self._buffers["embed_positions"]
        return looked_up(table, position_ids, self._digest) if position_embeddings is None else None

    @property
    def _digest(self) -> int | None:
        """Tells different tables apart, where layers have their own."""
        table: Any = self._buffers.get("embed_positions")
        if table is None:
            return None
        moment = table.data_ptr(), -1 if table.is_inference() else table._version
        known = self._hfopt.table
        if known is None or known[0] is not table or known[1] != moment:
            known = self._hfopt.table = table, moment, digest_of(table)
        return known[2]

    def angle_tables(self, rotary: Any, dtype: torch.dtype) -> AngleTables:
        key: Hashable = self._digest
        owner = self if rotary is None else rotary
        table: Any = owner._buffers.get("embed_positions")
        if table is None:
            raise UnsupportedModel(f"{type(owner).__name__} has no table of angles")
        return stored_tables(table, key, dtype)


def setting(module: Any, name: str) -> Any:
    """What a module has under this name, among its attributes or the fields of its configuration; None if nothing."""
    state = module.__dict__
    return state[name] if name in state else getattr(state.get("config"), name, None)
