"""Llama, and what differs from it by norms of heads, factors, limits and rotation alone: sequential layers, RMSNorm, a gated
feed-forward block.
"""

from hfopt.patches.families.family import AttentionParts, Decoder, Family, LayerParts, MlpParts

LLAMA = Family(
    name="Llama",
    model_types=(
        "llama", "qwen2", "qwen3", "mistral", "ministral", "ministral3", "smollm3", "olmo", "granite", "gemma", "seed_oss",
        "ernie4_5", "helium", "stablelm", "hunyuan_v1_dense", "bitnet", "granite_swa",
    ),
    attention=AttentionParts(
        ("q_proj", "k_proj", "v_proj"),
        "o_proj",
        clip="clip_qkv",
        softcap="attn_logit_softcapping",
    ),
    mlp=MlpParts(("gate_proj", "up_proj"), "down_proj"),
    layer=LayerParts("sequential", "self_attn", ("input_layernorm", "post_attention_layernorm")),
    decoder=Decoder("model", "embed_tokens", "layers", "norm"),
)  # fmt: skip
