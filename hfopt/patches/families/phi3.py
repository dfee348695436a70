"""Phi-3 and Phi-4-mini: Llama with its inputs in one Linear each; Phi-4-multimodal's decoder of text too."""

from dataclasses import replace

from hfopt.patches.families.family import MlpParts
from hfopt.patches.families.llama import LLAMA

PHI3 = replace(
    LLAMA,
    name="Phi-3",
    model_types=("phi3", "phi4_multimodal"),
    attention=replace(LLAMA.attention, inputs=("qkv_proj",)),
    mlp=MlpParts(("gate_up_proj",), "down_proj", is_fused=True),
    decoder=replace(LLAMA.decoder, idle=("embed_tokens_extend",)),
)
