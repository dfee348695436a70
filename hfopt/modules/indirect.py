"""IndirectAccessKVCacheAttention: attention of beams over a cache in which nothing is moved."""

from torch import Tensor, nn

from hfopt.functional import indirect_access_kv_cache_attention
from hfopt.functional.beam_past import LayerPast, check_text_max_length


class IndirectAccessKVCacheAttention(nn.Module):
    """softmax(query key^T / scale_attn + mask) value over all tokens of each beam, found through a table of rows.

    It has the interface of ipex.llm's class. All state is in `layer_past`, none in the module: one of them may serve all
    layers, several requests and several threads.

    Args:
        text_max_length: tokens that a text is expected to have at most; caches grow as far and not beyond, until they must.

    Raises `hfopt.errors.InvalidInput`, a `ValueError`, unless it is an integer from 0 on.

    Example:
        >>> import torch
        >>> from hfopt.modules import IndirectAccessKVCacheAttention
        >>> attention = IndirectAccessKVCacheAttention(text_max_length=64)
        >>> zeros = torch.zeros(1, 1, 1, 1)
        >>> past = (torch.zeros(1, 0, 0, 1), zeros, zeros, torch.zeros(1, 4, dtype=torch.long))  # 4 beams
        >>> x = torch.randn(1, 5, 2, 16)  # [prompts, tokens, heads, head_dim]
        >>> out, _, past = attention(x, x, x, 4.0, past)
        >>> past[3][past[0].size(-2) - 1] = torch.tensor([0, 0, 0, 0])  # all beams go on with the first one
        >>> x = torch.randn(4, 1, 2, 16)
        >>> out, _, past = attention(x, x, x, 4.0, past)
        >>> out.shape
        torch.Size([4, 2, 1, 16])
    """

    def __init__(self, text_max_length: int = 2048) -> None:
        super().__init__()
        check_text_max_length(text_max_length)
        self.text_max_length = text_max_length

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        scale_attn: float | Tensor,
        layer_past: LayerPast | None = None,
        head_mask: None = None,
        attention_mask: Tensor | None = None,
        alibi: Tensor | None = None,
        add_casual_mask: bool = True,
        seq_info: int | Tensor | None = None,
    ) -> tuple[Tensor, None, LayerPast]:
        """See `hfopt.functional.indirect_access_kv_cache_attention`."""
        return indirect_access_kv_cache_attention(
            query,
            key,
            value,
            scale_attn,
            layer_past,
            head_mask,
            attention_mask,
            alibi,
            add_casual_mask,
            seq_info,
            self.text_max_length,
        )

    apply_function = staticmethod(indirect_access_kv_cache_attention)

    def extra_repr(self) -> str:
        return f"text_max_length={self.text_max_length}"
