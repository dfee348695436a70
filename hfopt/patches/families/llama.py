"""Llama, Qwen2 and 2.5, Mistral without a window: sequential layers, RMSNorm, rotated heads, a gated feed-forward block."""

from hfopt.patches.families.family import AttentionParts, Decoder, Family, LayerParts, MlpParts

LLAMA = Family(
    name="Llama",
    model_types=("llama", "qwen2", "mistral"),
    attention=AttentionParts(("q_proj", "k_proj", "v_proj"), "o_proj"),
    mlp=MlpParts(("gate_proj", "up_proj"), "down_proj"),
    layer=LayerParts("sequential", "self_attn", ("input_layernorm", "post_attention_layernorm")),
    decoder=Decoder("model", "embed_tokens", "layers", "norm", rotary="rotary_emb"),
)
