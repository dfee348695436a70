"""The operations of a Mamba layer, under the name that ipex.llm gives them."""

from torch import Tensor

from hfopt.functional import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from hfopt.functional.causal_conv import ConvActivation


class MambaMixer:
    """The operations of a Mamba layer (https://arxiv.org/abs/2312.00752), as methods of the class; none of them needs an
    instance.

    Each is a function of `hfopt.functional`, which says its formula, shapes, dtypes and errors: `causal_conv1d_fn` is
    `causal_conv1d`, `selective_scan_fn` is `selective_scan`, and the other two have their own names there.

    >>> import torch
    >>> from hfopt.modules import MambaMixer
    >>> x, weight = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[10.0, 1.0]])
    >>> out, state = MambaMixer.causal_conv1d_fn(x, weight, return_final_states=True, activation=None)
    >>> out
    tensor([[[ 1., 12., 23.]]])
    >>> MambaMixer.causal_conv1d_update(torch.tensor([[4.0]]), state, weight)
    tensor([[34.]])
    """

    @classmethod
    def causal_conv1d_fn(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        final_states_out: Tensor | None = None,
        activation: ConvActivation | None = "silu",
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve each channel; see `hfopt.functional.causal_conv1d`."""
        states = initial_states, return_final_states, final_states_out
        return causal_conv1d(x, weight, bias, *states, activation)

    @classmethod
    def causal_conv1d_update(
        cls,
        x: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: ConvActivation | None = None,
        cache_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Convolve new inputs after a state; see `hfopt.functional.causal_conv1d_update`."""
        return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)

    @classmethod
    def selective_scan_fn(
        cls,
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
        """Scan all times of each channel; see `hfopt.functional.selective_scan`."""
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)

    @classmethod
    def selective_state_update(
        cls,
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
        """Do one step of the scan; see `hfopt.functional.selective_state_update`."""
        return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
