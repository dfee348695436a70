"""Phi: parallel layers with one LayerNorm, biases everywhere; Persimmon: the same names over heads that are interleaved."""

from dataclasses import replace

from hfopt.patches.families.family import AttentionParts, Family, LayerParts, MlpParts
from hfopt.patches.families.llama import LLAMA

_DECODER = replace(LLAMA.decoder, norm="final_layernorm")

PHI = Family(
    name="Phi",
    model_types=("phi",),
    attention=AttentionParts(("q_proj", "k_proj", "v_proj"), "dense"),
    mlp=MlpParts(("fc1",), "fc2"),
    layer=LayerParts("parallel", "self_attn", ("input_layernorm",)),
    decoder=_DECODER,
)

PERSIMMON = Family(
    name="Persimmon",
    model_types=("persimmon",),
    attention=AttentionParts(("query_key_value",), "dense", orders=("groups", "stacked")),
    mlp=MlpParts(("dense_h_to_4h",), "dense_4h_to_h"),
    layer=LLAMA.layer,
    decoder=_DECODER,
)
