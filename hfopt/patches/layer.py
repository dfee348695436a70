"""Decoder layers: norms, attention, feed-forward block, and how their results are added up.

A part that kernels cannot do as it is now (hooks on it, a foreign module in it) is called as a module; without attention in
kernels there is no layer in kernels.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hfopt.functional import Epilogue
from hfopt.host import ROLES, Features, base_layer
from hfopt.patches.activation import match_activation
from hfopt.patches.attention import Attention, Given
from hfopt.patches.block import Block
from hfopt.patches.families.family import InputParts, LayerParts, Topology
from hfopt.patches.ops import Ops, X
from hfopt.patches.pattern import Pattern, has_children, owned, unknown_parts
from hfopt.patches.weights import is_read_as_linear


@dataclass(frozen=True)
class LayerSpec:
    """Names of the children; `inner`: Linears and activation of a block without a module of its own.

    attention: a path. multiplier: the attribute that scales what the parts add. normed, idle, input, scalar: see
    `LayerParts`; input_size: channels of the layer's own input.
    """

    attention: str
    norms: tuple[str, ...]
    post_norms: tuple[str, ...]
    mlp: str | None
    hidden_size: int
    given: Given  # to its attention
    inner: tuple[str, str, str] | None = None
    activation_name: str | None = None
    multiplier: str | None = None
    normed: str | None = None
    idle: tuple[str, ...] = ()
    input: InputParts | None = None
    input_size: int = 0
    scalar: str | None = None

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        if self.input is not None:
            return self.input.gate, self.input.output
        return () if self.inner is None else (self.inner[0], self.inner[2])

    @functools.cached_property
    def parts(self) -> tuple[str, ...]:
        others = [] if self.mlp is None else [self.mlp]
        others += [] if self.input is None else [self.input.norm]
        return (self.attention.partition(".")[0], *self.norms, *self.post_norms, *others, *self.idle)

    @property
    def activation(self) -> str | None:
        if self.input is not None:
            return self.input.activation
        return None if self.inner is None else self.inner[1]


class Layer(Block):
    """What the layers share: their attention, as the one part that is more than a function of the hidden states."""

    takes = ROLES - {"residual"}


class SequentialLayer(Layer):
    """Llama's: `h = x + attention(norm(x))`, `h + mlp(norm(h))`; some have norms, or a factor, of what is added."""

    def run(self, ops: Ops[X], x: X) -> X:
        spec, parts = self._hfopt.spec, self._hfopt.spec.input
        # read first: what cannot be read is declined before attention stores anything
        gated = (
            None
            if parts is None
            else [ops.weights(self, role, (role,)) for role in (parts.gate, parts.output)]
        )
        for index, attends in enumerate((True, False)):
            normed = ops.part(self, spec.norms[index], x) if spec.norms else x
            if spec.normed is not None and self.__dict__[spec.normed]:
                x = normed
            residuals = () if spec.post_norms or spec.multiplier else (x,)
            y = (
                ops.attention(self, spec.attention, normed, residuals)
                if attends
                else ops.part(self, spec.mlp, normed, residuals)
            )
            if spec.post_norms:
                y = ops.part(self, spec.post_norms[index], y, () if spec.multiplier else (x,))
            x = y if spec.multiplier is None else ops.scale(y, self.__dict__[spec.multiplier], x)
        if gated is not None:
            inner = ops.times_input(self, ops.activate(self, parts.activation, x, gated[0]))
            x = ops.part(self, parts.norm, ops.linear(inner, gated[1]), (x,))
        return x if spec.scalar is None else ops.scale(x, float(self._buffers[spec.scalar]))  # type: ignore[arg-type]


class ParallelLayer(Layer):
    """GPT-J's: `x + attention(norm(x)) + mlp(norm(x))`; some have a norm for each."""

    def run(self, ops: Ops[X], x: X) -> X:
        spec = self._hfopt.spec
        first, *others = spec.norms
        normed = ops.part(self, first, x)
        attended = ops.attention(self, spec.attention, normed)
        for second in others:
            normed = ops.part(self, second, x)
        return ops.part(self, spec.mlp, normed, (attended, x))


class InlineLayer(Layer):
    """OPT's: the feed-forward block is in the layer itself, and norms stand before or after both parts."""

    live = ("do_layer_norm_before",)
    is_pre_norm = True  # where no attribute says it

    def run(self, ops: Ops[X], x: X) -> X:
        spec, is_pre_norm = self._hfopt.spec, self.__dict__.get("do_layer_norm_before", self.is_pre_norm)
        first, activation, second = spec.inner
        attention_norm, final_norm = spec.norms
        inputs, output = ops.weights(self, "inputs", (first,)), ops.weights(self, "output", (second,))
        h = ops.attention(self, spec.attention, ops.part(self, attention_norm, x) if is_pre_norm else x, (x,))
        if not is_pre_norm:
            h = ops.part(self, attention_norm, h)
        inner = ops.activate(self, activation, ops.part(self, final_norm, h) if is_pre_norm else h, inputs)
        h = ops.linear(inner, output, Epilogue(residuals=(h,)))
        return h if is_pre_norm else ops.part(self, final_norm, h)


class InlinePostLayer(InlineLayer):
    """BART's: the same with norms after both parts."""

    is_pre_norm = False


_KINDS: dict[Topology, type[Layer]] = {
    "sequential": SequentialLayer,
    "parallel": ParallelLayer,
    "inline": InlineLayer,
    "inline_post": InlinePostLayer,
}
# attributes that change nothing, or what the proof shows
_KNOWN = (
    "activation_dropout", "attention_type", "do_layer_norm_before", "dropout", "embed_dim", "hidden_dropout",
    "hidden_size", "hidden_size_per_layer_input", "layer_id", "layer_type", "num_heads", "use_parallel_residual",
)  # fmt: skip


def _recognise(parts: LayerParts, topology: Topology, module: Any) -> LayerSpec | str | None:
    inner = None if isinstance(parts.mlp, str) else parts.mlp
    mlp = (parts.mlp,) if isinstance(parts.mlp, str) else parts.mlp
    around, *path = parts.attention.split(".")
    idle = tuple(name for name in parts.idle if module._modules.get(name) is not None)
    children = (around, *parts.norms, *parts.post_norms, *mlp, *idle)
    if parts.input is not None:
        children += dataclasses.astuple(parts.input)
    if not has_children(module, children) or owned(module) - {parts.scalar}:
        return None
    if parts.scalar is not None and not _is_number(module._buffers.get(parts.scalar)):
        return None
    state, kind = vars(module), _KINDS[topology]
    multiplier = parts.multiplier if isinstance(state.get(parts.multiplier), float | int) else None
    normed = parts.normed if state.get(parts.normed) else None
    attention = module._modules[around]
    waiting, known = [module], (*_KNOWN, parts.multiplier, parts.normed)
    for name in path:
        if not has_children(attention, (name,)) or owned(attention):
            return None
        waiting.append(attention)
        attention = attention._modules[name]
    for each in waiting:
        unknown = unknown_parts(each, kind, known, needs=("attention_mask", "cache"))
        if unknown is not None:
            return unknown
    if not isinstance(attention, Attention):
        return "its attention is not swapped"
    spec = attention._hfopt.spec
    of_attention = spec.hidden_size, spec.given
    if inner is None:
        names = parts.attention, parts.norms, parts.post_norms, mlp[0]
        more: dict[str, Any] = {
            "multiplier": multiplier,
            "normed": normed,
            "scalar": parts.scalar,
            "idle": idle,
        }
        made = LayerSpec(*names, *of_attention, **more)
        return made if parts.input is None else _with_input(module, parts.input, made)
    first, activation, second = inner
    if not all(map(is_read_as_linear, (module._modules[first], module._modules[second]))):
        return f"{first} or {second} is not a plain Linear"
    matched = match_activation(module._modules[activation])
    return LayerSpec(parts.attention, parts.norms, (), None, *of_attention, inner, matched, idle=idle)


def _is_number(buffer: torch.Tensor | None) -> bool:
    return buffer is not None and buffer.numel() == 1 and buffer.is_floating_point()


def _with_input(module: Any, parts: InputParts, spec: LayerSpec) -> LayerSpec | str:
    gate, output = module._modules[parts.gate], module._modules[parts.output]
    if not is_read_as_linear(gate) or not is_read_as_linear(output):
        return f"{parts.gate} or {parts.output} is not a plain Linear"
    matched = match_activation(module._modules[parts.activation])
    size = Features.of(base_layer(gate)).outputs
    return dataclasses.replace(spec, input=parts, input_size=size, activation_name=matched)


def _trial(call: Any, spec: LayerSpec, scene: Any) -> list[torch.Tensor]:
    outputs = []
    for inputs in scene.inputs(spec.hidden_size, spec.given.max_keys):
        roles = {**scene.roles(inputs, spec.given), "use_cache": True}
        if spec.input is not None:
            roles["layer_input"] = scene.hidden_states(*inputs.hidden_states.shape[:2], spec.input_size)
        outputs.append(inputs.valid(call(hidden_states=inputs.hidden_states, **roles)))
    return outputs


def patterns_of(parts: LayerParts) -> Iterator[Pattern]:
    """How a layer with these children is recognised and proven, for each topology that it may have."""
    for topology in (parts.topology,) if isinstance(parts.topology, str) else parts.topology:
        recognise = functools.partial(_recognise, parts, topology)
        yield Pattern(f"{topology}_layer", "layer", _KINDS[topology], recognise, _trial)
