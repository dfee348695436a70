"""ModernBERT's decoder: Llama with LayerNorm, none in front of the first attention, and a transform before the logits."""

from dataclasses import replace

from hfopt.patches.families.family import Decoder, Family, LayerParts, MlpParts, TransformParts
from hfopt.patches.families.llama import LLAMA

MODERNBERT = Family(
    name="ModernBERT",
    model_types=("modernbert-decoder",),
    attention=replace(LLAMA.attention, output="Wo"),
    mlp=MlpParts(("Wi",), "Wo", is_fused=True),
    layer=LayerParts("sequential", "attn", ("attn_norm", "mlp_norm")),
    decoder=Decoder(
        "model",
        "embeddings.tok_embeddings",
        "layers",
        "final_norm",
        heads=("decoder",),
        tokens_norm="embeddings.norm",
        transform="lm_head",
    ),
    transform=TransformParts("dense", "act", "norm"),
)
