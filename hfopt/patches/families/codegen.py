"""CodeGen: GPT-J with queries, values and keys in one Linear, in four shards."""

from dataclasses import replace

from hfopt.patches.families.gptj import GPTJ

CODEGEN = replace(
    GPTJ,
    name="CodeGen",
    model_types=("codegen",),
    attention=replace(GPTJ.attention, inputs=("qkv_proj",), orders=("shards", "stacked")),
)
