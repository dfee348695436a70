"""StarCoder 2, and what else is Llama with a plain feed-forward block."""

from dataclasses import replace

from hfopt.patches.families.family import MlpParts
from hfopt.patches.families.llama import LLAMA

STARCODER2 = replace(
    LLAMA, name="StarCoder 2", model_types=("starcoder2",), mlp=MlpParts(("c_fc",), "c_proj")
)

NEMOTRON = replace(
    LLAMA, name="Nemotron", model_types=("nemotron", "arcee"), mlp=MlpParts(("up_proj",), "down_proj")
)

APERTUS = replace(
    NEMOTRON,
    name="Apertus",
    model_types=("apertus",),
    layer=replace(LLAMA.layer, norms=("attention_layernorm", "feedforward_layernorm")),
)
