"""Granite: Llama with multipliers of embeddings, of what layers add, of scores (`scaling`), and a divisor of logits."""

from dataclasses import replace

from hfopt.patches.families.llama import LLAMA

GRANITE = replace(
    LLAMA,
    name="Granite",
    model_types=("granite",),
    layer=replace(LLAMA.layer, multiplier="residual_multiplier"),
    decoder=replace(LLAMA.decoder, multiplier="embedding_multiplier", divisor="logits_scaling"),
)
