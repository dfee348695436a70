"""What this machine can do at most, measured: bytes and operations a second; and what a model needs of both.

On a shared machine the bandwidth swings within minutes, so a share of it means something only against a
figure from just before and just after.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfopt.host.config import key_heads
from hfopt.machine import env

_MIN_BUFFER = 256 << 20
_RESTS, _REST = 15, 0.02  # how often, seconds
# units of the operands, factors in one, and sums of multiply-adds, by the dtype of the factors; float16 is widened
_UNITS = {
    torch.float32: (torch.float32, 1, torch.float32),
    torch.bfloat16: (torch.uint32, 2, torch.float32),
    torch.float16: (torch.float32, 1, torch.float32),
    torch.int8: (torch.int32, 4, torch.int32),
}


class BandwidthMeter:
    """Measures the streaming read bandwidth of torch's threads over memory far larger than the caches.

    Two ways of reading are tried in turn, torch's sum and a kernel of our own, and the better one counts.

    Args:
        tensors: contiguous ones that are read one after the other; by default one is made.
    """

    def __init__(self, tensors: Sequence[torch.Tensor] = ()) -> None:
        self._buffers = [tensor.view(-1).view(torch.float32) for tensor in tensors]
        if not tensors:
            size = max(_MIN_BUFFER, 4 * env.last_level_cache())
            self._buffers = [torch.ones(size // 4)]
        self._arrays = [buffer.numpy() for buffer in self._buffers]
        self._sums = torch.empty(torch.get_num_threads()).numpy()
        self.n_bytes = sum(buffer.nbytes for buffer in self._buffers)

    def read_with_torch(self) -> None:
        """Read everything once with `torch.sum`."""
        for buffer in self._buffers:
            buffer.sum()

    def read_with_kernel(self) -> None:
        """Read everything once with a kernel."""
        from hfopt.kernels import peak
        from hfopt.kernels.jit import launch as jit

        jit.use_threads(torch.get_num_threads())
        for array in self._arrays:
            peak.read(array, self._sums)

    def measure(self, passes: int = 5) -> float:
        """Bytes a second of the fastest of `passes` passes in each of the two ways (about 10 ms each)."""
        ways = (self.read_with_torch, self.read_with_kernel)
        seconds = [_seconds(way) for _ in range(passes + 1) for way in ways]
        return self.n_bytes / min(seconds[len(ways) :])


class MultiplyAdd:
    """The most multiply-adds that torch's threads can do: a register tile on operands that stay in an L1 cache.

    dtype: float32, bfloat16 and float16 with float32 sums, or int8 (one factor unsigned) with int32 sums.
    """

    _ROUNDS = 5_000

    def __init__(self, dtype: torch.dtype) -> None:
        from hfopt.kernels import peak

        self._kernel = peak.multiply_codes if dtype is torch.int8 else peak.multiply_add
        units, per_unit, sums = _UNITS[dtype]
        threads = torch.get_num_threads()
        self._operands = [
            torch.zeros(peak.DEPTH, width).view(units).numpy() for width in (peak.ROWS, peak.COLUMNS)
        ]
        self._out = torch.empty(threads, peak.ROWS, peak.COLUMNS, dtype=sums).numpy()
        #: of one `run`, a multiply-add being two
        self.operations = 2 * self._ROUNDS * threads * peak.DEPTH * peak.ROWS * peak.COLUMNS * per_unit

    def run(self) -> None:
        """Run them once on all threads."""
        from hfopt.kernels.jit import launch as jit

        jit.use_threads(torch.get_num_threads())
        self._kernel(*self._operands, self._out, self._ROUNDS)

    def measure(self, passes: int = 3) -> float:
        """Operations a second of the fastest of `passes` runs."""
        return self.operations / min([_seconds(self.run) for _ in range(passes + 1)][1:])


def empty_launch(parallel: bool) -> Callable[[], object]:
    """A kernel that does nothing, on the calling thread or on all threads of the pool."""
    from hfopt.kernels import peak
    from hfopt.kernels.jit import launch as jit

    jit.use_threads(torch.get_num_threads())
    array = torch.empty(1).numpy()
    return partial(peak.start_threads if parallel else peak.start, array)


def launch_cost(launches: int = 200) -> tuple[float, float]:
    """Median seconds of an empty launch on all threads: (one right after the other, after 20 ms without work)."""
    launch = empty_launch(parallel=True)
    launch()
    busy = [_seconds(launch) for _ in range(launches)]
    rested = []
    for _ in range(_RESTS):
        time.sleep(_REST)
        rested.append(_seconds(launch))
    return statistics.median(busy), statistics.median(rested)


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def read_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights that every decode step reads: all but embedding tables that are not the lm_head too.

    Experts of a mixture are counted as if all were read.
    """
    tables = {module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Embedding)}
    head: Any = model.get_output_embeddings()
    if head is not None and not _is_quantized(head):
        tables.discard(head.weight.data_ptr())
    packed = [
        tensor
        for module in model.modules()
        if _is_quantized(module)
        for tensor in module._buffers.values()
        if tensor is not None
    ]
    weights = {
        weight.data_ptr(): weight
        for weight in (*model.parameters(), *packed)
        if weight.data_ptr() not in tables
    }
    return list(weights.values())


def _is_quantized(module: nn.Module) -> bool:
    """Whether it is a Linear whose weight is in its buffers."""
    return isinstance(module, nn.Linear) and "weight" not in module._parameters


def _matrix_size(model: PreTrainedModel) -> int:
    """Numbers in all matrices that `read_weights` are."""
    floats = sum(
        weight.numel()
        for weight in read_weights(model)
        if weight.ndim == 2 and isinstance(weight, nn.Parameter)
    )
    quantized: Any = (module for module in model.modules() if _is_quantized(module))
    return floats + sum(module.out_features * module.in_features for module in quantized)


def attention_shape(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """(layers, query heads, key and value heads, channels of a head)."""
    config: Any = model.config.get_text_config(decoder=True)
    n_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return config.num_hidden_layers, n_heads, key_heads(config), head_dim


def bytes_per_token_in_cache(model: PreTrainedModel, kv_cache: str | None = None) -> int:
    """Bytes of one token's keys and values in all layers; kv_cache: as in `IndirectCache`."""
    n_layers, _, n_kv_heads, head_dim = attention_shape(model)
    # codes have a scale of 4 bytes for each vector
    vector = head_dim * model.dtype.itemsize if kv_cache is None else head_dim + 4
    return 2 * n_layers * n_kv_heads * vector


def bytes_per_step(
    model: PreTrainedModel,
    n_prompts: int,
    prompt_length: int,
    n_rows: int,
    n_new: int,
    kv_cache: str | None = None,
) -> float:
    """Bytes that one decode step must read at least, on average over the steps for `n_new` tokens.

    All weights once, the keys and values of `n_prompts` prompts once each, of the new tokens once a row.
    """
    weights = sum(weight.nbytes for weight in read_weights(model))
    cached = n_prompts * prompt_length + n_rows * n_new / 2
    return weights + cached * bytes_per_token_in_cache(model, kv_cache)


def step_operations(model: PreTrainedModel, n_rows: int, context: float) -> float:
    """Operations of a decode step of `n_rows` rows behind `context` tokens each."""
    n_layers, n_heads, _, head_dim = attention_shape(model)
    size = _matrix_size(model)
    # scores and weighted values, two operations each
    return n_rows * (2 * size + 4 * n_layers * n_heads * head_dim * context)


def prefill_operations(model: PreTrainedModel, n_prompts: int, prompt_length: int) -> float:
    """Operations of reading `n_prompts` prompts, with the lm_head on the last position only."""
    n_layers, n_heads, _, head_dim = attention_shape(model)
    head: Any = model.get_output_embeddings()
    head_size = head.out_features * head.in_features if head is not None else 0
    body_size = _matrix_size(model) - head_size
    # scores and weighted values, two operations each, over the causal half of the square
    attention = 4 * n_layers * n_heads * head_dim * prompt_length**2 / 2
    return n_prompts * (2 * body_size * prompt_length + attention + 2 * head_size)
