"""Qwen3: Llama with a norm of each query head and each key head before the rotation."""

from dataclasses import replace

from hfopt.patches.families.llama import LLAMA

QWEN3 = replace(
    LLAMA,
    name="Qwen3",
    model_types=("qwen3",),
    attention=replace(LLAMA.attention, norms=("q_norm", "k_norm")),
)
