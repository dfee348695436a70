"""Plain float64 twins of the kernels, the rule for their errors, and guard bytes."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hfopt.cache import Appended
from hfopt.functional import Scoring

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}  # in which kernels get them
_GUARD = 64  # bytes on both sides of a guarded array
_PATTERN = 0xA5


# ---- twins -------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    x = x.double()
    x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight.double()
    return y if bias is None else y + bias.double()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, kind: str) -> Tensor:
    """x [B, T, heads, size] in its own dtype, as transformers computes it; cos, sin [1 or B, T, angles]."""
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    if kind == "interleaved":
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if kind == "half":
        low, high = turned.chunk(2, -1)
        partner = torch.cat((-high, low), -1)
    else:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    return torch.cat((turned * cos + partner * sin, rest), -1)


def distances(n_new: int, n_keys: int) -> Tensor:
    """From each new token to each key, [T, L]."""
    return torch.arange(n_keys) - torch.arange(n_keys - n_new, n_keys)[:, None]


def attention_scores(q: Tensor, k: Tensor, seen: Tensor, scoring: Scoring) -> Tensor:
    """[B, Hq, T, L], see `attention`."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * scoring.scale
    away = distances(*seen.shape[1:])
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if scoring.ranked:
        assert scoring.slopes is not None
        last, places = seen[:, -1], torch.arange(seen.shape[-1])
        first = torch.where(last.any(-1), last.to(torch.uint8).argmax(-1), len(places))
        ranks = (places - first[:, None])[:, None, None].bfloat16().float()
        bias = (scoring.slopes[:, None, None] * ranks).bfloat16().double() * scoring.scale
        scores = scores + bias.to(q.dtype)
    elif scoring.slopes is not None:
        scores = scores + (scoring.slopes[:, None, None].to(q.dtype) * away).to(q.dtype)
    if scoring.window is not None:
        seen = seen & (away > -scoring.window)
    return scores.masked_fill(~seen[:, None], -torch.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scoring: Scoring) -> Tensor:
    """q [B, Hq, T, D]; k, v [B, Hkv, L, D]; seen bool [B, T, L]; in their own dtype; 0 where none is seen."""
    scores = attention_scores(q, k, seen, scoring)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    sinks = torch.full((1,), -torch.inf) if scoring.sinks is None else scoring.sinks
    scores = torch.cat((scores, sinks.to(q.dtype)[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    weights = torch.softmax(scores, -1)[..., :-1].masked_fill(~seen.any(-1)[:, None, :, None], 0)
    return weights @ v


def gathered(appended: Appended, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, heads, tokens, size] that the rows of a cache read; of codes in any dtype."""
    prefix = _tensor(appended.prefix, appended.prefix_scales, dtype)
    suffix = _tensor(appended.suffix, appended.suffix_scales, dtype)
    rows = []
    for row, p in enumerate(appended.prefix_row):
        columns = torch.arange(appended.suffix_len)
        own = suffix[:, torch.from_numpy(appended.table[row])[columns].long(), :, columns]
        rows.append(torch.cat([prefix[:, p, :, : appended.prefix_len], own.permute(1, 2, 0, 3)], 2))
    keys, values = torch.stack(rows, 1)
    return keys, values


def _tensor(array: np.ndarray, scales: np.ndarray | None, dtype: torch.dtype) -> Tensor:
    if scales is None:
        return torch.from_numpy(array.copy()).view(dtype)
    return torch.from_numpy(array.astype(np.float64) * scales[..., None]).to(dtype)


# ---- errors ------------------------------------------------------------------------------------------------


def assert_as_exact_as_torch(ours: Tensor, theirs: Tensor, exact: Tensor, n_ulps: float = 1) -> None:
    """Our largest error is at most twice torch's at the same dtype, or so many ulps of the largest value."""
    assert ours.dtype == theirs.dtype
    our_error = (ours.double() - exact).abs().max().item()
    their_error = (theirs.double() - exact).abs().max().item()
    unit = n_ulps * exact.abs().max().item() * torch.finfo(ours.dtype).eps
    assert our_error <= max(2 * their_error, unit), (our_error, their_error, unit)


def assert_same_on_threads(work: Callable[[], Tensor]) -> None:
    """The result has the same bits on one thread and on two."""
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(work().clone())
    assert torch.equal(results[0].view(torch.uint8), results[1].view(torch.uint8))


# ---- arrays for kernels ------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as kernels get it."""
    return tensor.view(_BITS.get(tensor.dtype, tensor.dtype)).numpy()


def like(dtype: torch.dtype) -> np.ndarray:
    """What tells a kernel the type of the elements at an address."""
    return bits(torch.empty(0, dtype=dtype))


class Guarded:
    """A C-contiguous array, filled with a pattern, between guard bytes."""

    def __init__(self, dtype: torch.dtype, *shape: int) -> None:
        size = int(np.prod(shape)) * dtype.itemsize
        self._memory = np.full(size + 2 * _GUARD, _PATTERN, np.uint8)
        kind = bits(torch.empty(0, dtype=dtype)).dtype
        self.array = self._memory[_GUARD : _GUARD + size].view(kind).reshape(shape)
        self.tensor = torch.from_numpy(self.array).view(dtype)

    def check(self) -> None:
        assert (self._memory[:_GUARD] == _PATTERN).all(), "written before the array"
        assert (self._memory[-_GUARD:] == _PATTERN).all(), "written behind the array"
