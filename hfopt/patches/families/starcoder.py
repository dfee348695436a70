"""StarCoder 2, and what else is Llama with a plain feed-forward block: Nemotron, Apertus, nanochat (whose norms have no
weights, and one of them stands in front of the layers and behind them).
"""

from dataclasses import replace

from hfopt.patches.families.family import MlpParts
from hfopt.patches.families.llama import LLAMA
from hfopt.patches.families.phi import PHI

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

NANOCHAT = replace(
    LLAMA,
    name="nanochat",
    model_types=("nanochat",),
    mlp=PHI.mlp,
    decoder=replace(LLAMA.decoder, tokens_norm=LLAMA.decoder.norm),
)
