"""GPT-2 and GPT-BigCode (StarCoder): sequential layers, LayerNorm, learned positions, all heads in one matrix."""

from hfopt.patches.families.family import AttentionParts, Decoder, Family, LayerParts, MlpParts

GPT2 = Family(
    name="GPT-2",
    model_types=("gpt2", "gpt_bigcode"),
    attention=AttentionParts(("c_attn",), "c_proj", "none", ("none",), orders=("stacked", "groups")),
    mlp=MlpParts(("c_fc",), "c_proj"),
    layer=LayerParts("sequential", "attn", ("ln_1", "ln_2")),
    decoder=Decoder("transformer", "wte", "h", "ln_f", positions="wpe"),
)
