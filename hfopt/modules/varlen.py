"""Attention of packed sequences as a module."""

from torch import nn

from hfopt.functional import varlen_attention


class VarlenAttention(nn.Module):
    """softmax(scores) v of each of several sequences, packed one behind the other.

    Called with the arguments of `hfopt.functional.varlen_attention`, where formula, shapes and errors are; `apply_function`
    is the same without an instance. Both write `out` in place, and return it.

    >>> import torch
    >>> from hfopt.modules import VarlenAttention
    >>> q, k, v = torch.randn(3, 5, 4, 64)  # 5 tokens of 4 heads: sequences of 2 and 3
    >>> ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> out = torch.empty_like(q)
    >>> attend = VarlenAttention()
    >>> _ = attend(q, k, v, out, ends, ends, None, 3, 3, 0.0, 0.125, False, True, False, None)
    >>> torch.allclose(out[2], v[2])  # a first token sees itself
    True
    """

    forward = staticmethod(varlen_attention)
    apply_function = staticmethod(varlen_attention)
