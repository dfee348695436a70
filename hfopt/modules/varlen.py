"""Attention of packed sequences as a module."""

from torch import Tensor, nn

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

    apply_function = staticmethod(varlen_attention)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        seqlen_q: Tensor,
        seqlen_k: Tensor,
        alibi_slopes: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        pdropout: float,
        softmax_scale: float | None,
        zero_tensors: bool,
        is_causal: bool,
        return_softmax: bool,
        gen_: None,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = -1.0,
    ) -> Tensor:
        """Write `out` and return it, as `hfopt.functional.varlen_attention` does."""
        return varlen_attention(
            query,
            key,
            value,
            out,
            seqlen_q,
            seqlen_k,
            alibi_slopes,
            max_seqlen_q,
            max_seqlen_k,
            pdropout,
            softmax_scale,
            zero_tensors,
            is_causal,
            return_softmax,
            gen_,
            window_size_left,
            window_size_right,
            softcap,
        )
