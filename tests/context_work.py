"""What each of several processes does with a model that each has, and prompts that they share; see `tests.ranks`."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import hfopt
from hfopt import generation
from hfopt.cache import ShardedLayer

_SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {"num_key_value_heads": 2, "intermediate_size": 96}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GQA),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 24}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
}
N_TOKENS = 1061  # of a prompt, which do not divide
STEPS = {"max_new_tokens": 50, "min_new_tokens": 50, "pad_token_id": 0}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**_SIZES, **settings})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prompt(n_rows: int = 1, n_tokens: int = N_TOKENS) -> Tensor:
    return torch.randint(5, 900, (n_rows, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


class Seen(transformers.LogitsProcessor):
    """Keeps the scores of each step, and how many tokens the cache of the request holds in this process."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores.float().clone())
        return scores
