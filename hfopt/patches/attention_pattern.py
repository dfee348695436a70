"""How attention is recognised by its children, and proven."""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from hfopt.host import Arguments
from hfopt.patches.attention import (
    Attention,
    AttentionSpec,
    RotaryAttention,
    TableAttention,
    UnrotatedAttention,
)
from hfopt.patches.families.family import Angles, AttentionParts
from hfopt.patches.guards import attention_obstacle
from hfopt.patches.norm import RMSNorm
from hfopt.patches.pattern import Pattern, has_children, unknown_parts
from hfopt.patches.replacement import original_class
from hfopt.patches.weights import is_linear


@dataclass(frozen=True)
class _Kind:
    """A way to the angles: the replacement, its name, and whether a `forward` with such roles may go it, with a table of its
    own or without.
    """

    name: str
    replacement: type[Attention]
    fits: Callable[[Collection[str], bool], bool]
    needs: tuple[str, ...] = ()


_KINDS: dict[Angles, _Kind] = {
    "computed": _Kind(
        "rotary_attention", RotaryAttention, lambda roles, has_table: True, ("position_embeddings",)
    ),
    "table": _Kind(
        "table_attention",
        TableAttention,
        lambda roles, has_table: ("position_ids" if has_table else "position_embeddings") in roles,
    ),
    "none": _Kind(
        "unrotated_attention", UnrotatedAttention, lambda roles, has_table: "position_embeddings" not in roles
    ),
}
_TABLE = "embed_positions"
# attributes that change nothing, or what the proof shows
_KNOWN = (
    "dropout", "embed_dim", "embed_positions", "enable_bias", "head_dim", "is_causal", "layer_type", "max_positions",
    "num_attention_heads", "num_heads", "num_key_value_groups", "num_key_value_heads", "pos_embd_dim", "rotary_dim",
    "scale_attn", "scaling", "sliding_window",
)  # fmt: skip


def _recognise(parts: AttentionParts, module: Any) -> list[AttentionSpec] | str | None:
    """What the module may be, one spec for each rotation."""
    known = (*parts.inputs, parts.output, *parts.norms)
    if not has_children(module, known):
        others = sorted(set(module._modules) - set(known))
        resembles = set(known) <= set(module._modules)
        return f"unknown children beside its projections ({', '.join(others)})" if resembles else None
    roles = Arguments.of(original_class(module).forward).names.keys()
    has_table = module._buffers.get(_TABLE) is not None
    if not _KINDS[parts.angles].fits(roles, has_table):
        return None
    flaw = _flaw(module, parts)
    if flaw is not None:
        return flaw
    sizes = _sizes(module, parts)
    if isinstance(sizes, str):
        return sizes
    table = module._buffers.get(_TABLE)
    n_positions = None if table is None else table.shape[0]
    names = parts.inputs, parts.output
    return [AttentionSpec(*names, *sizes, rotation, parts.norms, n_positions) for rotation in parts.rotations]


def _flaw(module: Any, parts: AttentionParts) -> str | None:
    kind = _KINDS[parts.angles]
    owned = [
        name for name, each in (*module._parameters.items(), *module._buffers.items()) if each is not None
    ]
    if owned != ([_TABLE] if parts.angles == "table" and owned else []):
        return "parameters or buffers of its own"
    missing = [name for name in ("head_dim", "is_causal", "layer_idx") if name not in vars(module)]
    if missing or not {"scaling", "scale_attn"} & set(vars(module)):
        return f"no {', '.join(missing) or 'scaling'}"
    if module.is_causal is not True:
        return "its attention is not causal"
    if not isinstance(module.layer_idx, int):
        return "it has no layer_idx"
    roles = ("attention_mask", "cache", *kind.needs)
    return attention_obstacle(module) or unknown_parts(module, kind.replacement, _KNOWN, needs=roles)


def _sizes(module: Any, parts: AttentionParts) -> tuple[int, int, int, int] | str:
    """(hidden size, query heads, key and value heads, channels of a head), or what is wrong with the projections."""
    names = (*parts.inputs, parts.output)
    wrapped = next((name for name in names if not is_linear(module._modules[name])), None)
    if wrapped is not None:
        return f"{wrapped} is a {type(module._modules[wrapped]).__name__}, not a plain Linear"
    *inputs, output = (module._modules[name] for name in names)
    head_dim, hidden_size = module.head_dim, output.out_features
    n_heads, n_all = output.in_features // head_dim, sum(each.out_features for each in inputs)
    n_kv_heads = (n_all // head_dim - n_heads) // 2
    sizes = [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim]
    fits = all(each.in_features == hidden_size for each in inputs) and output.in_features == sizes[0]
    fits = fits and [each.out_features for each in inputs] == (sizes if len(inputs) > 1 else [sum(sizes)])
    if not fits or n_kv_heads < 1 or n_heads % n_kv_heads:
        return "its projections do not fit together"
    for name in parts.norms:
        norm = module._modules[name]
        if not isinstance(norm, RMSNorm):
            return f"{name} is not swapped"
        if norm._hfopt.spec.size != head_dim:
            return f"{name} is over {norm._hfopt.spec.size} channels, not those of a head"
    return hidden_size, n_heads, n_kv_heads, head_dim


def _trial(call: Any, spec: AttentionSpec, scene: Any) -> list[torch.Tensor]:
    return [
        inputs.valid(call(hidden_states=inputs.hidden_states, **scene.roles(inputs, spec.n_positions)))
        for inputs in scene.inputs(spec.hidden_size)
    ]


def _scale(module: Any, spec: AttentionSpec, dtype: torch.dtype) -> float:
    """Size of inputs that spread scores by about 2: smaller ones hide the rotation, larger ones most keys."""
    if spec.norms:
        return 1.0  # norms undo any scale
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(16, spec.hidden_size, generator=generator).to(dtype)
    qkv = torch.cat([module._modules[name].forward(hidden_states) for name in spec.inputs], -1).float()
    query, key, _ = qkv.unflatten(-1, (-1, spec.head_dim)).split(
        (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads), dim=1
    )
    key = key.repeat_interleave(spec.n_heads // spec.n_kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * spec.head_dim**-0.5
    spread = float(scores.std())
    return min(max((2.0 / spread) ** 0.5, 0.03), 30.0) if spread > 0 else 1.0


def pattern_of(parts: AttentionParts) -> Pattern:
    """How attention with these children is recognised and proven."""
    kind = _KINDS[parts.angles]
    recognise = functools.partial(_recognise, parts)
    return Pattern(kind.name, "attention", kind.replacement, recognise, _trial, _scale)
