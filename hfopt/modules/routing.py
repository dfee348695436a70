"""Which experts a token goes to, and how much each of them counts."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.functional.checks import check_beside

# (hidden_states, gating_output, topk, renormalize) -> (weights, experts), [tokens, topk] each, called by these names
Custom: TypeAlias = Callable[..., tuple[Tensor, Tensor]]

_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
}


class Groups(NamedTuple):
    """Of `number` groups of experts, one behind the other, the best `kept` take part."""

    number: int
    kept: int


def route(
    router_logits: Tensor,
    top_k: int,
    *,
    renormalize: bool,
    scoring: str,
    bias: Tensor | None,
    groups: Groups | None,
) -> tuple[Tensor, Tensor]:
    """(weights float32 or float64, experts int64) of each token, [tokens, top_k] each.

    The experts are those of the largest scores plus bias, in the best groups if there are some; the weights are their scores
    without the bias, divided by their sum if `renormalize`. A group counts as its two best experts with a bias (DeepSeek-V3,
    https://arxiv.org/abs/2412.19437), and as its best one without (DeepSeek-V2, https://arxiv.org/abs/2405.04434).

    Raises `InvalidInput`.
    """
    n_experts = router_logits.shape[-1]
    if bias is not None:
        check_beside("e_score_correction_bias", bias, router_logits)
    _check(n_experts, top_k, scoring, bias, groups)
    wide = router_logits if router_logits.dtype is torch.float64 else router_logits.float()
    scores = _SCORES[scoring](wide)
    ranks = scores if bias is None else scores + bias.to(scores.dtype)
    if groups is not None:
        members = ranks.view(len(ranks), groups.number, -1)
        best = min(1 if bias is None else 2, members.shape[-1])
        of_groups = members.topk(best, dim=-1).values.sum(-1)
        kept = of_groups.topk(groups.kept, dim=-1, sorted=False).indices
        is_kept = torch.zeros_like(of_groups, dtype=torch.bool).scatter_(1, kept, True)
        ranks = members.masked_fill(~is_kept[..., None], -torch.inf).view_as(ranks)
    experts = ranks.topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if renormalize:  # as DeepSeek-V3 does it where all of them vanish
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    return weights, experts


def _check(n_experts: int, top_k: int, scoring: str, bias: Tensor | None, groups: Groups | None) -> None:
    if not isinstance(scoring, str) or scoring not in _SCORES:
        raise InvalidInput(f"scoring_func is {scoring!r}: one of {sorted(_SCORES)} is allowed")
    if bias is not None and (tuple(bias.shape) != (n_experts,) or not bias.is_floating_point()):
        raise InvalidInput(
            f"e_score_correction_bias has shape {tuple(bias.shape)} and dtype {bias.dtype}: "
            f"{(n_experts,)} of floats is needed"
        )
    n_allowed = n_experts
    if groups is not None:
        number, kept = groups
        if number < 1 or n_experts % number:
            raise InvalidInput(f"num_expert_group is {number}: a divisor of {n_experts} experts is needed")
        if not 1 <= kept <= number:
            raise InvalidInput(f"topk_group is {kept}: 1 to {number} are allowed")
        n_allowed = kept * (n_experts // number)
    if not 1 <= top_k <= n_allowed:
        raise InvalidInput(f"top_k is {top_k}: 1 to {n_allowed} are allowed")


def route_by(
    function: Custom, hidden_states: Tensor, router_logits: Tensor, top_k: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """What a function of the user answers, checked; raises `InvalidInput` for what no kernel may see."""
    weights, experts = function(
        hidden_states=hidden_states, gating_output=router_logits, topk=top_k, renormalize=renormalize
    )
    n_tokens, n_experts = router_logits.shape
    for name, each in (("weights", weights), ("experts", experts)):
        if not isinstance(each, Tensor) or each.ndim != 2 or len(each) != n_tokens:
            given = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise InvalidInput(
                f"custom_routing_function gives {name} {given}: [{n_tokens}, {top_k}] are needed"
            )
        check_beside(f"custom_routing_function: {name}", each, router_logits)
    is_whole = not (experts.is_floating_point() or experts.is_complex() or experts.dtype is torch.bool)
    if weights.shape != experts.shape or not weights.is_floating_point() or not is_whole:
        raise InvalidInput(
            f"custom_routing_function gives weights {weights.dtype} {tuple(weights.shape)} and experts "
            f"{experts.dtype} {tuple(experts.shape)}: floats and integers of one shape are needed"
        )
    experts = experts.long()
    if experts.numel() and not 0 <= int(experts.min()) <= int(experts.max()) < n_experts:
        raise InvalidInput(
            f"custom_routing_function gives experts {int(experts.min())} to {int(experts.max())}: "
            f"0 to {n_experts - 1} are allowed"
        )
    return weights if weights.dtype is torch.float64 else weights.float(), experts
