"""The cases of `hfopt bench --kernels` for low-rank adapters, beside vLLM's torch operations of the same names."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from hfopt.functional import bgmv_expand, bgmv_shrink, sgmv_expand, sgmv_shrink
from hfopt.words import DTYPES, dtype_name

from .kernel_case import Call, Case, Sizes, Target, random

_RANK, _ADAPTERS = 16, 4


def _adapters(size: int, n_rows: int, dtype: torch.dtype) -> dict[str, Call]:
    """y += B A x, whose rows have four adapters, all rows of one after the other: by segments where there are many."""
    x, a, b = (
        random(dtype, n_rows, size),
        random(dtype, _ADAPTERS, _RANK, size),
        random(dtype, _ADAPTERS, size, _RANK),
    )
    ours, theirs = torch.zeros(n_rows, size, dtype=dtype), torch.zeros(n_rows, size, dtype=dtype)
    part = -(-n_rows // _ADAPTERS)
    starts = torch.arange(0, n_rows, part)
    lengths = (n_rows - starts).clamp(max=part)
    indices = torch.arange(len(starts))
    mapping = indices.repeat_interleave(lengths)
    segments = starts, lengths, indices, len(starts), part

    def hfopt() -> Tensor:
        v = torch.empty(n_rows, _RANK)
        if n_rows > _ADAPTERS * _ADAPTERS:
            sgmv_shrink(x, a, v, *segments, 1.0)
            sgmv_expand(v, b, ours, *segments, add_inputs=True)
        else:
            bgmv_shrink(x, a, v, mapping)
            bgmv_expand(v, b, ours, mapping)
        return ours

    def replaced() -> Tensor:
        v = torch.einsum("bi,boi->bo", x.float(), a[mapping].float())
        theirs.add_(torch.einsum("bi,boi->bo", v.to(dtype), b[mapping]))
        return theirs

    target = torch.empty_like(x)
    runs = {"copy_": lambda: target.copy_(x), "torch": replaced, "hfopt": hfopt}
    return {name: Call(run, n_bytes=2 * x.nbytes) for name, run in runs.items()}


def lora_cases(sizes: Sizes) -> Iterator[Case]:
    """A few rows and many, with four adapters among them."""
    for dtype in DTYPES:
        for n_rows in (8, sizes.quantized_rows):
            yield Case(
                f"{dtype_name(dtype)} {n_rows}×{sizes.features[0]}, rank {_RANK}",
                partial(_adapters, sizes.features[0], n_rows, dtype),
                (Target(f"LoRA, {n_rows} rows", "hfopt", "faster", 1.0, "torch", ("copy_",)),),
            )
