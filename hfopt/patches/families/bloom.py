"""BLOOM: sequential layers whose parts add the residual themselves, LayerNorm behind the embedding, ALiBi."""

from hfopt.patches.families.family import AttentionParts, Decoder, Family, LayerParts, MlpParts

BLOOM = Family(
    name="BLOOM",
    model_types=("bloom",),
    attention=AttentionParts(("query_key_value",), "dense", "alibi", ("none",), orders=("groups", "stacked")),
    mlp=MlpParts(("dense_h_to_4h",), "dense_4h_to_h"),
    layer=LayerParts("sequential", "self_attention", ("input_layernorm", "post_attention_layernorm")),
    decoder=Decoder("transformer", "word_embeddings", "h", "ln_f", tokens_norm="word_embeddings_layernorm"),
)
