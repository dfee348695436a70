"""A mixture of experts: routing, and what the experts make of their tokens, against float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from hfopt.errors import InvalidInput
from hfopt.modules import GatedMLPMOE
from tests.block_cases import assert_near
from tests.pairs import pairs_of
from tests.reference import DTYPES, assert_as_exact_as_torch

E, H, INNER = 8, 24, 20


def _weights(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(W13, W2)."""
    return (torch.randn(E, 2 * INNER, H) / 5).to(dtype), (torch.randn(E, H, INNER) / 5).to(dtype)


def _exact(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Token by token in float64; weights, experts [tokens, top_k]."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (row, chosen) in enumerate(zip(weights.double(), experts, strict=True)):
        for weight, expert in zip(row, chosen, strict=True):
            gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
            out[token] += weight * (w2[expert].double() @ (F.silu(gate) * up))
    return out


def _in_torch(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """As transformers computes it, in the dtype of x."""
    out = torch.zeros_like(x)
    for expert in range(E):
        tokens, place = (experts == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[tokens], w13[expert]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, w2[expert]) * weights[tokens, place, None]
        out.index_add_(0, tokens, y.to(x.dtype))
    return out


def _plain(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    weights, experts = logits.double().softmax(-1).topk(top_k)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), experts


@pytest.mark.parametrize(
    ("dtype", "n_tokens", "top_k", "renormalize", "apart"),
    pairs_of(DTYPES, (1, 5, 70), (1, 2, E), (True, False), (True, False)),
)
def test_tokens_and_their_experts(
    dtype: torch.dtype, n_tokens: int, top_k: int, renormalize: bool, apart: bool
) -> None:
    (w13, w2), x, logits = _weights(dtype), torch.randn(n_tokens, H).to(dtype), torch.randn(n_tokens, E)
    moe = GatedMLPMOE(w13[:, :INNER], w2, w13[:, INNER:]) if apart else GatedMLPMOE(w13, w2)
    before = logits.clone()
    found = moe(x, False, top_k, logits, renormalize)
    assert found.dtype is dtype and torch.equal(logits, before)
    weights, experts = _plain(logits, top_k, renormalize)
    exact = _exact(x, w13, w2, weights, experts)
    if dtype is torch.float32:
        assert_near(found, exact)
    else:  # what lies between two products is rounded, which no tolerance for each value by itself knows
        assert_as_exact_as_torch(found, _in_torch(x, w13, w2, weights.float(), experts), exact)


# ---- routing in groups -------------------------------------------------------------------------------------------------


def _grouped(
    logits: Tensor, top_k: int, kept: int, groups: int, scoring: str, bias: Tensor | None, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """As the papers of DeepSeek-V2 and -V3 say it, token by token."""
    all_weights, all_experts = [], []
    for row in logits.double():
        scores = row.softmax(-1) if scoring == "softmax" else row.sigmoid()
        ranks = scores if bias is None else scores + bias.double()
        size = E // groups
        best = [ranks[g * size : (g + 1) * size].sort(descending=True).values for g in range(groups)]
        of_group = [each[0] if bias is None else each[:2].sum() for each in best]
        chosen = sorted(range(groups), key=lambda g: -float(of_group[g]))[:kept]
        allowed = [e for e in range(E) if e // size in chosen]
        experts = sorted(allowed, key=lambda e: -float(ranks[e]))[:top_k]
        weights = scores[experts]
        all_weights.append(weights / weights.sum() if renormalize else weights)
        all_experts.append(torch.tensor(experts))
    return torch.stack(all_weights), torch.stack(all_experts)


@pytest.mark.parametrize(
    ("scoring", "bias", "groups", "kept", "top_k", "renormalize"),
    [
        each
        for each in pairs_of(
            ("softmax", "sigmoid"), ("none", "some", "negative"), (2, 4, E), (1, 2), (1, 2), (True, False)
        )
        if each.values[3] * (E // each.values[2]) >= each.values[4]
    ],
)
def test_groups(scoring: str, bias: str, groups: int, kept: int, top_k: int, renormalize: bool) -> None:
    (w13, w2), x, logits = _weights(), torch.randn(9, H), torch.randn(9, E)
    corrections = {"none": None, "some": torch.randn(E) / 3, "negative": torch.randn(E) / 3 - 5}[bias]
    found = GatedMLPMOE(w13, w2)(
        *(x, True, top_k, logits, renormalize, kept, groups),
        scoring_func=scoring,
        e_score_correction_bias=corrections,
    )
    chosen = _grouped(logits, top_k, kept, groups, scoring, corrections, renormalize)
    assert_near(found, _exact(x, w13, w2, *chosen))


def test_routing_is_that_of_deepseek_v3() -> None:
    sizes: dict[str, Any] = {"n_routed_experts": E, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    config = DeepseekV3Config(hidden_size=H, routed_scaling_factor=1.0, norm_topk_prob=True, **sizes)
    router: Any = DeepseekV3TopkRouter(config)
    bias, weight, x = torch.rand(E), torch.randn(E, H), torch.randn(7, H)
    with torch.no_grad():
        router.e_score_correction_bias.copy_(bias)
        router.weight.copy_(weight)
        # releases put them in another order
        chosen = [each for each in router(x) if each.shape == (7, 3)]
    weights, experts = sorted(chosen, key=lambda each: not each.is_floating_point())
    w13, w2 = _weights()
    found = GatedMLPMOE(w13, w2)(
        *(x, True, 3, F.linear(x, weight), True, 2, 4), scoring_func="sigmoid", e_score_correction_bias=bias
    )
    assert_near(found, _exact(x, w13, w2, weights, experts))


def test_scores_that_vanish() -> None:
    moe, logits = GatedMLPMOE(*_weights()), torch.full((2, E), -200.0)
    assert not moe(torch.randn(2, H), False, 2, logits, True, scoring_func="sigmoid").any()


# ---- a function of one's own -------------------------------------------------------------------------------------------


def test_a_routing_function() -> None:
    (w13, w2), x, logits = _weights(), torch.randn(5, H), torch.randn(5, E)
    asked: dict[str, Any] = {}

    def routed(
        hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        asked.update(x=hidden_states, logits=gating_output, topk=topk, renormalize=renormalize)
        return torch.full((5, 2), 0.25), torch.tensor([[0, 7]] * 5, dtype=torch.int32)

    found = GatedMLPMOE(w13, w2)(x, False, 2, logits, False, custom_routing_function=routed)
    assert asked["x"] is x and asked["logits"] is logits
    assert (asked["topk"], asked["renormalize"]) == (2, False)
    assert_near(found, _exact(x, w13, w2, torch.full((5, 2), 0.25), torch.tensor([[0, 7]] * 5)))


@pytest.mark.parametrize(
    ("answer", "message"),
    (
        ((torch.ones(5, 2), torch.full((5, 2), 8)), "experts 8 to 8: 0 to 7 are allowed"),
        ((torch.ones(5, 2), torch.full((5, 2), -1)), "experts -1 to -1"),
        ((torch.ones(4, 2), torch.zeros(4, 2).long()), r"weights \(4, 2\)"),
        ((torch.ones(5, 2), torch.zeros(5, 3).long()), "of one shape"),
        ((torch.ones(5, 2), torch.zeros(5, 2)), "floats and integers"),
        ((torch.ones(5, 2), [0, 1]), "experts list"),
    ),
)
def test_answers_of_a_routing_function(answer: tuple[Any, Any], message: str) -> None:
    moe = GatedMLPMOE(*_weights())
    with pytest.raises(InvalidInput, match=message):
        moe(
            *(torch.ones(5, H), False, 2, torch.ones(5, E), False),
            custom_routing_function=lambda **given: answer,
        )


# ---- weights -----------------------------------------------------------------------------------------------------------


def test_weights_are_shared_and_read_at_each_call() -> None:
    (w13, w2), x, logits = _weights(), torch.randn(5, H), torch.randn(5, E)
    moe = GatedMLPMOE(w13, w2)
    assert moe.W13.data_ptr() == w13.data_ptr()
    copied = copy.deepcopy(moe)
    first = moe(x, False, 2, logits, True)
    w2.mul_(2)
    torch.testing.assert_close(moe(x, False, 2, logits, True), first * 2)
    torch.testing.assert_close(copied(x, False, 2, logits, True), first)
    moe.W2 = torch.zeros_like(w2)
    assert not moe(x, False, 2, logits, True).any()
    moe.to(torch.bfloat16)
    assert moe(x.bfloat16(), False, 2, logits, True).dtype is torch.bfloat16
    assert set(GatedMLPMOE(nn.Parameter(w13), w2).state_dict()) == {"W13", "W2"}


def test_strided_weights_gradients_and_other_dtypes() -> None:
    (w13, w2), x, logits = _weights(), torch.randn(5, H), torch.randn(5, E)
    exact = _exact(x, w13, w2, *_plain(logits, 2, True))
    strided = GatedMLPMOE(w13.transpose(1, 2).contiguous().transpose(1, 2), w2)
    assert_near(strided(x, False, 2, logits, True), exact)
    learning = GatedMLPMOE(nn.Parameter(w13), nn.Parameter(w2))
    learning(x, False, 2, logits, True).sum().backward()
    assert learning.W13.grad is not None and learning.W13.grad.any()
    double = GatedMLPMOE(w13.double(), w2.double())
    torch.testing.assert_close(double(x.double(), False, 2, logits.double(), True), exact)


def test_experts_without_tokens_are_not_read() -> None:
    (w13, w2), x = _weights(), torch.randn(5, H)
    w13[1:], w2[1:] = torch.nan, torch.nan
    logits = torch.full((5, E), -1e4)
    logits[:, 0] = 0
    assert GatedMLPMOE(w13, w2)(x, False, 1, logits, True).isfinite().all()
    assert GatedMLPMOE(w13, w2)(x[:0], False, 1, logits[:0], True).shape == (0, H)


_MOE: Any = GatedMLPMOE(*_weights())
_ARGUMENTS = {"use_grouped_topk": False, "top_k": 2, "router_logits": torch.ones(5, E), "renormalize": True}
_GROUPS = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 1}


@pytest.mark.parametrize(
    ("x", "change", "message"),
    (
        (torch.ones(5, H + 1), {}, "hidden_states has shape"),
        (torch.ones(1, 5, H), {}, "hidden_states has shape"),
        (torch.ones(5, H).half(), {}, "hidden_states has dtype"),
        (torch.ones(4, H), {}, "router_logits has shape"),
        (torch.ones(5, H), {"router_logits": torch.ones(5, E + 1)}, "router_logits has shape"),
        (torch.ones(5, H), {"router_logits": torch.ones(5, E).long()}, "router_logits has dtype"),
        (torch.ones(5, H), {"top_k": 0}, "top_k is 0: 1 to 8 are allowed"),
        (torch.ones(5, H), {"top_k": E + 1}, "top_k is 9"),
        (torch.ones(5, H), {"scoring_func": "relu"}, "scoring_func is 'relu'"),
        (torch.ones(5, H), {"e_score_correction_bias": torch.ones(3)}, "e_score_correction_bias has shape"),
        (torch.ones(5, H), {"use_grouped_topk": True}, "use_grouped_topk needs both"),
        (torch.ones(5, H), _GROUPS | {"num_expert_group": 3}, "num_expert_group is 3"),
        (torch.ones(5, H), _GROUPS | {"topk_group": 5}, "topk_group is 5: 1 to 4 are allowed"),
        (torch.ones(5, H), _GROUPS | {"top_k": 3}, "top_k is 3: 1 to 2 are allowed"),
    ),
)
def test_wrong_arguments(x: Tensor, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        _MOE(x, **{**_ARGUMENTS, **change})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    (
        (lambda: GatedMLPMOE(torch.ones(2, 6, 4), torch.ones(2, 4, 4)), InvalidInput, "W13 has shape"),
        (lambda: GatedMLPMOE(torch.ones(2, 6, 4), torch.ones(3, 4, 3)), InvalidInput, "W13 has shape"),
        (lambda: GatedMLPMOE(torch.ones(6, 4), torch.ones(2, 4, 3)), InvalidInput, "W13 has shape"),
        (lambda: GatedMLPMOE(torch.ones(2, 6, 4), torch.ones(2, 4, 3).half()), InvalidInput, "W2 has shape"),
        (
            lambda: GatedMLPMOE(torch.ones(2, 3, 4), torch.ones(2, 4, 3), torch.ones(2, 2, 4)),
            InvalidInput,
            "W3 has shape",
        ),
        (lambda: GatedMLPMOE([1.0], torch.ones(2, 4, 3)), TypeError, "W13 is a list"),  # type: ignore[arg-type]
    ),
)
def test_wrong_weights(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
