"""Small random models of the families, prompts, and the comparison of two results of `generate`."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Cache,
    FalconConfig,
    FalconForCausalLM,
    GenerationMixin,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 211
Model: TypeAlias = Any  # transformers leaves the methods of GenerationMixin untyped


class Doubled(nn.Module):
    """What an adapter is to the model: another module around its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * self.inner(hidden_states)


# Name of the cache among the arguments of `generate` and of these models, by its type: hfopt is not asked here
CACHE = next(
    (
        name
        for name, each in inspect.signature(LlamaForCausalLM.forward).parameters.items()
        if "Cache" in str(each.annotation)
    ),
    "",
)


def cache_of(output: Any) -> Any:
    """The cache in the output of a model, or of `generate`."""
    return next((value for value in output.values() if isinstance(value, Cache)), None)


# Our loops of `generate`, decoder layers and programs are built on what transformers 5 has
IS_WHOLE = hasattr(GenerationMixin, "_prefill")
NOT_WHOLE = (
    "with transformers 4, the loops of generate and the decoder layers are its own, and there are no programs"
)
needs_programs = pytest.mark.skipif(not IS_WHOLE, reason=NOT_WHOLE)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(**changes: Any) -> Model:
    return llama_like(LlamaForCausalLM, LlamaConfig, **changes)


def llama_like(model_class: Any, config_class: Any, **changes: Any) -> Model:
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return _random(model_class, config_class, **{**sizes, **changes})


def gptj(**changes: Any) -> Model:
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "rotary_dim": 8, "n_positions": 96}
    return _random(GPTJForCausalLM, GPTJConfig, **{**sizes, **changes})


def opt(**changes: Any) -> Model:
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    norms = {"do_layer_norm_before": False, "max_position_embeddings": 96, "init_std": 0.3}
    return _random(OPTForCausalLM, OPTConfig, **{**sizes, **norms, **changes})


def opt_with_plain_norms(**changes: Any) -> Model:
    """Norms without weights."""
    try:
        return opt(layer_norm_elementwise_affine=False, **changes)
    except AttributeError:
        pytest.skip("transformers 4 cannot make this model")


def qwen2(**changes: Any) -> Model:
    model = llama_like(Qwen2ForCausalLM, Qwen2Config, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they begin as zeros, which would hide one that is left out
            torch.nn.init.normal_(parameter)
    return model


def mistral(**changes: Any) -> Model:
    return llama_like(MistralForCausalLM, MistralConfig, **{"sliding_window": None, **changes})


def qwen3(**changes: Any) -> Model:
    model = llama_like(Qwen3ForCausalLM, Qwen3Config, **{"head_dim": 24, **changes})
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):  # they begin as ones
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


def phi3(**changes: Any) -> Model:
    return llama_like(Phi3ForCausalLM, Phi3Config, **{"sliding_window": None, **changes})


LONG = 24  # tokens, beyond which `phi4_mini` has other angles


def phi4_mini(**changes: Any) -> Model:
    """Phi-3 as Phi-4-mini has it: partly rotated heads, angles that change with the length, a window beyond reach."""
    n_angles = changes.get("hidden_size", 64) // 4 * 3 // 8
    ropes = {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.1 * index for index in range(n_angles)],
        "long_factor": [2.0 + 0.5 * index for index in range(n_angles)],
        "original_max_position_embeddings": LONG,
    }
    sizes = {"max_position_embeddings": 4 * LONG, "sliding_window": 1024, "tie_word_embeddings": True}
    more = {"original_max_position_embeddings": LONG, "rope_parameters": ropes}
    return phi3(**{**sizes, **more, **changes})


def granite(**changes: Any) -> Model:
    multipliers = {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.3,
        "logits_scaling": 6.0,
    }
    return llama_like(GraniteForCausalLM, GraniteConfig, **{**multipliers, **changes})


def bloom(**changes: Any) -> Model:
    return _shaken(
        _random(BloomForCausalLM, BloomConfig, **{"n_layer": 2, "hidden_size": 64, "n_head": 4, **changes})
    )


def bloom_with_normed_residuals(**changes: Any) -> Model:
    """What is added is added to what a norm has made; and a number of heads that is no power of 2."""
    sizes = {"hidden_size": 96, "n_head": 6}
    return bloom(**{**sizes, "apply_residual_connection_post_layernorm": True, **changes})


def mpt(**changes: Any) -> Model:
    sizes = {"d_model": 96, "n_heads": 6, "n_layers": 2, "max_seq_len": 96}
    more = {"attn_config": {"clip_qkv": 1.5}, "use_cache": True}
    return _shaken(_random(MptForCausalLM, MptConfig, **{**sizes, **more, **changes}))


def falcon_alibi(**changes: Any) -> Model:
    """Falcon RW: sequential layers, each head with keys of its own, and a bias that is counted in bfloat16."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "bias": True}
    more = {"alibi": True, "multi_query": False, "num_kv_heads": 4, "parallel_attn": False}
    return _shaken(_random(FalconForCausalLM, FalconConfig, **{**sizes, **more, **changes}))


NEO_WINDOW = 7


def gpt_neo(**changes: Any) -> Model:
    """Whose second layer sees a window that is shorter than the prompts."""
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96}
    more = {
        "max_position_embeddings": 96,
        "window_size": NEO_WINDOW,
        "attention_types": [[["global", "local"], 1]],
        "initializer_range": 0.15,  # scores are not scaled
    }
    return _shaken(_random(GPTNeoForCausalLM, GPTNeoConfig, **{**sizes, **more, **changes}))


def _shaken(model: Model) -> Model:
    """With norms and biases that are neither ones nor zeros, which would hide one that is left out."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float(parameter.data.mean()), 0.3)
    return model


FAMILIES: dict[str, Callable[..., Model]] = {"llama": llama, "gptj": gptj, "opt": opt}
# Llama's relatives: other names, norms of heads, fused inputs, multipliers
RELATIVES: dict[str, Callable[..., Model]] = {
    "qwen2": qwen2,
    "mistral": mistral,
    "qwen3": qwen3,
    "phi3": phi3,
    "granite": granite,
}

# Scores that fall with distance, windows in a cache that holds everything
DISTANT: dict[str, Callable[..., Model]] = {
    "bloom": bloom,
    "bloom, normed residuals": bloom_with_normed_residuals,
    "mpt": mpt,
    "falcon": falcon_alibi,
    "gpt_neo": gpt_neo,
}


def _random(model_class: Any, config_class: Any, **sizes: Any) -> Model:
    torch.manual_seed(7)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = config_class(**{"initializer_range": 0.3, **tokens, **sizes})
    return model_class(config).eval()


def prompts(n_rows: int = 3, length: int = 9) -> dict[str, Any]:
    """Distinct tokens, rows 1, 2, ... padded on the left by 3, 6, ..."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.stack(
        [torch.randperm(VOCABULARY - 2, generator=generator)[:length] + 2 for _ in range(n_rows)]
    )
    attention_mask = torch.ones_like(ids)
    for row in range(n_rows):
        attention_mask[row, : min(3 * row, length - 1)] = 0
    return {"input_ids": ids * attention_mask, "attention_mask": attention_mask}


def assert_same(ours: Any, stock: Any) -> None:
    """Tokens and indices equal, floats close, classes and nesting alike."""
    assert type(ours) is type(stock)
    if isinstance(ours, Tensor):
        assert ours.dtype == stock.dtype and ours.shape == stock.shape
        if ours.is_floating_point():
            torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(ours, stock)
    elif isinstance(ours, dict):
        assert list(ours) == list(stock)
        for name in ours:
            if name == CACHE:
                assert ours[name].get_seq_length() == stock[name].get_seq_length()
            else:
                assert_same(ours[name], stock[name])
    elif isinstance(ours, tuple):
        assert len(ours) == len(stock)
        for one, other in zip(ours, stock, strict=True):
            assert_same(one, other)
