"""Attention with separate query, key and value projections, over the keys and values of an IndirectCache."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from hfopt import functional
from hfopt.cache import IndirectCache
from hfopt.errors import InvalidInput, UnsupportedModel
from hfopt.host import ROLES
from hfopt.patches.guards import attention_kind, attention_obstacle, wants_attentions
from hfopt.patches.linear import (
    are_others_bare,
    bypass_obstacle,
    can_multiply,
    is_linear,
    read_children,
    weights_of,
)
from hfopt.patches.pattern import Pattern, has_children, owns_nothing, unknown_parts
from hfopt.patches.replacement import Replacement
from hfopt.program.builder import Builder
from hfopt.program.program import Table
from hfopt.program.writer import Slot

Rotary = tuple[torch.Tensor | None, torch.Tensor | None]
# (cache, number of tokens in it, dtype) -> cos and sin of the new tokens
Angles = Callable[[IndirectCache, int, torch.dtype], Rotary]

# kinds of rotary embedding (transformers' `rope_type`) whose angles follow from the position alone
_ANGLES = 1024  # positions that are computed together
_STATIC_ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True)
class AttentionSpec:
    """Names and sizes of the projections, and which channels turn together ("half": d and d + rot / 2)."""

    output: str
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotation: Literal["half", "interleaved", "none"]
    n_positions: int | None = None  # of a table of its own

    inputs = ("q_proj", "k_proj", "v_proj")

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)


def remembered(
    cache: IndirectCache,
    tag: str,
    tensor: torch.Tensor,
    moment: tuple[int | None, ...],
    build: Callable[[], Any],
) -> Any:
    """`build()`, shared by the layers of one step.

    The cache remembers by identity alone; `moment` tells steps apart that write into one tensor.
    """
    moment = (*moment, -1 if tensor.is_inference() else tensor._version)
    entry: list[Any] = cache.memo(tag, tensor, lambda: [moment, build()])
    if entry[0] != moment:
        entry[:] = [moment, build()]
    return entry[1]


def _takes_appends(cache: Any, layer_idx: int) -> bool:
    """Whether the cache is ours, and so is this layer of it (that of a sliding window is transformers')."""
    if not isinstance(cache, IndirectCache):
        return False
    return layer_idx >= len(cache.layers) or hasattr(cache.layers[layer_idx], "append")


def _are_angles(cos: torch.Tensor, n_rows: int, n_new: int) -> bool:
    """Whether there is a vector of angles for each new token: what transformers broadcasts may have one for all."""
    shape = cos.shape
    return cos.is_floating_point() and len(shape) == 3 and shape[0] in (1, n_rows) and shape[1] == n_new


class Attention(Replacement):
    """What all kinds share: launches for q, k and v, for rotating and storing, for reading the cache."""

    layer_idx: int
    live: ClassVar[tuple[str, ...]] = ("layer_idx", "scaling")
    table: int | None = None  # tells different tables of angles apart, where layers have their own

    takes = ROLES

    def compute(self, hidden_states: torch.Tensor, **roles: Any) -> torch.Tensor | None:
        return self.attend(hidden_states, **roles)

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        """What gives cos and sin of a call with these arguments; None if kernels cannot take them."""
        raise NotImplementedError

    def _scale(self) -> float:
        scale: float = self.__dict__["scaling"]
        return scale

    def attend(
        self,
        hidden_states: torch.Tensor,
        residuals: Sequence[torch.Tensor] = (),
        *,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: Any = None,
        position_ids: Any = None,
        cache: Any = None,
        use_cache: Any = None,
    ) -> torch.Tensor | None:
        """The output plus the residuals; None, with the cache untouched, if kernels cannot do it."""
        spec, by = self._hfopt.spec, self._hfopt.kernels
        rotary, kind = self.rotary(position_embeddings, position_ids), attention_kind(self)
        layer_idx = 0 if cache is None else self.layer_idx
        cache = IndirectCache() if cache is None else cache
        if rotary is None or kind is None or not _takes_appends(cache, layer_idx) or wants_attentions(self):
            return None
        inputs = read_children(self, "inputs", spec.inputs)
        output = read_children(self, "output", (spec.output,))
        if inputs is None or output is None or hidden_states.dim() != 3:
            return None
        if not can_multiply((inputs, output), (hidden_states, *residuals)) or not are_others_bare(self):
            return None

        n_rows, n_new, _ = hidden_states.shape
        dtype = hidden_states.dtype
        n_past = cache.get_seq_length(layer_idx)
        mask = self._mask(cache, attention_mask, kind, n_rows, n_new, n_past + n_new)
        if mask is None or mask.kind == "unsupported":
            return None
        cos, sin = rotary(cache, n_past, dtype)
        if cos is not None and not _are_angles(cos, n_rows, n_new):
            return None

        qkv = functional.linear(hidden_states.contiguous(), inputs, by=by)
        heads = (spec.n_heads, spec.n_kv_heads, spec.head_dim)
        appended = cache.append(layer_idx, n_rows, n_new, spec.n_kv_heads, spec.head_dim, dtype)
        functional.rotate_and_store(qkv, cos, sin, appended, *heads, rotation=spec.rotation)
        attended = functional.attend(qkv, appended, mask, self._scale(), *heads, by=by)
        residuals = [residual.contiguous() for residual in residuals]
        return functional.linear(attended, output, residuals=residuals, by=by)

    def idle_reason(self) -> str | None:
        return super().idle_reason() or attention_obstacle(self) or bypass_obstacle(self)

    def emit(self, builder: Builder, x: Slot, residuals: Sequence[Slot], angles: Any) -> Slot:
        """`attend` as instructions; angles: the slots of cos and sin, or None."""
        spec = self._hfopt.spec
        inputs, output = weights_of(self, "inputs", spec.inputs), weights_of(self, "output", (spec.output,))
        heads = spec.n_heads, spec.n_kv_heads, spec.head_dim
        qkv = builder.linear(x, inputs)
        builder.rotate_and_store(qkv, self.layer_idx, heads, spec.rotation, angles)
        attended = builder.attend(qkv, self.layer_idx, heads, self._scale())
        builder.release(qkv)
        out = builder.linear(attended, output, residuals=residuals)
        builder.release(attended)
        return out

    def angle_tables(self, rotary: Any, dtype: torch.dtype) -> tuple[Table, Table] | None:
        """cos and sin by position, float32; None if positions are in the hidden states already.

        rotary: the model's module that computes them, if it has one. Raises UnsupportedModel.
        """
        return None

    def _mask(
        self, cache: IndirectCache, attention_mask: Any, kind: str, n_rows: int, n_new: int, n_keys: int
    ) -> Any:
        sizes = (n_rows, n_new, n_keys)
        if attention_mask is None:
            # without a mask, only torch's own attention takes several tokens as causal, and only the first ones
            is_causal = kind == "sdpa" and n_keys == n_new
            return functional.prepare_mask(None, *sizes) if n_new == 1 or is_causal else None
        if type(attention_mask) is not torch.Tensor:
            return None
        if attention_mask.shape[-1] < n_keys:
            return None  # stands for all keys, or is wrong
        if kind == "eager" and not attention_mask.is_floating_point():
            return None  # it is added, whatever it is
        return remembered(
            cache, "mask", attention_mask, sizes, lambda: functional.prepare_mask(attention_mask, *sizes)
        )


def _handed_down(cos: torch.Tensor, sin: torch.Tensor) -> Angles:
    """Angles that the model has computed for all layers."""

    def rotary(cache: IndirectCache, n_past: int, dtype: torch.dtype) -> Rotary:
        if cos.dtype is torch.float32 and cos.is_contiguous() and sin.is_contiguous():
            return cos, sin
        found: Rotary = remembered(
            cache, "rotary", cos, (n_past,), lambda: (cos.float().contiguous(), sin.float().contiguous())
        )
        return found

    return rotary


def _is_pair(position_embeddings: Any) -> bool:
    return (
        type(position_embeddings) is tuple
        and len(position_embeddings) == 2
        and all(type(each) is torch.Tensor for each in position_embeddings)
    )


class RotaryAttention(Attention):
    """Llama's: the model hands down cos and sin."""

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        return _handed_down(*position_embeddings) if _is_pair(position_embeddings) else None

    def angle_tables(self, rotary: Any, dtype: torch.dtype) -> tuple[Table, Table]:
        if rotary is None or getattr(rotary, "rope_type", None) not in _STATIC_ROTATIONS:
            kind = getattr(rotary, "rope_type", type(rotary).__name__)
            raise UnsupportedModel(f"rotary embedding {kind!r} depends on more than a token's position")

        def angles(which: int, n: int) -> torch.Tensor:
            n_positions = _ANGLES * -(-n // _ANGLES)
            with torch.inference_mode(False), torch.no_grad():
                found = rotary(torch.empty(0, dtype=dtype), torch.arange(n_positions)[None])[which][0]
            return found.float().contiguous()

        cos, sin = (functools.partial(angles, which) for which in range(2))
        return Table(cos(_ANGLES), cos), Table(sin(_ANGLES), sin)


class UnrotatedAttention(Attention):
    """OPT's: positions are in the hidden states already."""

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        return (lambda *_: (None, None)) if position_embeddings is None else None


class TableAttention(Attention):
    """GPT-J's: sin and cos come out of a table, by position; out of the layer's own, or handed down by the model."""

    live = ("layer_idx", "scale_attn", "scaling")

    def _scale(self) -> float:
        state = self.__dict__
        return 1.0 / float(state["scale_attn"]) if "scale_attn" in state else super()._scale()

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        if self._hfopt.spec.n_positions is None:
            return _handed_down(*position_embeddings[::-1]) if _is_pair(position_embeddings) else None
        if (
            type(position_ids) is not torch.Tensor
            or position_ids.dim() != 2
            or position_embeddings is not None
        ):
            return None
        positions: torch.Tensor = position_ids

        def rotary(cache: IndirectCache, n_past: int, dtype: torch.dtype) -> Rotary:
            build = functools.partial(_look_up, self._buffers["embed_positions"], positions, dtype)
            found: Rotary = remembered(cache, "rotary", positions, (n_past, self.table), build)
            return found

        return rotary

    @property
    def table(self) -> int | None:  # type: ignore[override]
        table: Any = self._buffers.get("embed_positions")
        if table is None:
            return None
        moment = table.data_ptr(), -1 if table.is_inference() else table._version
        known = self._hfopt.table
        if known is None or known[0] is not table or known[1] != moment:
            digest = hashlib.blake2b(repr((table.dtype, table.shape)).encode(), digest_size=16)
            digest.update(table.detach().contiguous().view(torch.uint8).numpy())
            known = self._hfopt.table = table, moment, int.from_bytes(digest.digest(), "little")
        return known[2]

    def angle_tables(self, rotary: Any, dtype: torch.dtype) -> tuple[Table, Table]:
        owner = self if rotary is None else rotary
        table: Any = owner._buffers.get("embed_positions")
        if table is None:
            raise UnsupportedModel(f"{type(owner).__name__} has no table of angles")
        cos, sin = _look_up(table, torch.arange(len(table)), dtype)
        return Table(cos), Table(sin)


def _look_up(table: Any, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    lowest, highest = position_ids.aminmax()
    if lowest < 0 or highest >= table.shape[0]:
        raise InvalidInput(
            f"position_ids: {int(lowest if lowest < 0 else highest)} is outside the model's positions,"
            f" 0 to {table.shape[0] - 1}"
        )
    # the module rounds to its own dtype first
    sin, cos = table[position_ids].to(dtype).float().chunk(2, dim=-1)
    return cos.contiguous(), sin.contiguous()


# ---- recognition -------------------------------------------------------------------------------------------

_ROTARY_PARTS = ("head_dim", "is_causal", "layer_type", "num_key_value_groups", "scaling", "sliding_window")
_UNROTATED_PARTS = ("dropout", "embed_dim", "enable_bias", "head_dim", "is_causal", "num_heads", "scaling")
_TABLE_PARTS = (
    "embed_dim", "embed_positions", "head_dim", "is_causal", "max_positions", "num_attention_heads",
    "pos_embd_dim", "rotary_dim", "scale_attn", "scaling",
)  # fmt: skip


def _projections(module: Any, output: str) -> tuple[int, int, int] | str:
    """(hidden size, query heads, key and value heads), or what is wrong with the projections."""
    names = (*AttentionSpec.inputs, output)
    wrapped = next((name for name in names if not is_linear(module._modules[name])), None)
    if wrapped is not None:
        return f"{wrapped} is a {type(module._modules[wrapped]).__name__}, not a plain Linear"
    q, k, v, o = (module._modules[name] for name in names)
    head_dim = module.head_dim
    fits = q.in_features == k.in_features == v.in_features == o.out_features
    fits = fits and k.out_features == v.out_features and o.in_features == q.out_features
    if not fits or q.out_features % k.out_features or k.out_features % head_dim:
        return "its projections do not fit together"
    return q.in_features, q.out_features // head_dim, k.out_features // head_dim


def _flaw(module: Any, kind: type[Attention], parts: Sequence[str], *needs: str) -> str | None:
    if module.is_causal is not True:
        return "its attention is not causal"
    if not isinstance(module.layer_idx, int):
        return "it has no layer_idx"
    return attention_obstacle(module) or unknown_parts(
        module, kind, parts, needs=("attention_mask", "cache", *needs)
    )


def _recognise_rotary(module: Any) -> AttentionSpec | str | None:
    if not has_children(module, ("q_proj", "k_proj", "v_proj", "o_proj")):
        resembles = {"q_proj", "k_proj", "v_proj", "o_proj"} <= set(module._modules)
        return f"unknown children beside its projections ({_others(module, 'o_proj')})" if resembles else None
    if not owns_nothing(module):
        return "parameters or buffers of its own"
    if not {"head_dim", "is_causal", "layer_idx", "scaling"} <= set(vars(module)):
        return "no head_dim, is_causal, layer_idx or scaling"
    flaw = _flaw(module, RotaryAttention, _ROTARY_PARTS, "position_embeddings")
    sizes = flaw or _projections(module, "o_proj")
    return sizes if isinstance(sizes, str) else AttentionSpec("o_proj", *sizes, module.head_dim, "half")


def _recognise_unrotated(module: Any) -> AttentionSpec | str | None:
    if not has_children(module, ("q_proj", "k_proj", "v_proj", "out_proj")) or not owns_nothing(module):
        return None
    if not {"head_dim", "is_causal", "layer_idx", "scaling"} <= set(vars(module)):
        return "no head_dim, is_causal, layer_idx or scaling"
    flaw = _flaw(module, UnrotatedAttention, _UNROTATED_PARTS)
    sizes = flaw or _projections(module, "out_proj")
    return sizes if isinstance(sizes, str) else AttentionSpec("out_proj", *sizes, module.head_dim, "none")


def _recognise_table(module: Any) -> AttentionSpec | str | None:
    required = ("q_proj", "k_proj", "v_proj", "out_proj", "resid_dropout")
    if not has_children(module, required, ("attn_dropout",)) or module._parameters:
        return None
    table = module._buffers.get("embed_positions")
    if set(module._buffers) != ({"embed_positions"} if table is not None else set()):
        return None
    if not {"head_dim", "is_causal", "layer_idx"} <= set(vars(module)):
        return "no head_dim, is_causal or layer_idx"
    flaw = _flaw(
        module, TableAttention, _TABLE_PARTS, "position_embeddings" if table is None else "position_ids"
    )
    sizes = flaw or _projections(module, "out_proj")
    if isinstance(sizes, str):
        return sizes
    n_positions = None if table is None else table.shape[0]
    return AttentionSpec("out_proj", *sizes, module.head_dim, "interleaved", n_positions)


def _others(module: Any, output: str) -> str:
    return ", ".join(sorted(set(module._modules) - {*AttentionSpec.inputs, output}))


# ---- proof -------------------------------------------------------------------------------------------------


def _rotary_arguments(spec: AttentionSpec, scene: Any, step: Any) -> dict[str, Any]:
    return {"position_embeddings": scene.rotary(step.hidden_states, step.position_ids)}


def _unrotated_arguments(spec: AttentionSpec, scene: Any, step: Any) -> dict[str, Any]:
    return {}


def _table_arguments(spec: AttentionSpec, scene: Any, step: Any) -> dict[str, Any]:
    if spec.n_positions is None:
        return _rotary_arguments(spec, scene, step)
    return {"position_ids": step.position_ids % spec.n_positions}


def _trial(
    arguments: Callable[..., dict[str, Any]], call: Any, spec: AttentionSpec, scene: Any
) -> list[torch.Tensor]:
    outputs = []
    for step in scene.steps(spec.hidden_size):
        roles = {"attention_mask": step.attention_mask, "cache": scene.cache, **arguments(spec, scene, step)}
        outputs.append(step.valid(call(hidden_states=step.hidden_states, **roles)))
    return outputs


def _scale(module: Any, spec: AttentionSpec, dtype: torch.dtype) -> float:
    """Size of inputs that spread scores by about 2: smaller ones hide the rotation, larger ones most keys."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(16, spec.hidden_size, generator=generator).to(dtype)
    query = module.q_proj.forward(hidden_states).float().unflatten(-1, (spec.n_heads, spec.head_dim))
    key = module.k_proj.forward(hidden_states).float().unflatten(-1, (spec.n_kv_heads, spec.head_dim))
    key = key.repeat_interleave(spec.n_heads // spec.n_kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * spec.head_dim**-0.5
    spread = float(scores.std())
    return min(max((2.0 / spread) ** 0.5, 0.03), 30.0) if spread > 0 else 1.0


def _pattern(name: str, replacement: type[Attention], recognise: Any, arguments: Any) -> Pattern:
    return Pattern(name, "attention", replacement, recognise, functools.partial(_trial, arguments), _scale)


ROTARY_ATTENTION = _pattern("rotary_attention", RotaryAttention, _recognise_rotary, _rotary_arguments)
UNROTATED_ATTENTION = _pattern(
    "unrotated_attention", UnrotatedAttention, _recognise_unrotated, _unrotated_arguments
)
TABLE_ATTENTION = _pattern("table_attention", TableAttention, _recognise_table, _table_arguments)
