"""GPT-Neo: GPT-2 with heads in Linears of their own, scores that are not scaled, and windows in every other layer."""

from dataclasses import replace

from hfopt.patches.families.family import AttentionParts
from hfopt.patches.families.gpt2 import GPT2

GPT_NEO = replace(
    GPT2,
    name="GPT-Neo",
    model_types=("gpt_neo",),
    attention=AttentionParts(("q_proj", "k_proj", "v_proj"), "out_proj", "band", ("none",)),
    layer=replace(GPT2.layer, attention="attn.attention"),
)
