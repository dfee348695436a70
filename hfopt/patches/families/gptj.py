"""GPT-J: parallel layers with one LayerNorm, partly rotated heads, a plain feed-forward block."""

from hfopt.patches.families.family import Decoder, Family

GPTJ = Family(
    name="GPT-J",
    model_types=("gptj",),
    parts={
        r"h\.\d+": "parallel_layer",
        "attn": "table_attention",
        "mlp": "plain_mlp",
        "ln_1": "layer_norm",
        "ln_f": "layer_norm",
        "lm_head": "linear",
    },
    decoder=Decoder("transformer", "wte", "h", "ln_f", rotary="rotary_emb"),
)
