"""OLMo 2 and 3, and EXAONE 4: norms behind attention and feed-forward block, and of queries and keys."""

from dataclasses import replace

from hfopt.patches.families.llama import LLAMA

OLMO2 = replace(
    LLAMA,
    name="OLMo 2",
    model_types=("olmo2", "olmo3", "exaone4"),
    layer=replace(
        LLAMA.layer, norms=(), post_norms=("post_attention_layernorm", "post_feedforward_layernorm")
    ),
)
