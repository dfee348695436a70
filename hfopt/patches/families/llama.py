"""Llama and what differs from it in name alone: sequential layers, RMSNorm, rotated heads, a gated feed-forward block."""

from hfopt.patches.families.family import AttentionParts, Decoder, Family, LayerParts, MlpParts

LLAMA = Family(
    name="Llama",
    model_types=(
        "llama",
        "qwen2",
        "mistral",
        "ministral",
        "ministral3",
        "smollm3",
        "olmo",
        "arcee",
        "seed_oss",
    ),
    attention=AttentionParts(
        ("q_proj", "k_proj", "v_proj"), "o_proj", norms=("q_norm", "k_norm"), clip="clip_qkv"
    ),
    mlp=MlpParts(("gate_proj", "up_proj"), "down_proj"),
    layer=LayerParts("sequential", "self_attn", ("input_layernorm", "post_attention_layernorm")),
    decoder=Decoder("model", "embed_tokens", "layers", "norm", rotary="rotary_emb"),
)
