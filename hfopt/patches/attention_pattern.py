"""How attention is recognised by its children, and proven."""

import functools
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from hfopt.functional.linear import Rows
from hfopt.host import Arguments, base_layer
from hfopt.modules.weights import features_of, original_class
from hfopt.patches.attention import (
    SCALES,
    AlibiAttention,
    Attention,
    AttentionSpec,
    BandAttention,
    Given,
    HeadNorm,
    Ranks,
    RotaryAttention,
    TableAttention,
    UnrotatedAttention,
    setting,
)
from hfopt.patches.facts import is_off, layer_index, names_read
from hfopt.patches.families.family import Angles, AttentionParts, Order
from hfopt.patches.guards import attention_kind, attention_obstacle, is_causal
from hfopt.patches.norm import NormBlock
from hfopt.patches.pattern import Pattern, has_children, unknown_parts
from hfopt.patches.ranked import RankedAttention
from hfopt.patches.weights import is_read_as_linear


@dataclass(frozen=True)
class _Kind:
    """A way to tell positions: the replacement, its name, and whether a `forward` with such roles may go it, with a buffer
    of its own or without.
    """

    name: str
    replacement: type[Attention]
    fits: Callable[[Collection[str], bool], bool]
    needs: tuple[str, ...] = ()
    buffer: str | None = None  # of its own


_TABLE = "embed_positions"
_BAND = "bias"
_TWO = {"position_embeddings", "position_bias"}  # ways to tell positions from outside
_TIMES = (1, 2)  # that a bias is added: by eager attention, to a mask that holds it already
_KINDS: dict[Angles, _Kind] = {
    "computed": _Kind(
        "rotary_attention",
        RotaryAttention,
        lambda roles, _: not _TWO.issubset(roles),
        ("position_embeddings",),
    ),
    "table": _Kind(
        "table_attention",
        TableAttention,
        lambda roles, has_table: ("position_ids" if has_table else "position_embeddings") in roles,
        buffer=_TABLE,
    ),
    "none": _Kind(
        "unrotated_attention",
        UnrotatedAttention,
        lambda roles, _: not _TWO.intersection(roles),
    ),
    "alibi": _Kind(
        "alibi_attention",
        AlibiAttention,
        lambda roles, _: "position_embeddings" not in roles,
        ("position_bias",),
    ),
    "ranks": _Kind("ranked_attention", RankedAttention, lambda roles, _: _TWO.issubset(roles)),
    "band": _Kind(
        "band_attention",
        BandAttention,
        lambda roles, has_band: has_band and "position_embeddings" not in roles,
        buffer=_BAND,
    ),
}
_SHARDS = 4  # CodeGen's, one for each of the machines that it was trained on
# attributes that change nothing, or what the proof shows
_KNOWN = (
    "alibi_slopes", "attention_type", "beta", "dropout", "embed_dim", "embed_positions", "enable_bias",
    "head_dim", "head_size", "hidden_size", "is_causal", "is_cross_attention", "is_decoder", "is_kv_shared_layer",
    "is_sliding", "kv_dim", "kv_heads", "layer_type", "max_positions", "max_seq_length", "mp_num", "multi_query", "n_heads",
    "new_decoder_architecture", "num_attention_heads", "num_heads", "num_key_value_groups",
    "num_key_value_heads", "num_kv_heads", "pos_embd_dim", "pretraining_tp", "qk_layernorm",
    "reorder_and_upcast_attn", "rotary_dim", "rotary_ndims", "scale_attn", "sliding_window", "slow_but_exact",
    "split_size", "store_full_length_kv", "use_alternative_attention", "use_qk_norm", "use_rope", *SCALES,
)  # fmt: skip
_EACH = "norms"  # a list of norms, one for each head
_GROUP = "num_key_value_groups"
_HEAD_DIMS = ("head_dim", "head_size")


def _recognise(parts: AttentionParts, module: Any) -> list[AttentionSpec] | str | None:
    """What the module may be, one spec for each rotation and order of rows."""
    norms = next((pair for pair in parts.norms if set(pair) <= module._modules.keys()), ())
    sub_norm = parts.sub_norm if module._modules.get(parts.sub_norm) is not None else None
    known = (*parts.inputs, parts.output, *norms, *(() if sub_norm is None else (sub_norm,)))
    if not has_children(module, known):
        others = sorted(set(module._modules) - set(known))
        resembles = set(known) <= set(module._modules)
        return f"unknown children beside its projections ({', '.join(others)})" if resembles else None
    roles = _roles(module)
    kind = _KINDS[parts.angles]
    buffer = None if kind.buffer is None else module._buffers.get(kind.buffer)
    if not kind.fits(roles, buffer is not None):
        return None
    flaw = _flaw(module, parts)
    if flaw is not None:
        return flaw
    sizes = _sizes(module, parts)
    if isinstance(sizes, str):
        return sizes
    head_norms: list[HeadNorm] = []
    n_heads, n_kv_heads = sizes[1:3]
    places = (0, n_heads, n_heads + n_kv_heads), (n_heads, n_kv_heads, n_kv_heads)
    for name, first, n in zip(norms, *places, strict=False):
        found = _head_norms(module, name, first, n, sizes[-1])
        if isinstance(found, str):
            return found
        head_norms += found
    hidden_size, n_heads, n_kv_heads, head_dim = sizes
    sinks = None if module._parameters.get(parts.sinks) is None else parts.sinks
    if sinks is not None and module._parameters[sinks].shape != (n_heads,):
        return f"{sinks} are of shape {tuple(module._parameters[sinks].shape)}, not one for each head"
    given = Given(
        len(buffer) if parts.angles == "table" and buffer is not None else None,
        _layer_type(module),
        n_heads if parts.angles == "alibi" else 0,
        parts.hides,
        buffer.shape[-1] if parts.angles == "band" and buffer is not None else sys.maxsize,
        None if parts.stores else (n_kv_heads, head_dim),
    )
    given_ways = [given]
    if parts.angles == "ranks":
        ranks = (Ranks(n_heads, head_dim, times, attention_kind(module)) for times in _TIMES)
        given_ways = [given._replace(ranks=each) for each in ranks]
    return [
        AttentionSpec(
            parts.inputs,
            parts.output,
            hidden_size,
            n_heads,
            n_kv_heads,
            head_dim,
            rotation,
            tuple(head_norms),
            norms_last,
            rows,
            _setting_read(module, parts.clip),
            _setting_read(module, parts.softcap),
            each,
            parts.stores,
            sinks,
            sub_norm,
        )
        for each in given_ways
        for n_kv_heads, rows in dict.fromkeys(_rows(order, *sizes[1:]) for order in parts.orders)
        for rotation in parts.rotations
        for norms_last in ((False, True) if norms and rotation != "none" else (False,))
    ]


def _roles(module: Any) -> set[str]:
    """Those of its arguments; of angles and a bias only the former unless the field of the configuration named like the
    bias is on.
    """
    names = Arguments.of(original_class(module).forward).names
    has_angles_alone = _TWO.issubset(names) and is_off(setting(module, names["position_bias"]))
    return set(names) - ({"position_bias"} if has_angles_alone else set())


def _flaw(module: Any, parts: AttentionParts) -> str | None:
    kind = _KINDS[parts.angles]
    owned = [
        name for name, each in (*module._parameters.items(), *module._buffers.items()) if each is not None
    ]
    if not set(owned) <= {kind.buffer, parts.sinks}:
        return "parameters or buffers of its own"
    state = vars(module)
    if layer_index(module) is None:
        return "it has no layer_idx"
    if not any(isinstance(state.get(name), int) for name in _HEAD_DIMS):
        return f"no {' or '.join(_HEAD_DIMS)}"
    if (
        not is_causal(module) and attention_kind(module) != "eager"
    ):  # which takes its masks from the model always
        return "its attention is not causal"
    roles = ("attention_mask", "cache", *kind.needs)
    known = (*_KNOWN, *(each for each in (parts.clip, parts.softcap) if each is not None))
    return attention_obstacle(module) or unknown_parts(module, kind.replacement, known, needs=roles)


def _sizes(module: Any, parts: AttentionParts) -> tuple[int, int, int, int] | str:
    """(hidden size, query heads, key and value heads, channels of a head), or what is wrong with the projections."""
    names = (*parts.inputs, parts.output)
    wrapped = next((name for name in names if not is_read_as_linear(module._modules[name])), None)
    if wrapped is not None:
        return f"{wrapped} is a {type(module._modules[wrapped]).__name__}, not a plain Linear"
    *inputs, output = (features_of(base_layer(module._modules[name])) for name in names)
    head_dim = next(vars(module)[name] for name in _HEAD_DIMS if name in vars(module))
    hidden_size = output.outputs
    n_heads, n_all = output.inputs // head_dim, sum(each.outputs for each in inputs)
    n_kv_heads = (n_all // head_dim - n_heads) // 2
    sizes = [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim]
    if not parts.stores:
        group = vars(module).get(_GROUP)
        n_kv_heads, sizes = (n_heads // group if isinstance(group, int) and group > 0 else 0), sizes[:1]
    fits = all(each.inputs == hidden_size for each in inputs) and output.inputs == sizes[0]
    fits = fits and [each.outputs for each in inputs] == (sizes if len(inputs) > 1 else [sum(sizes)])
    if not fits or n_kv_heads < 1 or n_heads % n_kv_heads:
        return "its projections do not fit together"
    return hidden_size, n_heads, n_kv_heads, head_dim


def _head_norms(module: Any, name: str, first: int, n: int, size: int) -> list[HeadNorm] | str:
    """The norms of n heads from head `first` on that a child stands for, or what is wrong with it."""
    norm, place = module._modules[name], first * size
    if not isinstance(norm, NormBlock):
        each = norm._modules.get(_EACH)
        if each is None or len(each) != n or not all(_is_norm_of(part, (size,)) for part in each):
            return f"{name} is not swapped"
        return [HeadNorm(f"{name}.{_EACH}.{head}", place + head * size, 1, size) for head in range(n)]
    if _is_norm_of(norm, None, (size,), (n, size)):
        return [HeadNorm(name, place, n, size)]
    if _is_norm_of(norm, (n * size,)):
        return [HeadNorm(name, place, 1, n * size)]
    return f"{name} is over {norm._hfopt.spec.shape} channels, not those of a head"


def _is_norm_of(module: Any, *shapes: tuple[int, ...] | None) -> bool:
    return isinstance(module, NormBlock) and module._hfopt.spec.shape in shapes


def _layer_type(module: Any) -> str | None:
    """The name of its kind of layers, for which there may be angles and masks of their own."""
    state, types = vars(module), setting(module, "layer_types")
    named = next((state[name] for name in ("layer_type", "attention_type") if name in state), None)
    index = layer_index(module)
    if named is None and types is not None and index is not None and index < len(types):
        named = types[index]
    return named if isinstance(named, str) else None


def _setting_read(module: Any, name: str | None) -> str | None:
    """The name, if the module reads it and has something there."""
    return None if name is None or name not in names_read(module) or setting(module, name) is None else name


def _rows(order: Order, n_heads: int, n_kv_heads: int, head_dim: int) -> tuple[int, Rows]:
    """(key heads, (first row, rows) of the heads of queries, keys, values in a single Linear, or empty if they lie so)."""
    if order == "stacked":
        return n_kv_heads, ()
    if order == "shards":
        n = n_heads // _SHARDS * head_dim
        return n_kv_heads, tuple(
            ((3 * shard + part) * n, n) for part in (0, 2, 1) for shard in range(_SHARDS)
        )
    n = n_heads // n_kv_heads
    copies = n if order == "spread" else 1
    rows = tuple(
        ((index * (n + 2) + first) * head_dim, count * head_dim)
        for first, count, times in ((0, n, 1), (n, 1, copies), (n + 1, 1, copies))
        for index in range(n_kv_heads)
        for _ in range(times)
    )
    return n_kv_heads * copies, rows


def _trial(call: Any, spec: AttentionSpec, scene: Any) -> list[torch.Tensor]:
    return [
        inputs.valid(
            call(
                hidden_states=inputs.hidden_states,
                residual=inputs.hidden_states.flip(-1),
                **scene.roles(inputs, spec.given),
            )
        )
        for inputs in scene.inputs(spec.hidden_size, spec.given.max_keys)
    ]


def _scale(module: Any, spec: AttentionSpec, dtype: torch.dtype) -> float:
    """Size of inputs that spread scores by about 2: smaller ones hide the rotation, larger ones most keys."""
    if spec.norms:
        return 1.0  # norms undo any scale
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(16, spec.hidden_size, generator=generator).to(dtype)
    qkv = torch.cat([module._modules[name].forward(hidden_states) for name in spec.inputs], -1).float()
    if spec.rows:
        qkv = torch.cat([qkv[:, first : first + n] for first, n in spec.rows], -1)
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
