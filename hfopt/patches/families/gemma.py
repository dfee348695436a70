"""Gemma 2 and 3: Llama with norms before and after attention and feed-forward block."""

from dataclasses import replace

from hfopt.patches.families.llama import LLAMA

GEMMA2 = replace(
    LLAMA,
    name="Gemma 2 and 3",
    model_types=("gemma2", "gemma3_text"),
    layer=replace(
        LLAMA.layer,
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
)
