"""Layers of which each process has a part: the part as a plain parameter, and what the processes do together around it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfopt.distributed.ranks import Ranks
from hfopt.errors import UnsupportedModel
from hfopt.host import Features, Split, is_sharded, local_part

_THEIRS = "_hfopt_theirs"
_NO_LOADING = (
    "a model that is split over processes takes no state dict: load it by from_pretrained, then optimise"
)
_CHANGED = ("forward", "in_features", "out_features", "_parameters")


class Shard:
    """The part of a layer that this process has.

    n: outputs, or inputs, of the whole; n_own, first: those of the part. weights: as transformers has split them.
    """

    def __init__(self, ranks: Ranks, split: Split, n: int, n_own: int, weights: dict[str, Any]) -> None:
        self.ranks, self.split, self.n, self.n_own, self.weights = ranks, split, n, n_own, weights
        # as transformers cuts: the last parts are shorter where the number does not divide
        self.first = min(ranks.rank * -(-n // ranks.size), n)

    def forget(self) -> None:
        """Let go of the weights as transformers has split them, which are in the memory of the float ones."""
        self.weights.clear()

    def __deepcopy__(self, memo: Any) -> Shard:
        return self  # parts of a copy belong to the same processes

    def __reduce__(self) -> Any:
        raise UnsupportedModel("a model that is split over processes cannot be pickled: use save_pretrained")

    @property
    def cuts(self) -> bool:
        """Whether it is given all inputs, and takes its own."""
        return self.split.axis == 1 and self.split.whole

    @property
    def sums(self) -> bool:
        """Whether the results of all have to be summed."""
        return self.split.axis == 1

    @property
    def gathers(self) -> bool:
        """Whether the results of all have to be put side by side."""
        return self.split.axis == 0 and self.split.whole

    def features(self, own: Features) -> Features:
        """Sizes of a linear layer as the modules around it see them, of those of its part."""
        if not self.split.whole:
            return own
        return own._replace(outputs=self.n) if self.gathers else own._replace(inputs=self.n)

    @property
    def leads(self) -> bool:
        """Whether this process adds what is to be added once to a sum."""
        return self.ranks.rank == 0

    def cut(self, x: Tensor) -> Tensor:
        """Of the inputs [..., n] the own ones."""
        return x[..., self.first : self.first + self.n_own].contiguous() if self.cuts else x

    def join(self, y: Tensor) -> Tensor:
        """What all processes have made, of what this one has."""
        if self.sums:
            return cast(Tensor, _Sum.apply(y, self.ranks))
        return self.gather(y) if self.gathers else y

    def gather(self, y: Tensor) -> Tensor:
        """The outputs of all side by side: [..., n]."""
        whole = y.new_zeros((*y.shape[:-1], self.n))
        whole[..., self.first : self.first + self.n_own] = y
        return cast(Tensor, _Sum.apply(whole, self.ranks))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: Ranks) -> Tensor:
        ctx.mark_dirty(y)
        ranks.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UnsupportedModel(
            "gradients do not go through layers that are split over processes: hfopt.restore the model"
        )


class _Part(nn.Module):
    """In front of a class of layers: of its weights this process has a part."""

    shard: Shard

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # what transformers has given this process: it knows how to put the parts together
        for name, weight in self.shard.weights.items():
            if weight is not None:
                destination[prefix + name] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        raise UnsupportedModel(_NO_LOADING)


class ShardedLinear(_Part, nn.Linear):
    """`y = x W^T + b` of which this process has some rows or columns of W.

    in_features and out_features are those of the part. A bias that is added to a sum is 0 in all processes but the first.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.shard.join(F.linear(self.shard.cut(input), self.weight, self.bias))


class _ShardedRows(_Part, nn.Embedding):
    """In front of the class of an embedding: of its rows this process has some."""

    def forward(self, input: Tensor) -> Tensor:
        places = input - self.shard.first
        is_other = (places < 0) | (places >= self.shard.n_own)
        found: Tensor = super().forward(places.masked_fill(is_other, 0))
        return cast(Tensor, _Sum.apply(found.masked_fill(is_other[..., None], 0), self.shard.ranks))


@functools.cache
def _embedding_class(kind: Any) -> Any:
    return type(kind.__name__, (_ShardedRows, kind), {"__module__": kind.__module__, "host_class": kind})


class _Theirs(NamedTuple):
    """What a module was before."""

    kind: type[nn.Module]
    attributes: dict[str, Any]


def take_part(module: Any, split: Split | None, ranks: Ranks, parts: dict[int, nn.Parameter]) -> None:
    """Make a layer that transformers has split one of ours, over the same memory; without a split just unwrap it.

    parts: of weights that several modules share, by `id`.
    """
    state = module.__dict__
    theirs = _Theirs(type(module), {name: state[name] for name in _CHANGED if name in state})
    state.pop("forward", None)
    state[_THEIRS] = theirs
    if split is None:
        return
    weights = state["_parameters"]
    whole, own = weights["weight"].shape, local_part(weights["weight"]).shape
    shard = state["shard"] = Shard(ranks, split, whole[split.axis], own[split.axis], weights)
    state["_parameters"] = {name: _own(weight, parts) for name, weight in weights.items()}
    if isinstance(module, nn.Embedding):
        kind: Any = type(module)
        module.__class__ = _embedding_class(kind)
        return
    bias = module._parameters["bias"]
    if bias is not None and shard.sums and not shard.leads:
        module._parameters["bias"] = nn.Parameter(torch.zeros_like(bias), requires_grad=bias.requires_grad)
    module.out_features, module.in_features = own
    module.__class__ = ShardedLinear


def _own(weight: Any, parts: dict[int, nn.Parameter]) -> nn.Parameter | None:
    if weight is None:
        return None
    if id(weight) not in parts:
        own = local_part(weight) if is_sharded(weight) else weight.detach()
        parts[id(weight)] = nn.Parameter(own, requires_grad=weight.requires_grad)
    return parts[id(weight)]


def give_back(module: nn.Module) -> None:
    """Undo `take_part`; harmless where there is nothing to undo."""
    theirs = module.__dict__.pop(_THEIRS, None)
    if theirs is not None:
        module.__dict__.pop("shard", None)
        module.__class__ = theirs.kind
        module.__dict__.update(theirs.attributes)


def is_part(module: nn.Module) -> bool:
    """Whether this process has a part of the layer."""
    return "shard" in module.__dict__
