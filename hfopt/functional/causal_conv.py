"""Causal convolutions of each channel by itself, as Mamba has them; names and shapes as in the package causal-conv1d."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels.linear import activation as codes
from hfopt.kernels.mamba import conv as kernels

from .checks import ELEMENTS, address_of, check_floats, check_shape, prepare_threads
from .gradients import without_gradients
from .integers import integers
from .output import apart, check_output
from .scalars import flag

ConvActivation = Literal["silu", "swish"]
_CODES: dict[str | None, int] = {None: codes.NONE, "silu": codes.SILU, "swish": codes.SILU}


def _code(activation: str | None) -> int:
    if activation not in _CODES:
        raise InvalidInput(
            f"activation is {activation!r}: None, 'silu' or 'swish', which is the same, is allowed"
        )
    return _CODES[activation]


def _checked_filter(weight: Tensor, bias: Tensor | None, n_channels: int) -> tuple[Tensor, Tensor | None]:
    """Weight [channels, width] and bias, contiguous."""
    check_floats("weight", weight)
    if weight.ndim != 2 or weight.shape[0] != n_channels or weight.shape[1] == 0:
        raise InvalidInput(
            f"weight has shape {tuple(weight.shape)}: [{n_channels}, width] is needed, of a width of at least 1"
        )
    address_of("weight", weight)
    if bias is None:
        return weight.contiguous(), None
    check_floats("bias", bias, weight.dtype)
    check_shape("bias", bias, (n_channels,))
    address_of("bias", bias)
    return weight.contiguous(), bias.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@without_gradients
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: ConvActivation | None = "silu",
) -> tuple[Tensor, Tensor | None]:
    """Convolve out[b, d, t] = activation(bias[d] + sum over w of weight[d, w] x[b, d, t + w - (width - 1)]).

    x [batch, dim, length]; weight [dim, width]; bias [dim], of the dtype of weight; initial_states [batch, dim, width - 1],
    what comes before x, zeros by default; activation None, "silu" or "swish", which is the same. Returns (out, final
    states): out like x, contiguous; the states [batch, dim, width - 1], the last inputs, in the dtype of x, or None unless
    return_final_states. They go to final_states_out if that is given, which may have strides.

    float32, bfloat16 and float16; sums are float32, rounded once. Raises `InvalidInput`.
    https://arxiv.org/abs/2312.00752, section 3.4

    >>> import torch
    >>> from hfopt.functional import causal_conv1d
    >>> x, weight = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[10.0, 1.0]])
    >>> causal_conv1d(x, weight, return_final_states=True, activation=None)
    (tensor([[[ 1., 12., 23.]]]), tensor([[[3.]]]))
    """
    code = _code(activation)
    check_floats("x", x)
    if x.ndim != 3:
        raise InvalidInput(f"x has shape {tuple(x.shape)}: [batch, dim, length] is needed")
    address_of("x", x)
    n_rows, n_channels, size = x.shape
    weight, bias = _checked_filter(weight, bias, n_channels)
    before = weight.shape[1] - 1
    states = (n_rows, n_channels, before)
    history = None
    if initial_states is not None:
        check_floats("initial_states", initial_states)
        check_shape("initial_states", initial_states, states)
        address_of("initial_states", initial_states)
        history = initial_states.to(torch.float32).contiguous()
    if flag("return_final_states", return_final_states) and final_states_out is not None:
        check_output("final_states_out", final_states_out, x.dtype)
        check_shape("final_states_out", final_states_out, states)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    source = x.detach().contiguous()
    if out.numel():
        prepare_threads()
        kernels.causal_conv(
            ELEMENTS[x.dtype],
            ELEMENTS[weight.dtype],
            source.data_ptr(),
            _address(history if before else None),
            *x.shape,
            weight.data_ptr(),
            _address(bias),
            before + 1,
            code,
            out.data_ptr(),
        )
    if not return_final_states:
        return out, None
    final = source[..., max(size - before, 0) :]
    if size < before:
        earlier = source.new_zeros(states) if history is None else history.detach().to(x.dtype)
        final = torch.cat((earlier[..., size:], final), -1)
    if final_states_out is None:
        return out, final.clone(memory_format=torch.contiguous_format)
    (final,) = apart(final_states_out, final)
    final_states_out.detach().copy_(final)
    return out, final_states_out


@without_gradients
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: ConvActivation | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """Convolve new inputs after those in conv_state, which takes them up in place; formula as in `causal_conv1d`.

    x [batch, dim] or [batch, dim, length]; conv_state [batch, dim, states], at least width - 1, of any strides; weight [dim,
    width]; bias [dim], of the dtype of weight; activation None, "silu" or "swish". Without cache_seqlens the state holds the
    last inputs, the newest at its end; with them, integers [batch], how many there were before, it is a circular buffer,
    where input number n is at n % states. Returns out like x.

    float32, bfloat16 and float16; sums are float32, rounded once. Raises `InvalidInput`, with nothing written.

    >>> import torch
    >>> from hfopt.functional import causal_conv1d_update
    >>> state, weight = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[100.0, 10.0, 1.0]])
    >>> causal_conv1d_update(torch.tensor([[3.0]]), state, weight)
    tensor([[123.]])
    >>> state
    tensor([[[2., 3.]]])
    """
    code = _code(activation)
    check_floats("x", x)
    if x.ndim not in (2, 3):
        raise InvalidInput(f"x has shape {tuple(x.shape)}: [batch, dim] or [batch, dim, length] is needed")
    address_of("x", x)
    new = x.detach() if x.ndim == 3 else x.detach()[..., None]
    n_rows, n_channels, _ = new.shape
    weight, bias = _checked_filter(weight, bias, n_channels)
    width = weight.shape[1]
    check_output("conv_state", conv_state)
    if conv_state.ndim != 3 or conv_state.shape[:2] != new.shape[:2] or conv_state.shape[2] < width - 1:
        raise InvalidInput(
            f"conv_state has shape {tuple(conv_state.shape)}: [{n_rows}, {n_channels}, at least {width - 1}] is needed"
        )
    size = conv_state.shape[2]
    starts = np.empty(0, np.int64)
    if cache_seqlens is not None:
        starts = integers("cache_seqlens", cache_seqlens, (n_rows,))
        if len(starts) != n_rows or (n_rows and starts.min() < 0):
            raise InvalidInput(
                f"cache_seqlens is {starts.tolist()}: {n_rows} numbers of at least 0 are needed"
            )
        starts %= max(size, 1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        new, weight, *biases = apart(conv_state, new, weight, *([] if bias is None else [bias]))
        prepare_threads()
        kernels.causal_conv_update(
            ELEMENTS[x.dtype],
            ELEMENTS[conv_state.dtype],
            ELEMENTS[weight.dtype],
            new.data_ptr(),
            new.stride(),
            *new.shape,
            conv_state.data_ptr(),
            conv_state.stride(),
            size,
            starts,
            weight.data_ptr(),
            biases[0].data_ptr() if biases else 0,
            width,
            code,
            out.data_ptr(),
        )
    return out
