"""Falcon: heads in one Linear, parallel layers with one norm (7B) or two (40B), or sequential ones; angles or ALiBi."""

from dataclasses import replace

from hfopt.patches.families.family import Decoder, LayerParts
from hfopt.patches.families.neox import NEOX

FALCON = replace(
    NEOX,
    name="Falcon",
    model_types=("falcon",),
    attention=replace(NEOX.attention, orders=("groups", "spread")),
    layer=LayerParts("parallel", "self_attention", ("input_layernorm",)),
    decoder=Decoder("transformer", "word_embeddings", "h", "ln_f"),
)
FALCON_40B = replace(
    FALCON, name="Falcon 40B", layer=LayerParts("parallel", "self_attention", ("ln_attn", "ln_mlp"))
)
FALCON_SEQUENTIAL = replace(
    FALCON,
    name="Falcon, sequential",
    layer=LayerParts("sequential", "self_attention", ("input_layernorm", "post_attention_layernorm")),
)
FALCON_ALIBI = replace(
    FALCON_SEQUENTIAL,
    name="Falcon, ALiBi",
    attention=replace(FALCON.attention, angles="ranks", rotations=("none",)),
)
