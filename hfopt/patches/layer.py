"""Decoder layers: norms, attention, feed-forward block, and the residuals in the kernels' epilogues.

A part that kernels cannot do as it is now (hooks on it, an adapter in it, attentions wanted) is called as a
module.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfopt import functional
from hfopt.errors import UnsupportedModel
from hfopt.host import ROLES
from hfopt.patches.activation import match_activation
from hfopt.patches.attention import Attention, RotaryAttention, TableAttention, UnrotatedAttention
from hfopt.patches.guards import is_bare
from hfopt.patches.linear import can_multiply, is_linear, read_children, weights_of
from hfopt.patches.mlp import Mlp, activate, activation_of
from hfopt.patches.pattern import Pattern, has_children, owns_nothing, unknown_parts
from hfopt.patches.replacement import Replacement, is_swapped, is_usable
from hfopt.program.builder import Builder
from hfopt.program.writer import Slot


@dataclass(frozen=True)
class LayerSpec:
    """Names of the children; `inner`: Linears and activation of a block without a module of its own."""

    attention: str
    norms: tuple[str, ...]
    hidden_size: int
    mlp: str | None = None
    inner: tuple[str, str, str] | None = None
    activation: str | None = None

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        return () if self.inner is None else (self.inner[0], self.inner[2])


def attend(
    attention: Any, residuals: Sequence[torch.Tensor], hidden_states: torch.Tensor, **roles: Any
) -> torch.Tensor | None:
    """Attention plus the residuals; None, with nothing touched, if kernels cannot do it."""
    if not isinstance(attention, Attention) or not is_usable(attention):
        return None
    return attention.attend(hidden_states, residuals, **roles)


def feed(mlp: Any, residuals: Sequence[torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
    """Feed-forward block plus the residuals."""
    if isinstance(mlp, Mlp) and is_usable(mlp):
        output = mlp.feed(hidden_states, residuals)
        if output is not None:
            return output
    output = mlp(hidden_states)
    for residual in residuals:
        output = output + residual
    return output


def normalize(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Norm of the states."""
    if is_usable(norm):
        output: torch.Tensor | None = norm.compute(hidden_states)
        if output is not None:
            return output
    normed: torch.Tensor = norm(hidden_states)
    return normed


def swapped(module: Any, name: str) -> Any:
    """A child that runs in kernels; raises UnsupportedModel if it is something else."""
    child = module._modules[name]
    if not isinstance(child, Replacement) or not is_swapped(child):
        raise UnsupportedModel(f"{name} is a {type(child).__name__} that does not run in kernels")
    reason = child.idle_reason()
    if reason is not None:
        raise UnsupportedModel(f"{name} does not run in kernels: {reason}")
    return child


class SequentialLayer(Replacement):
    """Llama's: `h = x + attention(norm(x))`, `h + mlp(norm(h))`."""

    takes = ROLES

    def compute(self, hidden_states: torch.Tensor, **roles: Any) -> torch.Tensor | None:
        spec, children = self._hfopt.spec, self._modules
        norm_before_attention, norm_before_mlp = (children[name] for name in spec.norms)
        normed = normalize(norm_before_attention, hidden_states)
        attended = attend(children[spec.attention], (hidden_states,), normed, **roles)
        if attended is None:
            return None
        return feed(children[spec.mlp], (attended,), normalize(norm_before_mlp, attended))

    def emit(self, builder: Builder, x: Slot, angles: Any) -> Slot:
        """The layer as instructions; they may use the scratch of x afterwards."""
        spec = self._hfopt.spec
        first, second = (swapped(self, name) for name in spec.norms)
        normed = first.emit(builder, x)
        attended = swapped(self, spec.attention).emit(builder, normed, (x,), angles)
        builder.release(x, normed)
        normed = second.emit(builder, attended)
        out: Slot = swapped(self, spec.mlp).emit(builder, normed, (attended,))
        builder.release(attended, normed)
        return out


class ParallelLayer(Replacement):
    """GPT-J's: `x + attention(norm(x)) + mlp(norm(x))`."""

    takes = ROLES

    def compute(self, hidden_states: torch.Tensor, **roles: Any) -> torch.Tensor | None:
        spec, children = self._hfopt.spec, self._modules
        normed = normalize(children[spec.norms[0]], hidden_states)
        attended = attend(children[spec.attention], (), normed, **roles)
        return None if attended is None else feed(children[spec.mlp], (attended, hidden_states), normed)

    def emit(self, builder: Builder, x: Slot, angles: Any) -> Slot:
        """As `SequentialLayer.emit`."""
        spec = self._hfopt.spec
        normed = swapped(self, spec.norms[0]).emit(builder, x)
        attended = swapped(self, spec.attention).emit(builder, normed, (), angles)
        out: Slot = swapped(self, spec.mlp).emit(builder, normed, (attended, x))
        builder.release(x, normed, attended)
        return out


class InlineLayer(Replacement):
    """OPT's: the feed-forward block is in the layer itself, and norms stand before or after both parts."""

    do_layer_norm_before: bool
    live = ("do_layer_norm_before",)

    takes = ROLES

    def compute(self, hidden_states: torch.Tensor, **roles: Any) -> torch.Tensor | None:
        spec, children = self._hfopt.spec, self._modules
        first, activation_name, second = spec.inner
        activation: Any = children[activation_name]
        inputs, output = read_children(self, "inputs", (first,)), read_children(self, "output", (second,))
        if inputs is None or output is None or not is_bare(activation):
            return None
        if not can_multiply((inputs, output), (hidden_states,)):
            return None
        attention_norm: Any = children[spec.norms[0]]
        final_norm: Any = children[spec.norms[1]]
        is_pre_norm = self.do_layer_norm_before

        attended = attend(
            children[spec.attention],
            (hidden_states,),
            normalize(attention_norm, hidden_states) if is_pre_norm else hidden_states,
            **roles,
        )
        if attended is None:
            return None
        if not is_pre_norm:
            attended = normalize(attention_norm, attended)
        shape = attended.shape
        attended = attended.reshape(-1, shape[-1])
        inner = activate(
            self._hfopt, activation, normalize(final_norm, attended) if is_pre_norm else attended, inputs
        )
        hidden_states = functional.linear(
            inner, output, residuals=(attended.contiguous(),), by=self._hfopt.kernels
        ).view(shape)
        return hidden_states if is_pre_norm else normalize(final_norm, hidden_states)

    def emit(self, builder: Builder, x: Slot, angles: Any) -> Slot:
        """As `SequentialLayer.emit`."""
        spec = self._hfopt.spec
        first_name, activation_name, second_name = spec.inner
        inputs = weights_of(self, "inputs", (first_name,))
        output = weights_of(self, "output", (second_name,))
        activation = activation_of(self._hfopt, self._modules[activation_name])
        attention_norm, final_norm = (swapped(self, name) for name in spec.norms)
        is_pre_norm = self.do_layer_norm_before

        normed = attention_norm.emit(builder, x) if is_pre_norm else x
        attended = swapped(self, spec.attention).emit(builder, normed, (x,), angles)
        builder.release(*{x, normed})
        if not is_pre_norm:
            normed = attention_norm.emit(builder, attended)
            builder.release(attended)
            attended = normed
        normed = final_norm.emit(builder, attended) if is_pre_norm else attended
        inner = builder.linear(normed, inputs, activation=activation)
        out = builder.linear(inner, output, residuals=(attended,))
        builder.release(inner, *{attended, normed})
        if not is_pre_norm:
            normed = final_norm.emit(builder, out)
            builder.release(out)
            out = normed
        return out


# ---- recognition -------------------------------------------------------------------------------------------

_UNSWAPPED = "its attention is not swapped"


def _recognise_sequential(module: Any) -> LayerSpec | str | None:
    norms = ("input_layernorm", "post_attention_layernorm")
    if not has_children(module, ("self_attn", "mlp", *norms)) or not owns_nothing(module):
        return None
    known = ("hidden_size", "attention_type", "layer_type")
    unknown = unknown_parts(module, SequentialLayer, known, needs=("attention_mask", "cache"))
    if unknown is not None:
        return unknown
    return _swapped_parts(module, RotaryAttention, "self_attn", norms)


def _recognise_parallel(module: Any) -> LayerSpec | str | None:
    if not has_children(module, ("ln_1", "attn", "mlp")) or not owns_nothing(module):
        return None
    unknown = unknown_parts(module, ParallelLayer, (), needs=("attention_mask", "cache"))
    return unknown or _swapped_parts(module, TableAttention, "attn", ("ln_1",))


def _swapped_parts(
    module: Any, kind: type[Attention], attention: str, norms: tuple[str, ...]
) -> LayerSpec | str:
    attention_module: Any = module._modules[attention]
    if not isinstance(attention_module, kind):
        return _UNSWAPPED
    return LayerSpec(attention, norms, attention_module._hfopt.spec.hidden_size, mlp="mlp")


def _recognise_inline(module: Any) -> LayerSpec | str | None:
    norms, inner = ("self_attn_layer_norm", "final_layer_norm"), ("fc1", "activation_fn", "fc2")
    if not has_children(module, ("self_attn", *norms, *inner)) or not owns_nothing(module):
        return None
    known = ("do_layer_norm_before", "dropout", "embed_dim")
    unknown = unknown_parts(module, InlineLayer, known, needs=("attention_mask", "cache"))
    if unknown is not None:
        return unknown
    if not isinstance(module.self_attn, UnrotatedAttention):
        return _UNSWAPPED
    if not is_linear(module.fc1) or not is_linear(module.fc2):
        return "fc1 or fc2 is not a plain Linear"
    activation = match_activation(module.activation_fn)
    return LayerSpec("self_attn", norms, module.fc1.in_features, inner=inner, activation=activation)


# ---- proof -------------------------------------------------------------------------------------------------


def _sequential_arguments(scene: Any, step: Any) -> dict[str, Any]:
    return {"position_embeddings": scene.rotary(step.hidden_states, step.position_ids)}


def _parallel_arguments(scene: Any, step: Any) -> dict[str, Any]:
    # few positions, so that every table has them
    found = {"position_ids": step.position_ids % 2}
    return found if scene.rotary_module is None else {**found, **_sequential_arguments(scene, step)}


def _inline_arguments(scene: Any, step: Any) -> dict[str, Any]:
    return {}


def _trial(
    arguments: Callable[..., dict[str, Any]], call: Any, spec: LayerSpec, scene: Any
) -> list[torch.Tensor]:
    outputs = []
    for step in scene.steps(spec.hidden_size):
        roles = {"position_ids": step.position_ids, "cache": scene.cache, "use_cache": True}
        roles |= {"attention_mask": step.attention_mask, **arguments(scene, step)}
        outputs.append(step.valid(call(hidden_states=step.hidden_states, **roles)))
    return outputs


def _pattern(name: str, replacement: type[Replacement], recognise: Any, arguments: Any) -> Pattern:
    trial = functools.partial(_trial, arguments)
    return Pattern(name, "layer", replacement, recognise, trial)


SEQUENTIAL_LAYER = _pattern("sequential_layer", SequentialLayer, _recognise_sequential, _sequential_arguments)
PARALLEL_LAYER = _pattern("parallel_layer", ParallelLayer, _recognise_parallel, _parallel_arguments)
INLINE_LAYER = _pattern("inline_layer", InlineLayer, _recognise_inline, _inline_arguments)
