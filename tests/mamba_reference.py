"""The operations of a Mamba layer in float64, as their definitions say them."""

import torch
from torch import Tensor
from torch.nn import functional as torch_functional


def convolved(
    history: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """Outputs for x [B, D, L] after history [B, D, width - 1]."""
    inputs = torch.cat((history, x), -1).double()
    out = sum(inputs[..., w : w + x.shape[-1]] * weight.double()[:, w, None] for w in range(weight.shape[1]))
    assert isinstance(out, Tensor)
    out = out if bias is None else out + bias.double()[:, None]
    return out if activation is None else torch_functional.silu(out)


def _of_channels(inputs: Tensor, shape: torch.Size) -> Tensor:
    """B or C as [batch, dim, dstate, length]."""
    if inputs.ndim == 2:
        return inputs.double()[None, :, :, None].expand(shape[0], -1, -1, shape[2])
    if inputs.ndim == 3:
        inputs = inputs[:, None]
    return inputs.double().repeat_interleave(shape[1] // inputs.shape[1], 1)


def _step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    delta = delta.double() if bias is None else delta.double() + bias.double()
    return torch.logaddexp(delta, torch.zeros(())) if softplus else delta


def scanned(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    z: Tensor | None = None,
    bias: Tensor | None = None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out [B, D, L], last state [B, D, N])."""
    b, c = _of_channels(b, u.shape), _of_channels(c, u.shape)
    steps = _step_size(delta, None if bias is None else bias[:, None], softplus)
    state = torch.zeros(*u.shape[:2], a.shape[1], dtype=torch.float64)
    outs = []
    for t in range(u.shape[2]):
        step = steps[:, :, t, None]
        state = torch.exp(step * a.double()) * state + step * b[..., t] * u.double()[:, :, t, None]
        outs.append((state * c[..., t]).sum(-1))
    out = torch.stack(outs, -1) if outs else u.double()
    out = out if d is None else out + d.double()[:, None] * u.double()
    return (out if z is None else out * torch_functional.silu(z.double())), state


def stepped(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    z: Tensor | None = None,
    bias: Tensor | None = None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, new state) of states [B, H, D, N], B and C [B, G, N]."""
    b, c = (
        each.double().repeat_interleave(state.shape[1] // each.shape[1], 1)[:, :, None] for each in (b, c)
    )
    step = _step_size(dt, bias, softplus)[..., None]
    state = torch.exp(step * a.double()) * state.double() + step * b * x.double()[..., None]
    out = (state * c).sum(-1)
    out = out if d is None else out + d.double() * x.double()
    return (out if z is None else out * torch_functional.silu(z.double())), state
