"""Llama, Qwen2 and 2.5, Mistral without a window: sequential layers, RMSNorm, rotated heads, a gated feed-forward block."""

from hfopt.patches.families.family import Decoder, Family

LLAMA = Family(
    name="Llama",
    model_types=("llama", "qwen2", "mistral"),
    parts={
        r"layers\.\d+": "sequential_layer",
        "self_attn": "rotary_attention",
        "mlp": "gated_mlp",
        "input_layernorm": "rms_norm",
        "post_attention_layernorm": "rms_norm",
        "norm": "rms_norm",
        "lm_head": "linear",
    },
    decoder=Decoder("model", "embed_tokens", "layers", "norm", rotary="rotary_emb"),
)
