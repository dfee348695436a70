"""ALiBi: scores that fall with the distance of a key, in each head at its own rate."""

import functools
import math

import torch
from torch import Tensor

from hfopt.functional import Mask

_STEEPEST = (
    8.0  # the last of the heads, if they are a power of 2, has a slope of 2 to the power of minus this
)
_SLOPE_ERROR = 2e-6  # of slopes that are powers of a rounded number, as a share


@functools.cache
def slopes_of(n_heads: int) -> Tensor:
    """float32 [n_heads]: a geometric sequence for a power of 2, and behind it every other number of the next longer one."""
    whole = 2 ** math.floor(math.log2(n_heads))
    first = [2.0 ** (-_STEEPEST * index / whole) for index in range(1, whole + 1)]
    others = [2.0 ** (-_STEEPEST * index / (2 * whole)) for index in range(1, 2 * whole, 2)]
    return torch.tensor([*first, *others][:n_heads], dtype=torch.float32, device="cpu")


@functools.cache
def ranked_slopes_of(n_heads: int, times: int) -> Tensor:
    """float32 [n_heads], of models that count in bfloat16 and add what comes of it so many times, a power of 2."""
    return times * slopes_of(n_heads).bfloat16().float()


def ranked_bias_of(n_heads: int, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """[n_rows, n_heads, 1, n_keys]: the slopes times the rank of a key among those of its row that are seen, in bfloat16,
    whatever the dtype of the model is. seen: bool [n_rows, n_keys].
    """
    ranks = (seen.cumsum(-1) - 1) * seen
    return (slopes_of(n_heads).bfloat16()[:, None] * ranks[:, None])[:, :, None].to(dtype)


def with_bias(seen: Tensor, bias: Tensor, head_dim: int) -> Tensor:
    """The mask [n_rows, n_heads, n_new, n_keys] that hides what is not seen, bool [n_rows, n_new, n_keys], and holds this
    bias, scaled for heads of so many channels.
    """
    return (bias / math.sqrt(head_dim)).masked_fill(~seen[:, None], torch.finfo(bias.dtype).min)


def bias_of(n_heads: int, n_keys: int, dtype: torch.dtype) -> Tensor:
    """[n_heads, 1, n_keys], what a model adds to the scores of keys whose last one is the token itself."""
    return (slopes_of(n_heads)[:, None, None] * torch.arange(1 - n_keys, 1, device="cpu")).to(dtype)


def is_bias_of(bias: object, n_heads: int, mask: Mask, sizes: tuple[int, int, int]) -> bool:
    """Whether a tensor is `bias_of` for all keys that a mask lets through, apart from a constant for each row and head, and
    rounded to its dtype.

    bias: [n_heads or n_rows * n_heads, 1, keys or more, of which the last count]. sizes: rows, new tokens and keys of the
    call.
    """
    n_rows, _, n_keys = sizes
    if type(bias) is not Tensor or not bias.is_cpu or not bias.is_floating_point() or bias.dim() != 3:
        return False
    if bias.shape[0] not in (n_heads, n_rows * n_heads) or bias.shape[1] != 1 or bias.shape[2] < n_keys:
        return False
    given = bias[..., -n_keys:].reshape(-1, n_heads, n_keys).float()
    last = given[..., -1:]
    expected = slopes_of(n_heads)[:, None] * torch.arange(1 - n_keys, 1, device="cpu")
    error = torch.finfo(bias.dtype).eps / 2 + _SLOPE_ERROR
    fits = (given - last - expected).abs() <= error * (given.abs() + last.abs())
    if mask.kind == "bytes":
        fits = fits | (torch.from_numpy(mask.bytes[:, -1]) == 0)[:, None]
    return bool(fits.all())
