"""GPT-NeoX: parallel layers with two LayerNorms, or sequential ones, heads interleaved in one Linear."""

from hfopt.patches.families.family import AttentionParts, Decoder, Family, LayerParts, MlpParts

NEOX = Family(
    name="GPT-NeoX",
    model_types=("gpt_neox",),
    attention=AttentionParts(("query_key_value",), "dense", orders=("groups", "stacked")),
    mlp=MlpParts(("dense_h_to_4h",), "dense_4h_to_h"),
    layer=LayerParts(
        ("parallel", "sequential"), "attention", ("input_layernorm", "post_attention_layernorm")
    ),
    decoder=Decoder("gpt_neox", "embed_in", "layers", "final_layer_norm"),
)
