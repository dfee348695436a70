"""A family of decoders as data: where its parts are, and how they are put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hfopt.patches.rotation import ROTATIONS, Rotation

Topology = Literal["sequential", "parallel", "inline", "inline_post"]
Angles = Literal["computed", "table", "none", "alibi", "ranks", "band"]
# of queries and keys, under the names that models have for them
NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))
Order = Literal["stacked", "groups", "spread", "shards"]


@dataclass(frozen=True)
class AttentionParts:
    """Children of an attention module.

    inputs: Linears that give, side by side, all query, key and value heads. norms: of queries, keys and values, in models
    that have such. angles: whether the model computes cos and sin for all layers, they are in a table, or positions are in
    the hidden states, a bias of scores ("alibi"; "ranks" if it counts keys in bfloat16, and is handed down instead of angles
    where the field of the configuration named like it is on), or those and a buffer that tells which keys a token sees
    ("band").
    rotations: which channels turn together; where there are several, the proof chooses. orders: of the rows of a single
    Linear, likewise: "stacked" (all queries, then all keys, then all values), "groups" (the queries of a key head, the key,
    the value, and so on), "spread" (the same, with a copy of key and value for each query), "shards" (CodeGen: four parts,
    each of queries, values, keys). clip: what limits queries, keys and values, an attribute or a field of the configuration.
    softcap: likewise what limits scores, smoothly. sinks: a parameter, if the module has it, of a score for each head that
    takes weight and has no value. sub_norm: of what goes into the output, in models that have such. hides: the mask says by
    True what is hidden. stores: there are keys and values; else it reads those of the last layer of its kind before it that
    has some.
    """

    inputs: tuple[str, ...]
    output: str
    angles: Angles = "computed"
    rotations: tuple[Rotation, ...] = ROTATIONS
    norms: tuple[tuple[str, ...], ...] = NORMS
    orders: tuple[Order, ...] = ("stacked",)
    clip: str | None = None
    softcap: str | None = None
    sinks: str = "sinks"
    sub_norm: str = "attn_sub_norm"
    stores: bool = True
    hides: bool = False


@dataclass(frozen=True)
class MlpParts:
    """Children of a feed-forward block: `output(act(inputs[0](x)) * inputs[1](x))`, or `output(act(inputs[0](x)))`.

    is_fused: one Linear holds the rows of both inputs, the gate's first. sub_norm: of what goes into the output, in models
    that have such.
    """

    inputs: tuple[str, ...]
    output: str
    is_fused: bool = False
    sub_norm: str = "ffn_sub_norm"

    @property
    def is_gated(self) -> bool:
        """Whether there are two inputs."""
        return self.is_fused or len(self.inputs) == 2


@dataclass(frozen=True)
class TransformParts:
    """Children of a head in front of the logits: `norm(activation(dense(x)))`."""

    dense: str
    activation: str
    norm: str


@dataclass(frozen=True)
class InputParts:
    """Children of a layer that is given an input of its own: `x + norm(output(act(gate(x)) * input))` comes last."""

    gate: str
    activation: str
    output: str
    norm: str


@dataclass(frozen=True)
class LayerParts:
    """Children of a decoder layer, and how they are put together (see `patches.layer`).

    topology: where there are several, the proof chooses. norms: before attention and before the feed-forward block; one for
    both where they are parallel. attention: a path, if other modules are around it. post_norms: behind them, of what they
    add. mlp: the child, or (input, activation, output) where the block is in the layer itself. multiplier: attribute, if the
    layer has it, that scales what attention and feed-forward block add. normed: attribute, if the layer has it and it is on,
    by which what they are added to is what they are given. idle: children that a layer has, in some models, for what it
    attends to besides the text itself; without such they are not called. input: what is done with an input of the layer's
    own. scalar: a buffer of one number that the result is multiplied by.
    """

    topology: Topology | tuple[Topology, ...]
    attention: str
    norms: tuple[str, ...]
    post_norms: tuple[str, ...] = ()
    mlp: str | tuple[str, str, str] = "mlp"
    multiplier: str = "residual_multiplier"
    normed: str = "apply_residual_connection_post_layernorm"
    idle: tuple[str, ...] = ()
    input: InputParts | None = None
    scalar: str | None = None


@dataclass(frozen=True)
class LayerInputs:
    """Children of a decoder that make an input of its own for each layer, all of them side by side:
    `(norm(projection(x) * projection_scale) + tokens) * scale`, of what tokens look up in a table and of what goes into the
    first layer. Scales are attributes; the norm is over the input of a layer.
    """

    tokens: str
    projection: str
    norm: str
    projection_scale: str
    scale: str

    @property
    def children(self) -> tuple[str, ...]:
        return self.tokens, self.projection, self.norm


@dataclass(frozen=True)
class Decoder:
    """How a model puts its modules together: names of the children of the module at `path`, or paths below it.

    What a token looks up in `tokens`, times the attribute `embedding_scale` of that and `multiplier` of the decoder, goes
    through `tokens_norm` and `project_in`, is added to what its position looks up in `positions`, and goes through
    `sum_norm`, `layers`, `norm`, `project_out`, and the model's own children `transform` and in `heads`. Its logits are
    divided by the field `divisor` of the config, multiplied by `factor` and limited, smoothly, by `softcap`. There are no
    more keys than the field `max_keys` says. What a model has not, or does not read, is left out. rotary: computes cos and
    sin for all layers; rotaries: or there is a list, one for each base that the field `bases` has for layers. layer_inputs:
    what makes inputs of the layers' own. idle: children for inputs that are no tokens.
    """

    path: str
    tokens: str
    layers: str
    norm: str
    heads: tuple[str, ...] = ("lm_head", "embed_out", "output_projection")
    rotary: str = "rotary_emb"
    rotaries: str = "rotary_embs"
    bases: str = "layer_rope_theta"
    positions: str | None = None
    tokens_norm: str | None = None
    sum_norm: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    transform: str | None = None
    embedding_scale: str = "embed_scale"
    multiplier: str = "embedding_multiplier"
    divisor: str = "logits_scaling"
    factor: str = "logit_scale"
    softcap: str = "final_logit_softcapping"
    max_keys: str = "max_seq_len"
    layer_inputs: LayerInputs | None = None
    idle: tuple[str, ...] = ()

    @property
    def settings(self) -> frozenset[str]:
        """Names of attributes and fields that it knows."""
        names = (
            self.multiplier, self.divisor, self.factor, self.softcap, self.max_keys, self.project_in, self.project_out,
            self.tokens_norm, self.sum_norm, self.bases,
        )  # fmt: skip
        inputs = self.layer_inputs
        scales = () if inputs is None else (inputs.projection_scale, inputs.scale)
        return frozenset(name for name in (*names, *scales) if name is not None)

    @property
    def children(self) -> frozenset[str]:
        """Names of the children that it knows, and paths below them."""
        names = (
            self.tokens, self.tokens_norm, self.layers, self.norm, self.rotary, self.rotaries, self.positions,
            self.sum_norm, self.project_in, self.project_out, *self.idle,
            *(() if self.layer_inputs is None else self.layer_inputs.children),
        )  # fmt: skip
        return frozenset(name for name in names if name is not None)


@dataclass(frozen=True)
class Family:
    """A decoder as data. model_types: of configurations, for which this record is tried."""

    name: str
    model_types: Sequence[str]
    attention: AttentionParts
    mlp: MlpParts | None
    layer: LayerParts
    decoder: Decoder
    transform: TransformParts | None = None
