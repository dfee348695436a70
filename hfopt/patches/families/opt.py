"""OPT: layers with the feed-forward block inline, LayerNorm before or after, learned positions."""

from hfopt.patches.families.family import AttentionParts, Decoder, Family, LayerParts

OPT = Family(
    name="OPT",
    model_types=("opt",),
    attention=AttentionParts(("q_proj", "k_proj", "v_proj"), "out_proj", "none", ("none",)),
    mlp=None,
    layer=LayerParts(
        "inline",
        "self_attn",
        ("self_attn_layer_norm", "final_layer_norm"),
        mlp=("fc1", "activation_fn", "fc2"),
    ),
    decoder=Decoder(
        "model.decoder",
        "embed_tokens",
        "layers",
        "final_layer_norm",
        positions="embed_positions",
        position_class="OPTLearnedPositionalEmbedding",
        project_in="project_in",
        project_out="project_out",
    ),
)
