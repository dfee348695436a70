"""Mixtures of experts: a router, and gated feed-forward layers for the tokens that it sends to them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfopt import functional
from hfopt.errors import InvalidInput
from hfopt.functional import LinearWeights
from hfopt.functional.checks import check_beside
from hfopt.functional.linear import Fingerprint, Rows
from hfopt.functional.scalars import flag, integer
from hfopt.modules.guards import are_readable, is_plain_call
from hfopt.modules.records import Records
from hfopt.modules.routing import Custom, Groups, route, route_by


class GatedMLPMOE(nn.Module):
    """`sum_e w_e W2_e (silu(W1_e x) * W3_e x)` over the experts e that a router chooses for each token.

    W1 are the gates, W3 what they are multiplied with; w_e follows from the router's logits. Only the weights of experts
    with tokens are read, where they are. In kernels products are float32, rounded once each; what the experts contribute is
    summed in float32. With gradients or autocast, and for other dtypes, torch's operations run.

    Args:
        W13: [experts, 2 * intermediate, hidden], the rows of W1 and then those of W3; or W1 [experts, intermediate, hidden].
        W2: [experts, hidden, intermediate].
        W3: [experts, intermediate, hidden], where W13 is W1 alone; else None.
        use_prepack: taken for compatibility. Kernels read the weights in place: nothing is packed, or copied.

    The three are float32, bfloat16 or float16, contiguous, of one dtype; parameters become this module's, other tensors its
    buffers.

    Routing differs from `ipex.llm.modules.GatedMLPMOE` where that was not what models do: with
    `e_score_correction_bias` groups are ranked by the sum of their two best biased scores, not by the best one, and the
    weights are the scores without the bias, not with it (DeepSeek-V3, https://arxiv.org/abs/2412.19437);
    experts of other groups are out of the choice even where all biased scores are negative; the router's logits are never
    written to.

    Raises `InvalidInput` (a `ValueError`) for other shapes and dtypes, TypeError for what is no tensor.

    >>> import torch
    >>> from hfopt.modules import GatedMLPMOE
    >>> moe = GatedMLPMOE(torch.randn(4, 2 * 16, 8), torch.randn(4, 8, 16))
    >>> moe(torch.randn(5, 8), False, 2, torch.randn(5, 4), True).shape
    torch.Size([5, 8])
    """

    W13: Tensor
    W2: Tensor
    W3: Tensor | None

    def __init__(self, W13: Tensor, W2: Tensor, W3: Tensor | None = None, use_prepack: bool = True) -> None:
        super().__init__()
        for name, each in (("W13", W13), ("W2", W2), ("W3", W3)):
            if each is None and name == "W3":
                self.register_buffer(name, None)
            elif not isinstance(each, Tensor):
                raise TypeError(f"{name} is a {type(each).__name__}: a torch.Tensor is needed")
            elif isinstance(each, nn.Parameter):
                self.register_parameter(name, each)
            else:
                self.register_buffer(name, each)
        self._check_weights()
        self._records = Records()
        self._known: tuple[Fingerprint | None, ...] = ()  # of what the records read

    def _check_weights(self) -> None:
        for name, each in (("W13", self.W13), ("W2", self.W2), ("W3", self.W3)):
            if each is not None:
                check_beside(name, each, self.W2)
            if each is not None and (each.ndim != 3 or each.dtype is not self.W13.dtype):
                raise InvalidInput(
                    f"{name} has shape {tuple(each.shape)} and dtype {each.dtype}: "
                    f"three dimensions and the dtype of W13, {self.W13.dtype}, are needed"
                )
        n_experts, hidden, intermediate = self.W2.shape
        rows = intermediate if self.W3 is not None else 2 * intermediate
        for name, each, n_rows in (("W13", self.W13, rows), ("W3", self.W3, intermediate)):
            if each is not None and tuple(each.shape) != (n_experts, n_rows, hidden):
                raise InvalidInput(
                    f"{name} has shape {tuple(each.shape)}: {(n_experts, n_rows, hidden)} is needed beside W2 of "
                    f"{tuple(self.W2.shape)}{' and a W3' if self.W3 is not None else ''}"
                )

    def forward(
        self,
        hidden_states: Tensor,
        use_grouped_topk: bool,
        top_k: int,
        router_logits: Tensor,
        renormalize: bool,
        topk_group: int | None = None,
        num_expert_group: int | None = None,
        custom_routing_function: Custom | None = None,
        scoring_func: str = "softmax",
        e_score_correction_bias: Tensor | None = None,
    ) -> Tensor:
        """Send each token to top_k experts.

        Args:
            hidden_states: [tokens, hidden], of the dtype of the weights.
            use_grouped_topk: choose among the experts of the best `topk_group` of `num_expert_group` groups only.
            top_k: experts for each token.
            router_logits: [tokens, experts], floats; softmax or sigmoid of them is taken in float32.
            renormalize: divide the weights of a token's experts by their sum.
            topk_group: groups that take part.
            num_expert_group: groups of equally many experts, one behind the other.
            custom_routing_function: called with the keywords hidden_states, gating_output, topk and renormalize, as vLLM
                does; gives (weights, experts), [tokens, top_k] each. Without groups it stands for all the rest.
            scoring_func: "softmax" or "sigmoid".
            e_score_correction_bias: [experts], added to the scores that experts are chosen by, not to their weights.

        Returns:
            [tokens, hidden].
        """
        self._check_weights()
        top_k, renormalize = integer("top_k", top_k), flag("renormalize", renormalize)
        use_grouped_topk = flag("use_grouped_topk", use_grouped_topk)
        n_experts, hidden, _ = self.W2.shape
        for name, each, width in (
            ("hidden_states", hidden_states, hidden),
            ("router_logits", router_logits, n_experts),
        ):
            check_beside(name, each, self.W2)
            if each.ndim != 2 or each.shape[-1] != width or len(each) != len(hidden_states):
                raise InvalidInput(f"{name} has shape {tuple(each.shape)}: [tokens, {width}] is needed")
        if hidden_states.dtype is not self.W2.dtype and not torch.is_autocast_enabled("cpu"):
            raise InvalidInput(f"hidden_states has dtype {hidden_states.dtype}: {self.W2.dtype} is needed")
        if not router_logits.is_floating_point():
            raise InvalidInput(f"router_logits has dtype {router_logits.dtype}: floats are needed")
        if use_grouped_topk or custom_routing_function is None:
            groups = _groups(num_expert_group, topk_group) if use_grouped_topk else None
            weights, experts = route(
                router_logits,
                top_k,
                renormalize=renormalize,
                scoring=scoring_func,
                bias=e_score_correction_bias,
                groups=groups,
            )
        else:
            weights, experts = route_by(
                custom_routing_function, hidden_states, router_logits, top_k, renormalize
            )
        return self._mix(hidden_states, weights, experts)

    def _mix(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        by_kernels = self._can_read(x, weights)
        n_chosen = experts.shape[-1]
        order = experts.flatten().argsort(stable=True)
        weights = weights.flatten()[order, None]
        tokens = order // n_chosen if n_chosen else order
        out = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
        first = 0
        for expert, n in enumerate(experts.flatten().bincount(minlength=len(self.W2)).tolist()):
            if n:
                own = slice(first, first + n)
                first += n
                y = self._expert(expert, x[tokens[own]], by_kernels)
                out.index_add_(0, tokens[own], (y * weights[own]).to(out.dtype))
        return out.to(x.dtype)

    def _can_read(self, x: Tensor, weights: Tensor) -> bool:
        """Whether kernels may stand for this call; forgets records of other weights."""
        known = tuple(Fingerprint.of(each) for each in (self.W13, self.W2, self.W3))
        if known != self._known:
            self._records, self._known = Records(), known
        if torch.compiler.is_compiling() or not is_plain_call(self, (x, weights), {}):
            return False
        return are_readable((x,), self.W2.dtype)

    def _expert(self, expert: int, x: Tensor, by_kernels: bool) -> Tensor:
        """W2 (silu(W1 x) * W3 x) of one expert."""
        size = self.W2.shape[-1]
        rows: Rows = () if self.W3 is not None else ((0, size), (size, size))
        inner = [self.W13] if self.W3 is None else [self.W13, self.W3]
        up = self._weights("up", expert, inner, rows) if by_kernels else None
        down = self._weights("down", expert, [self.W2]) if by_kernels else None
        if up is not None and down is not None:
            gated = functional.linear(x, up, activation="silu", gated=True, by="auto")
            return functional.linear(gated, down, by="auto")
        parts = [F.linear(x, each[expert]) for each in inner]
        gate, other = parts if rows == () else parts[0].chunk(2, dim=-1)
        return F.linear(F.silu(gate) * other, self.W2[expert])

    def _weights(
        self, role: str, expert: int, tensors: Sequence[Tensor], rows: Rows = ()
    ) -> LinearWeights | None:
        role = f"{role} {expert}"
        known = self._records.weights.get(role)
        if isinstance(known, LinearWeights):
            return known
        try:
            made = LinearWeights.of([each.detach()[expert] for each in tensors], [None] * len(tensors), rows)
        except InvalidInput:  # strides that kernels do not read
            return None
        self._records.weights[role] = made
        return made


def _groups(count: int | None, kept: int | None) -> Groups:
    if count is None or kept is None:
        raise InvalidInput(
            f"num_expert_group is {count} and topk_group is {kept}: use_grouped_topk needs both"
        )
    return Groups(integer("num_expert_group", count), integer("topk_group", kept))
