"""A tiny random model of every causal language model type of transformers: generic sizes, and what some need besides."""

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY, WINDOW, POSITIONS = 199, 8, 256
_LAYERS = 4
_LARGEST = 4_000_000  # parameters: more of them mean that a size is missing here

# Fields of configurations by their value.
_FIELDS: tuple[tuple[Any, str], ...] = (
    (VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        64,
        "hidden_size n_embd d_model emb_dim embedding_size input_embedding_size output_embedding_size lru_width"
        " word_embed_proj_dim mamba_d_ssm",
    ),
    (
        _LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers"
        " num_encoder_layers",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads num_decoder_attention_heads"
        " attention_heads index_n_heads linear_num_value_heads swa_num_attention_heads linear_num_heads num_experts"
        " n_routed_experts num_local_experts moe_num_experts",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok moe_topk moe_k"
        " top_k_experts encoder_attention_heads num_encoder_attention_heads"
        " eos_token_id",
    ),
    (
        16,
        "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim q_lora_rank kv_lora_rank linear_key_head_dim"
        " linear_value_head_dim index_head_dim swa_head_dim dim_head kv_channels attention_head_size d_head"
        " linear_head_dim hidden_size_per_layer_input laurel_rank adapter_rank indexer_head_dim mamba_d_state",
    ),
    (
        128,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dff dim_ff n_inner ffn_hidden_size"
        " intermediate_size_mlp shared_intermediate_size dense_intermediate_size feed_forward_size"
        " prefix_dense_intermediate_size",
    ),
    (
        32,
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"
        " moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    ),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    (
        WINDOW,
        "sliding_window sliding_window_size attention_window_size window_size local_attention attention_chunk_size"
        " keep_window_size rotary_dim",
    ),
    (1, "n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts bos_token_id"),
    (0, "pad_token_id"),
    (True, "is_decoder"),
)
_SIZES = {name: value for value, names in _FIELDS for name in names.split()}
# What is taken over from a type's own layers: each kind of them, in turn.
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")

# Multi-head latent attention has keys of its own for each head.
_LATENT = "kv_lora_rank"

_ALTERNATING = ["linear_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
}
_AUDIO = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_blocks": 1,
    "num_attention_heads": 2,
    "ext_pw_out_channel": 32,
    "depthwise_separable_out_channel": 32,
    "nemo_conv_channels": 32,
}
_BYTES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}

_OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {
        "patcher_config": _BYTES,
        "encoder_config": {**_BYTES, "hidden_size_global": 64},
        "decoder_config": {**_BYTES, "hidden_size_global": 64},
        "global_config": _BYTES,
        "encoder_hash_byte_group_vocab": 199,
    },
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots3_note_text": {
        "head_dim": 32,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "git": {"vision_config": _VISION},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _ALTERNATING, "mamba_n_heads": 8, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "n_routed_experts": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16},
    "phi4_multimodal": {"vision_config": _VISION, "audio_config": _AUDIO},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_shape": (16, 16), "axial_pos_embds_dim": (16, 48)},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "shape_vocab_size": 199},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


class Skipped(Exception):
    """There is no such tiny model that continues texts; the message says why."""


def config(model_type: str, **changes: Any) -> Any:
    """The configuration of a tiny model of this type, with other fields where `changes` names them. Raises Skipped."""
    kind = CONFIG_MAPPING[model_type]
    own = kind()
    text = own.get_text_config(decoder=True)
    if text.model_type != own.model_type:
        raise Skipped(f"a model of several; its decoder is of the type {text.model_type}")
    fields = {field.name for field in dataclasses.fields(kind)}
    sizes = {name: value for name, value in _SIZES.items() if name in fields}
    if _LATENT in fields:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for name in _KINDS:
        if name in fields and (kinds := list(dict.fromkeys(getattr(own, name) or ()))):
            sizes[name] = (kinds * _LAYERS)[:_LAYERS]
    return kind(**{**sizes, **_OVERRIDES.get(model_type, {}), **changes})


def tiny(model_type: str, **changes: Any) -> Any:
    """A model of this type in float32, with distinct weights everywhere; changes as in `config`. Raises Skipped."""
    try:
        settings = config(model_type, **changes)
        with torch.device("meta"):
            number = sum(each.numel() for each in AutoModelForCausalLM.from_config(settings).parameters())
        if number > _LARGEST:
            raise Skipped(f"these sizes leave {number:,} parameters")
        return random_model(settings)
    except Skipped:
        raise
    except Exception as error:
        raise Skipped(f"cannot be made of these sizes: {' '.join(str(error).split())[:120]}") from error


def random_model(settings: Any) -> Any:
    """A model of this configuration in float32, with distinct weights everywhere."""
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            _disturb(parameter)
    # only lengths end a text
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0, eos_token_id=None)
    return model


def _disturb(parameter: torch.Tensor) -> None:
    """Norms and biases begin as ones and zeros, and small weights give flat logits: either hides what goes wrong."""
    if parameter.ndim < 2:
        parameter += 0.2 * torch.randn_like(parameter)
    elif parameter.std() > 0:
        parameter *= 0.15 / parameter.std()
    else:
        torch.nn.init.normal_(parameter, std=0.15)


def prompts() -> dict[str, torch.Tensor]:
    """Two of distinct tokens, longer than the windows; the second one is padded."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.stack([torch.randperm(VOCABULARY - 3, generator=generator)[:13] + 3 for _ in range(2)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
