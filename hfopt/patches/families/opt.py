"""OPT, XGLM, BioGPT: the feed-forward block inline, LayerNorm before or after, learned or sinusoidal positions."""

from dataclasses import replace

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
        project_in="project_in",
        project_out="project_out",
    ),
)

_SCALED = Decoder("model", "embed_tokens", "layers", "layer_norm", positions="embed_positions")

XGLM = replace(OPT, name="XGLM", model_types=("xglm",), decoder=_SCALED)

BIOGPT = replace(OPT, name="BioGPT", model_types=("biogpt",), decoder=replace(_SCALED, path="biogpt"))
