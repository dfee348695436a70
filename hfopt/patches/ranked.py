"""Attention whose model hands down a bias of scores that counts keys, and masks that hold it."""

from typing import Any

import torch
from torch import Tensor

from hfopt.functional import Mask
from hfopt.patches.angles import Angles, remembered
from hfopt.patches.attention import Ranks, UnrotatedAttention
from hfopt.patches.guards import attention_kind
from hfopt.patches.ops import Declined
from hfopt.patches.slopes import ranked_bias_of, ranked_slopes_of, with_bias


class RankedAttention(UnrotatedAttention):
    """Falcon's with ALiBi. The model hands down angles too, which nobody reads then."""

    ranked = True

    @property
    def _ranks(self) -> Ranks:
        ranks = self._hfopt.spec.given.ranks
        assert ranks is not None, "or it would not have been recognised"
        return ranks

    @property
    def slopes(self) -> Tensor:  # type: ignore[override]
        return ranked_slopes_of(self._ranks.n_heads, self._ranks.times)

    def rotary(self, position_embeddings: Any, position_ids: Any) -> Angles | None:
        return super().rotary(None, position_ids)

    def without_bias(self, attention_mask: Any, bias: Any, cache: Any, sizes: tuple[int, int, int]) -> Any:
        if type(attention_mask) is not Tensor or type(bias) is not Tensor:
            raise Declined
        if not attention_mask.is_floating_point() or attention_mask.dim() != 4:
            raise Declined
        if attention_kind(self) != self._ranks.kind:
            raise Declined

        def build() -> tuple[Tensor, Tensor | None]:
            return bias, _seen_by(attention_mask, bias, self._ranks, sizes)

        known, shown = remembered(cache, "mask of ranks", attention_mask, sizes, build)
        if known is not bias or shown is None:
            raise Declined
        return shown

    def takes_bias(self, bias: Any, cache: Any, mask: Mask, sizes: tuple[int, int, int]) -> bool:
        return True  # or `without_bias` would have declined it


def _seen_by(
    attention_mask: Tensor, bias: Tensor, ranks: Ranks, sizes: tuple[int, int, int]
) -> Tensor | None:
    """The mask alone, if both are what a model makes that counts keys of which none is hidden behind one that is seen; None
    if they are not.
    """
    n_keys = sizes[-1]
    lowest = torch.finfo(attention_mask.dtype).min
    seen = attention_mask[:, 0, :, :n_keys] > lowest / 2
    last = seen[:, -1]
    has_gaps = bool((last[:, :-1] & ~last[:, 1:]).any())
    expected = ranked_bias_of(ranks.n_heads, last, attention_mask.dtype)
    if has_gaps or not _is_same(bias[..., :n_keys], expected):
        return None
    if not _is_same(attention_mask[..., :n_keys], with_bias(seen, expected, ranks.head_dim)):
        return None
    return torch.zeros_like(attention_mask[:, :1, :, :n_keys]).masked_fill_(~seen[:, None], lowest)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one, other)
