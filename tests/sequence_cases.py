"""Attention of packed sequences in float64, and caches in blocks."""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from hfopt.modules import PagedAttention

SIZES = (24, 64, 70, 96, 128, 256)
HEADS = ((2, 2), (4, 1), (16, 2), (71, 1))  # of queries, of keys


def ends_of(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """Cumulative lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_lengths: Sequence[int],
    k_lengths: Sequence[int],
    scale: float,
    *,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = -1.0,
    slopes: Tensor | None = None,
) -> Tensor:
    """`varlen_attention` in float64, head by head."""
    out = torch.zeros_like(query, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    parts = zip(
        query.split(list(q_lengths)), key.split(list(k_lengths)), value.split(list(k_lengths)), strict=True
    )
    for number, ((q, k, v), target) in enumerate(zip(parts, out.split(list(q_lengths)), strict=True)):
        places, columns = torch.arange(len(k) - len(q), len(k))[:, None], torch.arange(len(k))
        left, right = window[0], 0 if is_causal else window[1]
        seen = torch.ones(len(q), len(k), dtype=torch.bool)
        if left >= 0:
            seen &= columns >= places - left
        if right >= 0:
            seen &= columns <= places + right
        for head in range(query.shape[1]):
            scores = q[:, head].double() @ k[:, head // group].double().T * scale
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            if slopes is not None:
                slope = slopes[head] if slopes.ndim == 1 else slopes[number, head]
                scores = scores - slope.double() * (places - columns).abs()
            weights = torch.softmax(scores.masked_fill(~seen, -math.inf), -1).nan_to_num(0)
            target[:, head] = weights @ v[:, head // group].double()
    return out


def assert_exact(out: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """The tolerances of torch.testing, 1e-5 in float32, of the largest value. scale: times as much."""
    relative = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 1e-3}[out.dtype] * scale
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(out.double(), expected, rtol=relative, atol=relative * largest)


class Paged:
    """A cache whose blocks are in any order, filled by `reshape_and_cache`; what is not a token's is NaN, or no block."""

    def __init__(
        self,
        dtype: torch.dtype,
        lengths: Sequence[int],
        heads: int,
        size: int,
        block_size: int,
        *,
        held: torch.dtype | None = None,
        scales: tuple[float, float] = (1.0, 1.0),
        index: torch.dtype = torch.int32,
    ) -> None:
        counts = [-(-length // block_size) for length in lengths]
        n_blocks = sum(counts) + 2
        shape = n_blocks, heads, block_size, size
        self.key_cache, self.value_cache = (torch.full(shape, math.nan).to(held or dtype) for _ in range(2))
        order = torch.randperm(n_blocks)[: sum(counts)].split(counts)
        self.tables = torch.full((len(lengths), max(counts, default=0) + 1), 2**31 - 1, dtype=index)
        slots = []
        for row, (blocks, length) in enumerate(zip(order, lengths, strict=True)):
            self.tables[row, : len(blocks)] = blocks
            places = torch.arange(length)
            slots.append(blocks[places // block_size] * block_size + places % block_size)
        self.slots, self.scales = torch.cat(slots), scales
        key, value = (torch.randn(sum(lengths), heads, size).to(dtype) for _ in range(2))
        PagedAttention.reshape_and_cache(
            key, value, self.key_cache, self.value_cache, self.slots.to(index), "auto", *scales
        )
        # what was written, as it is read
        self.key, self.value = (
            part if held is None else (part.float() / scale).to(held).double() * scale
            for part, scale in zip((key, value), scales, strict=True)
        )
