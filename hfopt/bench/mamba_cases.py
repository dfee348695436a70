"""The cases of `hfopt bench --kernels` for layers of Mamba, beside the torch operations of transformers' own layers."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from hfopt.functional import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from hfopt.words import DTYPES, dtype_name

from .kernel_case import Call, Case, Sizes, Target, again, random

_STATES, _WIDTH = 16, 4
_TIMES = 20  # of a call for one token


def _beside(
    ours: Callable[[], object], theirs: Callable[[], object], x: Tensor, times: int
) -> dict[str, Call]:
    """Both, and a copy of x for the bandwidth: what is read at least and written."""
    target, n_bytes = torch.empty_like(x), 2 * x.nbytes
    runs = {"copy_": lambda: target.copy_(x), "torch": theirs, "hfopt": ours}
    return {
        name: Call(run, n_bytes=n_bytes) if times == 1 else again(run, times)._replace(n_bytes=n_bytes)
        for name, run in runs.items()
    }


def _conv(n_channels: int, size: int, dtype: torch.dtype) -> dict[str, Call]:
    x, weight, bias = (
        random(dtype, 1, n_channels, size),
        random(dtype, n_channels, _WIDTH),
        random(dtype, n_channels),
    )

    def replaced() -> Tensor:
        padded = F.conv1d(x, weight[:, None], bias, padding=_WIDTH - 1, groups=n_channels)
        return F.silu(padded[..., :size])

    return _beside(lambda: causal_conv1d(x, weight, bias)[0], replaced, x, 1)


def _conv_update(n_channels: int, size: int, dtype: torch.dtype) -> dict[str, Call]:
    x, weight, bias = (
        random(dtype, 1, n_channels),
        random(dtype, n_channels, _WIDTH),
        random(dtype, n_channels),
    )
    ours, theirs = random(dtype, 1, n_channels, _WIDTH), random(dtype, 1, n_channels, _WIDTH)

    def replaced() -> Tensor:
        theirs.copy_(theirs.roll(-1, -1))
        theirs[..., -1] = x
        return F.silu((theirs * weight).sum(-1) + bias)

    return _beside(lambda: causal_conv1d_update(x, ours, weight, bias, "silu"), replaced, ours, _TIMES)


def _scan(n_channels: int, size: int, dtype: torch.dtype) -> dict[str, Call]:
    u, delta, z = (random(dtype, 1, n_channels, size) for _ in range(3))
    b, c = (random(dtype, 1, _STATES, size) for _ in range(2))
    a, d, bias = -torch.rand(n_channels, _STATES), torch.randn(n_channels), torch.randn(n_channels)

    def replaced() -> Tensor:
        steps = F.softplus(delta.float() + bias[:, None])[..., None]
        decays = torch.exp(steps * a[:, None])
        added = steps * b.float().transpose(1, 2)[:, None] * u.float()[..., None]
        seen = c.float()
        state, outs = torch.zeros(1, n_channels, _STATES), []
        for t in range(size):
            state = decays[:, :, t] * state + added[:, :, t]
            outs.append((state @ seen[:, :, t, None])[..., 0])
        y = torch.stack(outs, -1) + u * d[:, None]
        return (y * F.silu(z.float())).to(dtype)

    def ours() -> object:
        return selective_scan(u, delta, a, b, c, d, z, bias, delta_softplus=True)

    return _beside(ours, replaced, u, 1)


def _step(n_channels: int, size: int, dtype: torch.dtype) -> dict[str, Call]:
    x, dt, z = (random(dtype, 1, n_channels) for _ in range(3))
    b, c = (random(dtype, 1, _STATES) for _ in range(2))
    a, d, bias = -torch.rand(n_channels, _STATES), torch.randn(n_channels), torch.randn(n_channels)
    ours, theirs = torch.zeros(1, n_channels, _STATES), torch.zeros(1, n_channels, _STATES)

    def replaced() -> Tensor:
        step = F.softplus(dt.float() + bias)[..., None]
        theirs.copy_(theirs * torch.exp(step * a) + step * b.float()[:, None] * x.float()[..., None])
        y = (theirs @ c.float()[..., None])[..., 0] + x * d
        return (y * F.silu(z.float())).to(dtype)

    return _beside(
        lambda: selective_state_update(ours, x, dt, a, b, c, d, z, bias, dt_softplus=True),
        replaced,
        ours,
        _TIMES,
    )


def mamba_cases(sizes: Sizes) -> Iterator[Case]:
    """A convolution and a scan, of a prompt and of one token."""
    n_channels = sizes.features[0]
    for dtype in DTYPES:
        for name, make, size in (
            ("causal convolution", _conv, sizes.many_rows[-1]),
            ("causal convolution, 1 token", _conv_update, 1),
            ("selective scan", _scan, sizes.quantized_rows),
            ("selective scan, 1 token", _step, 1),
        ):
            yield Case(
                f"{dtype_name(dtype)} {n_channels}×{size}",
                partial(make, n_channels, size, dtype),
                (Target(name, "hfopt", "faster", 1.0, "torch", ("copy_",)),),
            )
