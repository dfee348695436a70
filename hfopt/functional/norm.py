"""RMSNorm and LayerNorm, over the last dimension or over heads."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import norm as kernels

from .checks import (
    ELEMENTS,
    address_of,
    check_array,
    check_contiguous,
    check_floats,
    prepare_threads,
)
from .gradients import without_gradients
from .scalars import finite, integer
from .strided import dense


class Norm(NamedTuple):
    """A norm: `(weight + offset) * x / sqrt(mean(x^2) + eps) + bias`, with x - mean(x) in place of x for "layer".

    weight, bias: [size], or None; for heads that have their own, [n_heads, size]. "rms" has no bias. unit_offset: the offset
    is 1 (the weight is kept as its difference from 1), else 0.
    """

    kind: Literal["rms", "layer"]
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    unit_offset: bool = False

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The weight and the bias, where there are such; raises `InvalidInput` for one that its kind has not."""
        if self.kind == "rms" and self.bias is not None:
            raise InvalidInput("bias is a Tensor: an rms norm has none")
        return {
            name: each for name, each in (("weight", self.weight), ("bias", self.bias)) if each is not None
        }

    def addresses(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
        """Those of weight and bias, 0 for one that is not there; raises `InvalidInput` unless they have this shape."""
        known = {name: check_array(name, each, shape, dtype) for name, each in self.vectors.items()}
        return {"weight": 0, "bias": 0} | known

    def of_heads(self, n_channels: int, first: int, count: int, size: int) -> tuple[int, ...]:
        """Shape of weight and bias for `count` heads of `size` channels from channel `first` on of n_channels.

        Raises `InvalidInput` if there are none such.
        """
        shape: tuple[int, ...] = next((tuple(each.shape) for each in self.vectors.values()), (size,))
        if shape not in ((size,), (count, size)):
            raise InvalidInput(f"weight has shape {shape}: [{size}] or [{count}, {size}] is needed")
        if first < 0 or count < 0 or size < 1 or first + count * size > n_channels:
            raise InvalidInput(f"{count} heads of {size} begin at channel {first}: there are {n_channels}")
        return shape


def norm(hidden_states: Tensor, norm: Norm) -> Tensor:
    """The norm over the last dimension.

    hidden_states [..., size], of the dtype of weight and bias; or
    [..., n_heads, size] where heads have their own. Raises `InvalidInput`.
    """
    given = norm.vectors
    first = next(iter(given.values()), None)
    if isinstance(first, Tensor) and first.ndim == 2:
        x, _ = dense("hidden_states", hidden_states)
        if x.shape[-2:] == first.shape:
            heads = x.clone(memory_format=torch.contiguous_format)
            norm_heads(heads.flatten(-2), norm, 0, *first.shape)
            return heads
    return _norm_rows(hidden_states, norm.kind == "layer", norm.weight, norm.bias, norm.eps, norm.unit_offset)


def _norm_rows(
    hidden_states: Tensor,
    is_layer: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    unit_offset: bool = False,
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """shape: the last dimensions, which the norm is over; None: the last one."""
    x, x_at = dense("hidden_states", hidden_states)
    given, dtype = x.shape, x.dtype
    if shape is None:
        shape = (given[-1],)
    elif not shape or given[-len(shape) :] != shape:
        raise InvalidInput(f"normalized_shape is {shape}: it must be the last of the sizes {tuple(given)}")
    weight_at = bias_at = 0
    if weight is not None:
        weight, weight_at = dense("weight", weight, dtype, shape)
    if bias is not None:
        bias, bias_at = dense("bias", bias, dtype, shape)
    out = torch.empty_like(x)
    n = out.numel()
    if n:
        size = math.prod(shape)
        prepare_threads()
        kernels.norm(
            ELEMENTS[dtype],
            is_layer,
            x_at,
            n // size,
            size,
            weight_at,
            bias_at,
            int(unit_offset),
            float(eps),
            out.data_ptr(),
        )
    return out


def norm_heads(qkv: Tensor, norm: Norm, first: int, count: int, size: int) -> None:
    """The norm, in place, of `count` heads of `size` channels from channel `first` of qkv on, as some models do to queries
    and keys.

    qkv [..., width], contiguous, of the dtype of weight and bias. Raises `InvalidInput`.
    """
    check_floats("qkv", qkv)
    check_contiguous("qkv", qkv)
    if qkv.ndim == 0:
        raise InvalidInput("qkv has shape (): [..., width] is needed")
    width = qkv.shape[-1]
    shape = norm.of_heads(width, first, count, size)
    vectors = norm.addresses(shape, qkv.dtype)
    n = qkv.numel()
    if n and count * size:
        prepare_threads()
        kernels.norm_heads(
            ELEMENTS[qkv.dtype],
            norm.kind == "layer",
            address_of("qkv", qkv),
            n // width,
            width,
            first,
            count,
            size,
            size if len(shape) == 2 else 0,
            vectors["weight"],
            vectors["bias"],
            int(norm.unit_offset),
            float(norm.eps),
        )


@without_gradients
def rms_norm(hidden_states: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Compute `weight * x / sqrt(mean(x^2) + eps)` over the last dimension (https://arxiv.org/abs/1910.07467).

    hidden_states [..., size]: float32, bfloat16 or float16, of any strides; weight [size] of that dtype or float32, or None;
    eps from 0 on. In float32, rounded once; no gradient. Raises `InvalidInput` for anything else.

    >>> import torch
    >>> from hfopt.functional import rms_norm
    >>> rms_norm(torch.full((2, 64), 3.0), torch.ones(64), 0.0).unique()
    tensor([1.])
    """
    eps = finite("eps", eps, 0)
    if _is_wider(weight, hidden_states):
        return _norm_rows(hidden_states.float(), False, weight, None, eps).to(hidden_states.dtype)
    return _norm_rows(hidden_states, False, weight, None, eps)


def _is_wider(weight: object, x: object) -> bool:
    """Whether a weight is float32 beside an x of 16 bits, as some models keep their norms."""
    if not isinstance(weight, Tensor) or not isinstance(x, Tensor):
        return False
    return weight.dtype is torch.float32 and x.dtype in (torch.bfloat16, torch.float16)


def layer_norm(hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """weight * (x - mean(x)) / sqrt(var(x) + eps) + bias over the last dimension
    (https://arxiv.org/abs/1607.06450); see `norm`."""
    return norm(hidden_states, Norm("layer", weight, bias, finite("eps", eps, 0)))


@without_gradients
def fast_layer_norm(
    hidden_states: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Compute `weight * (x - mean(x)) / sqrt(var(x) + eps) + bias` over the last dimensions.

    A layer norm (https://arxiv.org/abs/1607.06450) in float32, rounded once; no gradient.

    Args:
        hidden_states: [..., *normalized_shape], float32, bfloat16 or float16, of any strides.
        normalized_shape: the last dimensions, or the size of the last one.
        weight: [*normalized_shape], of the same dtype or float32; or None.
        bias: the same.
        eps: what is added to the variance, from 0 on.

    Raises:
        InvalidInput: for any other dtype, shape, layout or device.

    >>> import torch
    >>> from hfopt.functional import fast_layer_norm
    >>> fast_layer_norm(torch.randn(2, 8, 4), (8, 4), None, None, 1e-5).shape
    torch.Size([2, 8, 4])
    """
    if _is_wider(weight, hidden_states):
        wide = bias.float() if isinstance(bias, Tensor) else bias
        out = fast_layer_norm(hidden_states.float(), normalized_shape, weight, wide, eps)
        return out.to(hidden_states.dtype)
    shape = sizes_of(normalized_shape)
    return _norm_rows(hidden_states, True, weight, bias, finite("eps", eps, 0), shape=shape)


def sizes_of(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """The last dimensions that a layer norm is over; raises `InvalidInput` for what is no sizes."""
    # a tuple is told sooner than a sequence
    given = normalized_shape if isinstance(normalized_shape, (tuple, Sequence)) else (normalized_shape,)
    return tuple([integer("normalized_shape", each) for each in given])
