"""Selective scans (Mamba, https://arxiv.org/abs/2312.00752); names and shapes of the package mamba-ssm."""

import functools

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels.mamba import scan as kernels

from .checks import ELEMENTS, address_of, check_floats, check_shape, prepare_threads
from .gradients import without_gradients
from .output import apart, check_output, contiguous_output
from .scalars import flag


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    check_floats(name, tensor)
    check_shape(name, tensor, shape)
    address_of(name, tensor)
    return tensor.detach() if tensor.requires_grad else tensor


def _optional(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """float32, or None."""
    return None if tensor is None else _checked(name, tensor, shape).to(torch.float32)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that holds all their values."""
    return functools.reduce(torch.promote_types, (each.dtype for each in tensors if each is not None))


# ---- prompts -----------------------------------------------------------------------------------------------------------


def _inputs(
    name: str, tensor: Tensor, shape: torch.Size, dstate: int
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """B or C for u of this shape: float32, `dstate` in a row, and its steps as `kernels.selective_scan` wants them."""
    n_rows, n_channels, size = shape
    check_floats(name, tensor)
    given = tuple(tensor.shape)
    address_of(name, tensor)
    if given == (n_channels, dstate):
        return tensor.detach().to(torch.float32).contiguous(), (0, dstate, 0, 1)
    n_groups = given[1] if len(given) == 4 else 1
    if given not in ((n_rows, dstate, size), (n_rows, n_groups, dstate, size)):
        wanted = (
            f"[{n_channels}, {dstate}], [{n_rows}, {dstate}, {size}] or [{n_rows}, groups, {dstate}, {size}]"
        )
        raise InvalidInput(f"{name} has shape {given}: {wanted} is needed")
    if n_groups == 0 or n_channels % n_groups:
        raise InvalidInput(f"{name} has {n_groups} groups: a divisor of the {n_channels} channels is needed")
    turned = tensor.detach().to(torch.float32).transpose(-1, -2).contiguous()
    step = size * dstate
    return turned, (n_groups * step, step, dstate, max(n_channels // n_groups, 1))


@without_gradients
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan h <- exp(dt A) h + dt B u, out = (C h + D u) silu(z), h beginning at 0, over the times of each channel.

    dt is delta + delta_bias, or with delta_softplus its softplus. u, delta and z [batch, dim, length]; A [dim, dstate]; B
    and C [batch, dstate, length], [batch, groups, dstate, length], or [dim, dstate] where they do not change; D and
    delta_bias [dim]. Real numbers only, each float32, bfloat16 or float16; everything is computed in float32. Returns out,
    like u and contiguous; with return_last_state (out, h float32 [batch, dim, dstate]). Raises `InvalidInput`.
    https://arxiv.org/abs/2312.00752

    >>> import torch
    >>> from hfopt.functional import selective_scan
    >>> u, a, ones = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.zeros(1, 1), torch.ones(1, 1)
    >>> selective_scan(u, torch.ones(1, 1, 3), a, ones, ones)
    tensor([[[1., 3., 6.]]])
    """
    softplus, returns_state = (
        flag("delta_softplus", delta_softplus),
        flag("return_last_state", return_last_state),
    )
    check_floats("u", u)
    if u.ndim != 3:
        raise InvalidInput(f"u has shape {tuple(u.shape)}: [batch, dim, length] is needed")
    address_of("u", u)
    n_rows, n_channels, _ = u.shape
    delta = _checked("delta", delta, tuple(u.shape))
    z = None if z is None else _checked("z", z, tuple(u.shape))
    check_floats("A", A)
    if A.ndim != 2 or A.shape[0] != n_channels or A.shape[1] == 0:
        raise InvalidInput(
            f"A has shape {tuple(A.shape)}: [{n_channels}, dstate] is needed, dstate at least 1"
        )
    dstate = A.shape[1]
    rates = _checked("A", A, (n_channels, dstate)).to(torch.float32).contiguous()
    (b, b_steps), (c, c_steps) = _inputs("B", B, u.shape, dstate), _inputs("C", C, u.shape, dstate)
    skip, bias = _optional("D", D, (n_channels,)), _optional("delta_bias", delta_bias, (n_channels,))
    skip, bias = (None if each is None else each.contiguous() for each in (skip, bias))
    dtype = _common_dtype(u, delta, z)
    source, steps = u.detach().to(dtype).contiguous(), delta.to(dtype).contiguous()
    gate = None if z is None else z.to(dtype).contiguous()
    out, state = torch.empty_like(source), rates.new_zeros(n_rows, n_channels, dstate)
    if out.numel():
        prepare_threads()
        kernels.selective_scan(
            ELEMENTS[dtype],
            source.data_ptr(),
            steps.data_ptr(),
            *u.shape,
            rates.data_ptr(),
            dstate,
            b.data_ptr(),
            b_steps,
            c.data_ptr(),
            c_steps,
            _address(skip),
            _address(gate),
            _address(bias),
            softplus,
            state.data_ptr(),
            out.data_ptr(),
        )
    out = out.to(u.dtype)
    return (out, state) if returns_state else out


# ---- one token ---------------------------------------------------------------------------------------------------------

_FIXED = (kernels.A, kernels.D, kernels.BIAS)  # the same for all rows


def _table(tensors: dict[int, Tensor], n_dims: int) -> np.ndarray:
    """What `kernels.state_update` is told of its arrays, whose channels have n_dims dimensions: 1, or 2 with heads."""
    rows = [(0, 0, 0, 0)] * kernels.N_ARRAYS
    for name, tensor in tensors.items():
        steps = tensor.stride()
        if name in (kernels.B, kernels.C):
            rows[name] = tensor.data_ptr(), steps[0], steps[1], 0
        else:
            row, of_channels = (0, steps) if name in _FIXED else (steps[0], steps[1:])
            head = of_channels[0] if n_dims == 2 else 0
            rows[name] = tensor.data_ptr(), row, head, of_channels[n_dims - 1]
    return np.array(rows, np.int64)


def _contiguous(tensor: Tensor) -> Tensor:
    """Copied if its last dimension is not contiguous."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _checked_groups(B: Tensor, C: Tensor, n_rows: int, n_heads: int, dstate: int) -> tuple[Tensor, Tensor]:
    """B and C as [rows, groups, dstate]."""
    check_floats("B", B)
    n_groups = B.shape[1] if B.ndim == 3 else 1
    if n_groups == 0 or n_heads % n_groups:
        raise InvalidInput(f"B has {n_groups} groups: a divisor of the {n_heads} heads is needed")
    shape = (n_rows, n_groups, dstate) if B.ndim == 3 else (n_rows, dstate)
    B, C = _checked("B", B, shape), _checked("C", C, shape)
    return (B, C) if B.ndim == 3 else (B[:, None], C[:, None])


@without_gradients
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Do one step of `selective_scan`: state <- exp(dt A) state + dt B x in place; return (C state + D x) silu(z).

    dt is dt + dt_bias, or with dt_softplus its softplus. state [batch, dim, dstate], of any strides; x, dt and z [batch,
    dim]; A [dim, dstate]; B and C [batch, dstate]; D and dt_bias [dim]. Or, of heads (Mamba-2): state [batch, heads, dim,
    dstate]; x, dt and z [batch, heads, dim]; A [heads, dim, dstate]; B and C [batch, groups, dstate] too; D and dt_bias
    [heads, dim]. What is the same for all of a head may be expanded: its exponential is then taken once.

    Each float32, bfloat16 or float16; everything is computed in float32, and rounded once. Returns out, like x. Raises
    `InvalidInput`, with nothing written. https://arxiv.org/abs/2312.00752, https://arxiv.org/abs/2405.21060

    >>> import torch
    >>> from hfopt.functional import selective_state_update
    >>> state, one = torch.tensor([[[2.0]]]), torch.ones(1, 1)
    >>> selective_state_update(state, 3 * one, one, 0 * one, one, 10 * one)
    tensor([[50.]])
    >>> state
    tensor([[[5.]]])
    """
    softplus = flag("dt_softplus", dt_softplus)
    check_output("state", state)
    if state.ndim not in (3, 4) or state.shape[-1] == 0:
        raise InvalidInput(
            f"state has shape {tuple(state.shape)}: [batch, dim, dstate] or [batch, heads, dim, dstate] is needed, "
            "dstate at least 1"
        )
    n_rows, *heads, dstate = state.shape
    of_rows, of_heads = (n_rows, *heads), tuple(heads)
    n_heads = heads[0] if len(heads) == 2 else 1
    x, dt = _checked("x", x, of_rows), _checked("dt", dt, of_rows)
    z = None if z is None else _checked("z", z, of_rows)
    rates = _checked("A", A, (*of_heads, dstate)).to(torch.float32)
    skip, bias = _optional("D", D, of_heads), _optional("dt_bias", dt_bias, of_heads)
    b, c = _checked_groups(B, C, n_rows, n_heads, dstate)
    dtype = _common_dtype(x, dt, z, b, c)
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out.to(x.dtype)
    one_rate = dstate > 1 and rates.stride(-1) == 0
    given = {
        kernels.X: x.to(dtype),
        kernels.DT: dt.to(dtype),
        kernels.A: rates if one_rate else _contiguous(rates),
        kernels.B: _contiguous(b.to(dtype)),
        kernels.C: _contiguous(c.to(dtype)),
    }
    options = {kernels.Z: None if z is None else z.to(dtype), kernels.D: skip, kernels.BIAS: bias}
    given |= {name: each for name, each in options.items() if each is not None}
    inputs = dict(zip(given, apart(state, *given.values()), strict=True))
    prepare_threads()
    with contiguous_output(state, 1) as kept:
        table = _table(inputs | {kernels.STATE: kept, kernels.OUT: out}, len(heads))
        kernels.state_update(
            ELEMENTS[dtype],
            ELEMENTS[kept.dtype],
            table,
            n_rows,
            n_heads,
            n_heads // b.shape[1],
            heads[-1],
            dstate,
            one_rate,
            softplus,
        )
    return out.to(x.dtype)
