"""Gemma 2 and 3, and relatives: Llama with norms before and after attention and feed-forward block, under other names."""

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

VAULT_GEMMA = replace(
    LLAMA,
    name="VaultGemma",
    model_types=("vaultgemma",),
    layer=replace(LLAMA.layer, norms=GEMMA2.layer.norms),
)

HYPERCLOVA_X = replace(
    LLAMA,
    name="HyperCLOVA X",
    model_types=("hyperclovax",),
    layer=replace(LLAMA.layer, post_norms=("post_norm1", "post_norm2")),
)
