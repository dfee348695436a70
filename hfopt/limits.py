"""What this machine can do at most, measured: bytes and operations a second; and what a model needs of both.

On a shared machine the bandwidth swings within minutes, so a share of it means something only against a
figure from just before and just after.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_MIN_BUFFER = 256 << 20
_MATMUL_SIZE = 1536


def _last_level_cache() -> int:
    """Bytes of the largest CPU cache; 0 where the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)


class BandwidthMeter:
    """Measures the streaming read bandwidth of torch's threads over a buffer far larger than the caches."""

    def __init__(self) -> None:
        size = max(_MIN_BUFFER, 4 * _last_level_cache())
        self._buffer = torch.ones(size // 4)

    def measure(self, passes: int = 5) -> float:
        """Bytes a second of the fastest of `passes` sums over the buffer (about 10 ms each)."""
        seconds = []
        for _ in range(passes + 1):
            begin = time.perf_counter()
            self._buffer.sum()
            seconds.append(time.perf_counter() - begin)
        return self._buffer.nbytes / min(seconds[1:])


def matmul_rate(dtype: torch.dtype, repetitions: int = 3) -> float:
    """Operations a second that `torch.matmul` reaches on square matrices (the fastest of `repetitions`)."""
    left = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE).to(dtype)
    right = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE).to(dtype)
    seconds = []
    for _ in range(repetitions + 1):
        begin = time.perf_counter()
        torch.matmul(left, right.T)
        seconds.append(time.perf_counter() - begin)
    return 2 * _MATMUL_SIZE**3 / min(seconds[1:])


def read_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights that every decode step reads: all but embedding tables that are not the lm_head too.

    Experts of a mixture are counted as if all were read.
    """
    tables = {module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        tables.discard(head.weight.data_ptr())
    weights = {weight.data_ptr(): weight for weight in model.parameters() if weight.data_ptr() not in tables}
    return list(weights.values())


def _attention_shape(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """(layers, query heads, key and value heads, channels of a head)."""
    config: Any = model.config.get_text_config(decoder=True)
    n_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return (
        config.num_hidden_layers,
        n_heads,
        getattr(config, "num_key_value_heads", None) or n_heads,
        head_dim,
    )


def bytes_per_token_in_cache(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers."""
    n_layers, _, n_kv_heads, head_dim = _attention_shape(model)
    return 2 * n_layers * n_kv_heads * head_dim * model.dtype.itemsize


def bytes_per_step(
    model: PreTrainedModel, n_prompts: int, prompt_length: int, n_rows: int, n_new: int
) -> float:
    """Bytes that one decode step must read at least, on average over the steps for `n_new` tokens.

    All weights once, the keys and values of `n_prompts` prompts once each, of the new tokens once a row.
    """
    weights = sum(weight.nbytes for weight in read_weights(model))
    cached = n_prompts * prompt_length + n_rows * n_new / 2
    return weights + cached * bytes_per_token_in_cache(model)


def prefill_operations(model: PreTrainedModel, n_prompts: int, prompt_length: int) -> float:
    """Operations of reading `n_prompts` prompts, with the lm_head on the last position only."""
    n_layers, n_heads, _, head_dim = _attention_shape(model)
    head = model.get_output_embeddings()
    matrices = [weight for weight in read_weights(model) if weight.ndim == 2]
    head_size = head.weight.numel() if head is not None else 0
    body_size = sum(weight.numel() for weight in matrices) - head_size
    # scores and weighted values, two operations each, over the causal half of the square
    attention = 4 * n_layers * n_heads * head_dim * prompt_length**2 / 2
    return n_prompts * (2 * body_size * prompt_length + attention + 2 * head_size)
