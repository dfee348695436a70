"""OPT, XGLM, BioGPT, BART and its relatives: the feed-forward block is in the layer, LayerNorm before or after."""

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

_BARTS = (
    "bart", "blenderbot", "marian", "mbart", "mvp", "pegasus", "plbart", "trocr", "whisper",
)  # fmt: skip

# Decoders of models that have an encoder too, by themselves; some have no norm of embeddings, or none behind the layers
BART = replace(
    OPT,
    name="BART",
    model_types=_BARTS,
    layer=replace(
        OPT.layer, topology=("inline", "inline_post"), idle=("encoder_attn", "encoder_attn_layer_norm")
    ),
    decoder=Decoder(
        "model.decoder",
        "embed_tokens",
        "layers",
        "layer_norm",
        heads=("lm_head", "output_projection", "proj_out"),
        positions="embed_positions",
        sum_norm="layernorm_embedding",
        multiplier="embed_scale",
    ),
)

BIGBIRD_PEGASUS = replace(
    BART,
    name="BigBirdPegasus",
    model_types=("bigbird_pegasus",),
    decoder=replace(BART.decoder, norm="layernorm_embedding", sum_norm=None),
)

BLENDERBOT_SMALL = replace(
    BART,
    name="BlenderbotSmall",
    model_types=("blenderbot-small",),
    decoder=replace(BART.decoder, tokens_norm="layernorm_embedding", sum_norm=None),
)

BIOGPT = replace(OPT, name="BioGPT", model_types=("biogpt",), decoder=replace(_SCALED, path="biogpt"))
