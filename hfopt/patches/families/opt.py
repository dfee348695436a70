"""OPT: layers with the feed-forward block inline, LayerNorm before or after, learned positions."""

from hfopt.patches.families.family import Decoder, Family

OPT = Family(
    name="OPT",
    model_types=("opt",),
    parts={
        r"layers\.\d+": "inline_layer",
        "self_attn": "unrotated_attention",
        "self_attn_layer_norm": "layer_norm",
        "final_layer_norm": "layer_norm",
        "project_in": "linear",
        "project_out": "linear",
        "lm_head": "linear",
    },
    decoder=Decoder(
        "model.decoder",
        "embed_tokens",
        "layers",
        "final_layer_norm",
        positions="embed_positions",
        project_in="project_in",
        project_out="project_out",
    ),
)
