"""The operations of a Mamba layer, under the name that ipex.llm gives them."""

from hfopt.functional import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update


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

    causal_conv1d_fn = staticmethod(causal_conv1d)
    causal_conv1d_update = staticmethod(causal_conv1d_update)
    selective_scan_fn = staticmethod(selective_scan)
    selective_state_update = staticmethod(selective_state_update)
