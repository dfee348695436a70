"""Tiny models of the families of decoders that hfopt knows whole, by name."""

from typing import Any

from tests.generation_cases import Model
from tests.model_types import tiny

# type, and fields beside the generic ones
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "granite": ("granite", {}),
    "gpt-j": ("gptj", {}),
    "opt": ("opt", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "mistral": ("mistral", {}),
    "ministral": ("ministral", {}),
    "ministral3": ("ministral3", {}),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "olmo": ("olmo", {"clip_qkv": 0.8}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "exaone4": ("exaone4", {}),
    "cohere": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "phi": ("phi", {"qk_layernorm": True}),
    "stablelm": ("stablelm", {}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", {}),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2": ("gpt2", {}),
    "gpt-bigcode": ("gpt_bigcode", {}),
    "gpt-bigcode, all heads": ("gpt_bigcode", {"multi_query": False}),
    "codegen": ("codegen", {}),
    "falcon-7b": ("falcon", {"num_kv_heads": 4}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True}),
    "falcon, sequential": ("falcon", {"parallel_attn": False, "multi_query": False, "num_kv_heads": 4}),
    "nemotron": ("nemotron", {}),
    "persimmon": ("persimmon", {}),
    "seed-oss": ("seed_oss", {}),
    "ernie4.5": ("ernie4_5", {}),
    "nanochat": ("nanochat", {}),
    "bitnet": ("bitnet", {}),
    "granite-swa": ("granite_swa", {"layer_rope_theta": [1e4, 1e4, 50.0, 1e4]}),
    "modernbert": ("modernbert-decoder", {}),
    "arcee": ("arcee", {}),
    "helium": ("helium", {}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "xglm": ("xglm", {}),
    "biogpt": ("biogpt", {}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {}),
    "gpt-neo": ("gpt_neo", {}),
    "bart": ("bart", {}),
    "mbart": ("mbart", {}),
    "pegasus": ("pegasus", {}),
    "blenderbot": ("blenderbot", {}),
    "blenderbot-small": ("blenderbot-small", {}),
    "plbart": ("plbart", {}),
    "mvp": ("mvp", {}),
    "trocr": ("trocr", {}),
    "whisper": ("whisper", {}),
    "marian": ("marian", {}),
    "bigbird_pegasus": ("bigbird_pegasus", {}),
    "falcon, ALiBi": ("falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 4}),
}


def made(name: str, **changes: Any) -> Model:
    """A model in float32 with distinct weights everywhere; changes: fields of its configuration."""
    model_type, fields = DECODERS[name]
    return tiny(model_type, **{**fields, **changes})
