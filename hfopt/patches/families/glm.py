"""GLM: Llama with half of each head rotated, in pairs, and a fused gate; GLM-4: with norms of what is added."""

from dataclasses import replace

from hfopt.patches.families.family import MlpParts
from hfopt.patches.families.llama import LLAMA

GLM = replace(
    LLAMA,
    name="GLM",
    model_types=("glm",),
    mlp=MlpParts(("gate_up_proj",), "down_proj", is_fused=True),
)

GLM4 = replace(
    GLM,
    name="GLM-4",
    model_types=("glm4",),
    layer=replace(GLM.layer, post_norms=("post_self_attn_layernorm", "post_mlp_layernorm")),
)
