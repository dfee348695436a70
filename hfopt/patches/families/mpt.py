"""MPT: sequential layers, LayerNorm without biases, ALiBi, queries, keys and values within limits."""

from hfopt.patches.families.family import AttentionParts, Decoder, Family, LayerParts, MlpParts

MPT = Family(
    name="MPT",
    model_types=("mpt",),
    attention=AttentionParts(("Wqkv",), "out_proj", "alibi", ("none",), clip="clip_qkv", hides=True),
    mlp=MlpParts(("up_proj",), "down_proj"),
    layer=LayerParts("sequential", "attn", ("norm_1", "norm_2"), mlp="ffn"),
    decoder=Decoder("transformer", "wte", "blocks", "norm_f"),
)
