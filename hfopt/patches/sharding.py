"""A model that transformers has split over processes: its layers become ours, after a proof that all have agreed on."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from hfopt.distributed.ranks import Ranks
from hfopt.host import Sharding, Split, local_part
from hfopt.modules.sharded import give_back, is_part, take_part

_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest output
_N_TRIED = 3  # tokens


def take_parts(model: nn.Module, sharding: Sharding, ranks: Ranks) -> str | None:
    """Make the split layers of a model ours; in words, the same in all processes, why they stay what they are.

    One layer of each kind is asked before and after.
    """
    modules = {path: model.get_submodule(path) for path in sharding.splits}
    tried: dict[Any, tuple[nn.Module, Tensor]] = {}
    for path, split in sharding.splits.items():
        if split is not None:
            weight: Any = modules[path]._parameters["weight"]
            kind = type(modules[path]), split, weight.shape, weight.dtype
            tried.setdefault(kind, (modules[path], _inputs(modules[path], split)))
    with torch.no_grad():
        expected = [module(x) for module, x in tried.values()]
        parts: dict[int, nn.Parameter] = {}
        for path, split in sharding.splits.items():
            take_part(modules[path], split, ranks, parts)
        found = [module(x) for module, x in tried.values()]
    are_near = all(_are_near(*each) for each in zip(expected, found, strict=True))
    flaw = ranks.agree(None if are_near else "its layers, split, give other results in hfopt's classes")
    if flaw is not None:
        give_back_parts(model)
    return flaw


def _inputs(module: nn.Module, split: Split) -> Tensor:
    """Of a call of the module in this process; the same in all of them where they are given the same."""
    numbers = torch.Generator().manual_seed(3)
    weight: Any = module._parameters["weight"]
    n = (weight if split.axis == 0 or split.whole else local_part(weight)).shape[1]
    if isinstance(module, nn.Embedding):
        return torch.arange(0, len(weight), max(len(weight) // _N_TRIED, 1), device="cpu")[None]
    return torch.randn(1, _N_TRIED, n, generator=numbers, device="cpu").to(weight.dtype)


def _are_near(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape or expected.dtype is not found.dtype:
        return False
    tolerance = _TOLERANCES.get(expected.dtype, 0.0) * float(expected.abs().max())
    return bool(((expected - found).abs() <= tolerance).all())


def give_back_parts(model: nn.Module) -> None:
    """Undo `take_parts`; harmless where there is nothing to undo."""
    for module in model.modules():
        give_back(module)


def ranks_of(model: nn.Module) -> Ranks | None:
    """The processes that have parts of the layers of a model, this one among them; None if it has all of it."""
    return next(
        (cast(Ranks, each.__dict__["shard"].ranks) for each in model.modules() if is_part(each)), None
    )
