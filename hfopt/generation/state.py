"""What is left on a model for its requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from hfopt import host
from hfopt.cache.prefix import PrefixCache

from .protocols import StepPrograms
from .speculation import StepCosts

if TYPE_CHECKING:  # it loads Numba
    from hfopt.distributed.ranks import Ranks
    from hfopt.distributed.ring import Ring

_ATTRIBUTE = "_hfopt_generation"  # of an optimized model


class Verdict(NamedTuple):
    """What the proof of a whole model says of its requests.

    refusal: why they run in transformers' own loops, over its own cache. obstacle: why their steps are none that a program
    could take. Both in words, or None.
    """

    refusal: str | None = None
    obstacle: str | None = None


UNKNOWN = Verdict()


@dataclass(frozen=True)
class Installed:
    """What requests of a model find on it, and copies and pickles of the model have too.

    programs: that prompts and decode steps are taken from, None if modules make them. kv_cache: of the caches that requests
    get. verdict: on this model. lookup: how requests guess tokens that say nothing of it. prefix_cache: that they take
    beginnings of prompts from. ranks: the processes that make requests together, with parts of the model or a whole one
    each, None if this one is alone. ring: what reads long prompts together. costs: of steps, as far as they are known;
    draft_costs: of those that guess for others.
    """

    programs: StepPrograms | None = None
    kv_cache: str | None = None
    verdict: Verdict = UNKNOWN
    lookup: host.Lookup | None = None
    prefix_cache: PrefixCache | None = None
    ranks: Ranks | None = None
    ring: Ring | None = None
    costs: StepCosts = field(default_factory=StepCosts, compare=False)
    draft_costs: StepCosts = field(default_factory=StepCosts, compare=False)


NOTHING = Installed()


def installed(model: nn.Module) -> Installed:
    """What there is for requests of this model: `NOTHING` unless it is optimised."""
    found: Installed = vars(model).get(_ATTRIBUTE, NOTHING)
    return found


def keep(model: nn.Module, state: Installed) -> None:
    """Leave `state` on the model in place of what is there; `NOTHING` takes that away."""
    vars(model).pop(_ATTRIBUTE, None)
    if state != NOTHING:
        vars(model)[_ATTRIBUTE] = state
