"""Attention over the keys and values of an IndirectCache: projections, norms of heads, rotation, cache, output."""

import functools
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hfopt.errors import UnsupportedModel
from hfopt.functional import Epilogue, Mask, Scoring
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
    moment_of,
    remembered,
    stored_tables,
)
from hfopt.patches.block import Block
from hfopt.patches.facts import INDICES, layer_index
from hfopt.patches.guards import attention_obstacle
from hfopt.patches.ops import Ops, X
from hfopt.patches.rotation import Rotation, kind_of
from hfopt.patches.slopes import is_bias_of, slopes_of

_LIVE_SCALES = ("scaling", "softmax_scale")  # attributes with a factor of the scores
SCALES = (*_LIVE_SCALES, "inv_norm_factor")  # which Falcon has, and does not always read
_DIVISOR = "scale_attn"  # or with a divisor


class HeadNorm(NamedTuple):
    """A norm of heads of `size` channels, n_heads from a channel on; path: the module below the attention."""

    path: str
    first: int
    n_heads: int
    size: int


class Ranks(NamedTuple):
    """A bias that counts keys: query heads, channels of one, and how many times attention of this kind adds it."""

    n_heads: int
    head_dim: int
    times: int
    kind: str | None


class Given(NamedTuple):
    """What a call hands to attention besides hidden states and cache.

    n_positions: of a table of its own, which bounds them. layer_type: for which angles are, where there are several kinds.
    n_slopes: heads of an ALiBi bias. hides: its mask says by True what is hidden. max_keys: that it may have. heads:
    (number, channels) of keys that another layer has stored for it. ranks: of a bias that counts keys.
    """

    n_positions: int | None = None
    layer_type: str | None = None
    n_slopes: int = 0
    hides: bool = False
    max_keys: int = sys.maxsize
    heads: tuple[int, int] | None = None
    ranks: Ranks | None = None


_NOTHING = Given()


@dataclass(frozen=True)
class AttentionSpec:
    """Names and sizes of the projections, and which channels turn together ("half": d and d + rot / 2).

    inputs: Linears that give, side by side, the query, key and value heads. norms: of queries, keys and values. rows:
    (first row, rows) of the heads in a single input, in the order of kernels, if it has another one. clip: what limits
    queries, keys and values, an attribute or a field of the configuration; softcap: likewise what limits scores. sinks,
    sub_norm and stores: as in `AttentionParts`.
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
    rows: Rows = ()
    clip: str | None = None
    softcap: str | None = None
    given: Given = _NOTHING
    stores: bool = True
    sinks: str | None = None
    sub_norm: str | None = None

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)

    @property
    def parts(self) -> tuple[str, ...]:
        norms = dict.fromkeys(norm.path.partition(".")[0] for norm in self.norms)
        return (*norms, *(() if self.sub_norm is None else (self.sub_norm,)))

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key heads, channels of one)."""
        return self.n_heads, self.n_kv_heads, self.head_dim

    @property
    def rotation_kind(self) -> str:
        """In `functional.ROTATIONS`."""
        return kind_of(self.rotation)


class Attention(Block):
    """What all kinds share; they differ in where the angles come from."""

    live: ClassVar[tuple[str, ...]] = (*INDICES, *_LIVE_SCALES, _DIVISOR)
    takes = ROLES
    max_keys = sys.maxsize
    slopes: Tensor | None = None  # as in `functional.Scoring`
    ranked = False
    window: int | None = None

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
        if spec.sub_norm is not None:
            attended = ops.part(self, spec.sub_norm, attended)
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
        softcap = None if softcap is None else setting(self, softcap)
        return Scoring(scale, softcap, self.slopes, self.sinks, self.window, self.ranked)

    @property
    def sinks(self) -> Tensor | None:
        """As in `functional.Scoring`."""
        name = self._hfopt.spec.sinks
        return None if name is None else self._parameters[name]

    @property
    def layer(self) -> int:
        """Which of the cache it has."""
        index = layer_index(self)
        assert index is not None, "or it would not have been recognised"
        return index

    def idle_reason(self) -> str | None:
        return super().idle_reason() or attention_obstacle(self)

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        """What gives cos and sin of a call with these arguments; None if kernels cannot take them."""
        raise NotImplementedError

    def takes_bias(self, bias: Any, cache: Any, mask: Mask, sizes: tuple[int, int, int]) -> bool:
        """Whether kernels do what a call means by this position_bias. sizes: rows, new tokens, keys."""
        return bias is None

    def without_bias(self, attention_mask: Any, bias: Any, cache: Any, sizes: tuple[int, int, int]) -> Any:
        """The mask of a call, without what it adds to scores of keys that are seen; raises Declined if kernels add something
        else.
        """
        return attention_mask

    def angle_tables(self, rotary: Any, dtype: torch.dtype) -> AngleTables | None:
        """cos and sin by position; None if positions are in the hidden states already.

        rotary: the model's module that computes them, if it has one. Raises UnsupportedModel.
        """
        raise NotImplementedError


def _no_angles(cache: Any, n_past: int, dtype: torch.dtype) -> tuple[None, None]:
    return None, None


class RotaryAttention(Attention):
    """Llama's: the model hands down cos and sin."""

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        rotation = self._hfopt.spec.rotation
        if position_embeddings is None and rotation == "none":
            return _no_angles
        if not is_pair(position_embeddings):
            return None
        cos, sin = position_embeddings
        return handed_down(cos, sin, rotation)

    def angle_tables(self, rotary: Any, dtype: torch.dtype) -> AngleTables | None:
        spec = self._hfopt.spec
        return computed_tables(rotary, dtype, spec.rotation, spec.given.layer_type)


class UnrotatedAttention(Attention):
    """OPT's: positions are in the hidden states already."""

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        return _no_angles if position_embeddings is None else None

    def angle_tables(self, rotary: Any, dtype: torch.dtype) -> None:
        return None


class AlibiAttention(UnrotatedAttention):
    """BLOOM's: the model hands down what is added to scores."""

    @property
    def slopes(self) -> Tensor:  # type: ignore[override]
        return slopes_of(self._hfopt.spec.n_heads)

    def takes_bias(self, bias: Any, cache: Any, mask: Mask, sizes: tuple[int, int, int]) -> bool:
        n_heads = self._hfopt.spec.n_heads

        def takes() -> bool:
            return is_bias_of(bias, n_heads, mask, sizes)

        if type(bias) is not Tensor:
            return False
        return bool(remembered(cache, "bias", bias, (n_heads, id(mask), *sizes), takes))


class BandAttention(UnrotatedAttention):
    """GPT-Neo's: a buffer of its own says which keys a token may see, all up to itself or a window of them."""

    @property
    def _band(self) -> int | None:
        """How many at most; None if the buffer says something else."""
        band: Any = self._buffers["bias"]
        moment = moment_of(band)
        known = self._hfopt.table
        if known is None or known[0] is not band or known[1] != moment:
            known = self._hfopt.table = band, moment, width_of_band(band)
        return known[2]

    @property
    def max_keys(self) -> int:  # type: ignore[override]
        band: Any = self._buffers["bias"]
        return int(band.shape[-1])

    @property
    def window(self) -> int | None:  # type: ignore[override]
        return self._band

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        return None if self._band is None else super().rotary(position_embeddings, position_ids)

    def angle_tables(self, rotary: Any, dtype: torch.dtype) -> None:
        if self._band is None:
            raise UnsupportedModel("its buffer hides more than keys in front of a window")


class TableAttention(Attention):
    """GPT-J's: sin and cos come out of a table, by position; out of the layer's own, or handed down by the model."""

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        if self._hfopt.spec.given.n_positions is None:
            if not is_pair(position_embeddings):
                return None
            sin, cos = position_embeddings
            return handed_down(cos, sin, self._hfopt.spec.rotation)
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
        moment = moment_of(table)
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


def width_of_band(band: Tensor) -> int | None:
    """How many keys up to its own a token sees by bool [1, 1, n, n]; None if it sees others than such."""
    if band.dtype is not torch.bool or band.dim() != 4 or band.shape[:2] != (1, 1) or not band.numel():
        return None
    shown = band[0, 0]
    width = int(shown[-1].sum())
    expected = torch.ones_like(shown).tril_()
    return width if torch.equal(shown, expected & ~expected.tril(-width)) else None


def setting(module: Any, name: str) -> Any:
    """What a module has under this name, among its attributes or the fields of its configuration; None if nothing."""
    state = module.__dict__
    return state[name] if name in state else getattr(state.get("config"), name, None)
