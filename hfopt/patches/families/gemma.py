"""Gemma: Llama with scaled embeddings; Gemma 2 and 3 have norms before and after each part, and limits of scores and logits."""

from dataclasses import replace

from hfopt.patches.families.llama import LLAMA

_DECODER = replace(LLAMA.decoder, embedding_scale="embed_scale", softcap="final_logit_softcapping")

GEMMA = replace(LLAMA, name="Gemma", model_types=("gemma",), decoder=_DECODER)

GEMMA2 = replace(
    LLAMA,
    name="Gemma 2 and 3",
    model_types=("gemma2", "gemma3_text"),
    attention=replace(LLAMA.attention, softcap="attn_logit_softcapping"),
    layer=replace(
        LLAMA.layer,
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    decoder=_DECODER,
)
