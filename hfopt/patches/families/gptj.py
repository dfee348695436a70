"""GPT-J: parallel layers with one LayerNorm, partly rotated heads, a plain feed-forward block."""

from hfopt.patches.families.family import AttentionParts, Decoder, Family, LayerParts, MlpParts

GPTJ = Family(
    name="GPT-J",
    model_types=("gptj",),
    attention=AttentionParts(("q_proj", "k_proj", "v_proj"), "out_proj", "table", ("interleaved",)),
    mlp=MlpParts(("fc_in",), "fc_out"),
    layer=LayerParts("parallel", "attn", ("ln_1",)),
    decoder=Decoder("transformer", "wte", "h", "ln_f"),
)
