"""Cohere 1 and 2: parallel layers with one LayerNorm, a gated feed-forward block, a factor of logits."""

from dataclasses import replace

from hfopt.patches.families.family import LayerParts
from hfopt.patches.families.llama import LLAMA

COHERE = replace(
    LLAMA,
    name="Cohere",
    model_types=("cohere", "cohere2"),
    layer=LayerParts("parallel", "self_attn", ("input_layernorm",)),
    decoder=replace(LLAMA.decoder, factor="logit_scale"),
)
