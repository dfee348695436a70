"""Cohere 1 and 2, and some of StableLM: Llama with attention and feed-forward block side by side, behind one norm."""

from dataclasses import replace

from hfopt.patches.families.family import LayerParts
from hfopt.patches.families.llama import LLAMA

COHERE = replace(
    LLAMA,
    name="Cohere",
    model_types=("cohere", "cohere2"),
    layer=LayerParts("parallel", "self_attn", ("input_layernorm",)),
)
