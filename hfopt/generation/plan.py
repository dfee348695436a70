"""How a request is run: in whose loop, and over whose cache."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from hfopt import host
from hfopt.cache import IndirectCache
from hfopt.errors import InvalidInput

from ._types import Model
from .beam import beam_search
from .conditions import obstacle
from .inputs import check_counts
from .proof import OTHER_LOOPS, refusals
from .sample import sample
from .state import installed
from .tokenizer import is_given_tokenizer

# loop of transformers -> ours
_LOOPS: dict[str, Callable[..., Any]] = {"_sample": sample, "_beam_search": beam_search}

# settings that our loops leave to transformers'
_THEIRS = ("compile_config", "low_memory")
# settings for which `generate` reads a tokenizer, and the method that it hands it to
_OF_TEXT = {"stop_strings": host.CRITERIA, "token_healing": host.HEAL}

# what a model guesses whose requests do not say
_LOOKUP = host.Lookup(15, 3)

# of the request that runs in this thread: whether it may get a cache of ours
_takes_our_cache: ContextVar[bool] = ContextVar("hfopt_takes_our_cache", default=True)


def lookup_of(speculation: str | None) -> host.Lookup | None:
    """What this argument of `optimize` asks for. Raises InvalidInput."""
    if speculation not in (None, "lookup"):
        raise InvalidInput(f"speculation is {speculation!r}: None or 'lookup' is needed")
    return None if speculation is None else _LOOKUP


class Plan(NamedTuple):
    """loop: ours, or None for transformers' own. takes_our_cache: whether the request may get a cache of ours. lookup: how
    it guesses tokens. draft: the model that guesses them.
    """

    loop: Callable[..., Any] | None
    takes_our_cache: bool
    lookup: host.Lookup | None = None
    draft: Model | None = None

    def guessing(self) -> dict[str, Any]:
        """What its loop is given besides the arguments of transformers' own."""
        given = {"lookup": self.lookup, "draft": self.draft}
        return {name: value for name, value in given.items() if value is not None}


def their_plan(model: Model) -> Plan:
    """The plan for modes that we have no loop for."""
    return Plan(None, OTHER_LOOPS not in refusals() and installed(model).verdict.refusal is None)


def plan_of(model: Model, arguments: Mapping[str, Any]) -> Plan:
    """The plan for a call of `generate` with these arguments, by name. Raises InvalidInput for impossible counts."""
    if installed(model).verdict.refusal is not None:
        return Plan(None, False)
    names = ("synced_gpus", "assistant_model", "streamer", "generation_config")
    synced_gpus, assistant_model, streamer, generation_config = (arguments.get(name) for name in names)
    if synced_gpus or arguments.get("assistant_tokenizer") is not None:
        return their_plan(model)
    if _is_elsewhere(model):
        return their_plan(model)
    others = {name: value for name, value in arguments.items() if name not in host.GENERATE_ORDER}
    prepared = host.settings_in(getattr(model, host.PREPARE_CONFIG)(generation_config, **others))
    if prepared is None:
        return Plan(None, False)
    counts = prepared.num_beams, prepared.num_return_sequences
    check_counts(*(1 if each is None else each for each in counts))
    for setting, method in _OF_TEXT.items():
        if getattr(prepared, setting, None) and not is_given_tokenizer(model, method):
            return their_plan(model)
    plan = prepared_plan(model, prepared)
    if assistant_model is not None and plan.loop is not None:
        given = host.cache_in(arguments.values())
        if not _can_draft(model, assistant_model, plan, prepared, given):
            return their_plan(model)
        return plan._replace(lookup=None, draft=assistant_model)
    if streamer is not None and plan.loop not in (None, sample):
        return their_plan(model)  # which refuses a streamer of beams
    return plan


def _can_draft(model: Model, assistant: Model, plan: Plan, settings: GenerationConfig, cache: Any) -> bool:
    """Whether programs of both models can guess and check the tokens of a request. cache: which it was given, or None."""
    if plan.loop is not sample or not isinstance(cache, IndirectCache | None):
        return False
    return host.takes_draft(settings, model, assistant) and all(map(_has_program, (model, assistant)))


def _has_program(model: Model) -> bool:
    """Whether steps of a request with one row can be a program's."""
    state = installed(model)
    if state.programs is None or obstacle(model) is not None:
        return False
    with torch.no_grad():
        return state.programs.of(model, 1, 1, state.kv_cache) is not None


def prepared_plan(model: Model, settings: GenerationConfig) -> Plan:
    """The plan for a request with these settings, as `generate` has prepared them."""
    if installed(model).verdict.refusal is not None:
        return Plan(None, False)
    mode, lookup = settings.get_generation_mode(), host.lookup_in(settings)
    if lookup is not None and mode not in host.MODES:
        mode = host.mode_without_guesses(settings)
    elif lookup is None:
        lookup = installed(model).lookup
    if _is_elsewhere(model) or mode not in host.MODES:
        return their_plan(model)
    if host.MODES[mode] in refusals():
        return Plan(None, False)
    if any(getattr(settings, name, None) for name in _THEIRS):
        return their_plan(model)
    loop = our_loop(model, mode, settings)
    if loop is None:
        return their_plan(model)
    return Plan(loop, True, lookup if loop is sample else None)


def _is_elsewhere(model: Model) -> bool:
    """Whether this model, or this release, or what runs beside this process, is nothing that our loops are made for."""
    if installed(model).ranks is None and host.keeps_step(model):
        return True
    return bool(host.missing() or model.config.is_encoder_decoder or model.device.type not in ("cpu", "meta"))


def our_loop(model: Model, mode: Any, settings: GenerationConfig | None = None) -> Callable[..., Any] | None:
    """Our loop for this mode; None if this release, or this model's class, has something else in its place, or a method
    that it calls, or if it reads a setting that ours does not know."""
    name = host.loop_of(mode)
    if name is None or host.missing() or host.overridden(model, name) is not None:
        return None
    if settings is not None and host.unknown_option(settings, name) is not None:
        return None
    if host.REQUEST_CACHE is None or host.cache_argument(type(model).forward) is None:
        return None  # what it carries from step to step is no cache
    return _LOOPS.get(name)


@contextmanager
def our_cache(is_taken: bool) -> Iterator[None]:
    """In the block, requests of this thread get a cache of ours, or that of transformers."""
    token = _takes_our_cache.set(is_taken)
    try:
        yield
    finally:
        _takes_our_cache.reset(token)


def takes_our_cache() -> bool:
    """Whether the request that runs in this thread may get a cache of ours."""
    return _takes_our_cache.get()
