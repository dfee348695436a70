"""What a model is given when it is optimised: its own `generate`, with our loops and our cache in it.

`generate` of transformers takes its loop from the class and its cache from the instance. So the loop is
handed over as `custom_generate` in each call, and the rest are attributes and hooks of the instance. The
attributes are `Bound` to functions of this module: a copied model refers to itself, and a
pickled one can be read.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin

from hfopt import host
from hfopt.cache import IndirectCache, PrefixCache
from hfopt.cache.prefix_state import obstacle
from hfopt.errors import InvalidInput
from hfopt.progress import compile_progress

from ._types import Model
from .agreement import one_request
from .binding import Bound
from .inputs import check_inputs
from .plan import our_cache, plan_of, takes_our_cache, their_plan
from .prefixes import request
from .prompt import share_prompts, unshare_prompts
from .restart import Resumed, Rollback, Unfit
from .state import NOTHING, Installed, installed, keep
from .tokenizer import heal, stopping_criteria, tokenizer_of

logger = logging.getLogger(__name__)


def install(model: Model, state: Installed = NOTHING) -> None:
    """Gives `model` our `generate`, our cache and the sharing of prompts; what its class overrides stays.

    state: what its requests find on it.
    """
    uninstall(model)
    keep(model, state)
    for name, function in _BOUND.items():
        theirs = getattr(GenerationMixin, name, None)
        if theirs is not None and name not in model.__dict__ and getattr(type(model), name, None) is theirs:
            setattr(model, name, Bound(function, model, name))
    model.register_forward_pre_hook(share_prompts, with_kwargs=True)
    model.register_forward_hook(unshare_prompts, with_kwargs=True)


def uninstall(model: Model) -> None:
    """Undoes `install`, on a copy of the model too; harmless where there is nothing to undo."""
    for name, function in _BOUND.items():
        bound = model.__dict__.get(name)
        if isinstance(bound, Bound) and bound.function is function:
            delattr(model, name)
    keep(model, NOTHING)
    # found by function: the handles of a copied or unpickled model are not ours
    for hooks, flags, function in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs, share_prompts),
        (model._forward_hooks, model._forward_hooks_with_kwargs, unshare_prompts),
    ):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
            flags.pop(key, None)


def is_installed(model: Model) -> bool:
    """Whether `generate` of this model is ours."""
    bound = vars(model).get("generate")
    return isinstance(bound, Bound) and bound.function is generate


def cache_obstacle(model: Model) -> str | None:
    """In words, why requests of this model get transformers' own cache; None if they get ours."""
    if (refusal := installed(model).verdict.refusal) is not None:
        return refusal
    if not isinstance(model.__dict__.get(host.PREPARE_CACHE), Bound):
        return "its class prepares caches of its own"
    if None in host.windows_of(model.config):
        return "not all of its layers have full attention or that of a window"
    return None


def window_of(model: Model) -> int | None:
    """Tokens of the shortest window of a layer; None if the model is made for no text that is longer."""
    window = min((each for each in host.windows_of(model.config) if each is not None), default=0)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return window if isinstance(longest, int) and 0 < window < longest else None


def generate(model: Model, *args: Any, **kwargs: Any) -> Any:
    """`generate` of transformers: same arguments, same results.

    Greedy search, sampling, beam search and beam sampling run in our loops, all else in transformers' own. prefix_cache: a
    `PrefixCache`, in place of that of the model, for requests in our loops.

    Raises InvalidInput for a prompt that the model cannot read, and HostError if transformers does what hfopt is not built
    for when some tokens have been given out.
    """
    if args:
        kwargs = host.generate_arguments(model, args, kwargs)
    prefix_cache = kwargs.pop("prefix_cache", None)
    check_prefix_cache(model, prefix_cache)
    prefix_cache = prefix_cache or installed(model).prefix_cache
    if torch.is_autocast_enabled("cpu"):
        logger.warning(
            "The request runs under torch.autocast, and so in transformers' own code: leave that out, and load the model "
            "in the dtype that you want."
        )
    generation_config = kwargs.get("generation_config")
    # an assistant is called for a few tokens at a time, with prompts that have been looked at
    assists = getattr(generation_config, "is_assistant", False)
    if kwargs.get("custom_generate") is not None or assists or kwargs.get("cache_implementation") == "paged":
        plan = their_plan(model)
    else:
        check_inputs(model, kwargs)
        plan = plan_of(model, kwargs)
    has_own_cache = host.cache_in(kwargs.values()) is None
    with (
        one_request(model, kwargs),
        compile_progress(),
        tokenizer_of(kwargs),
        request(prefix_cache, has_own_cache=has_own_cache),
    ):
        if plan.loop is None:
            with our_cache(plan.takes_our_cache):
                return type(model).generate(model, **kwargs)
        guessing = plan.guessing()
        return run(functools.partial(plan.loop, **guessing) if guessing else plan.loop, model, kwargs)


def check_prefix_cache(model: Model, given: Any) -> None:
    """Raises InvalidInput unless this is None or a PrefixCache for this model, which may be none that generates."""
    if given is None:
        return
    if not isinstance(given, PrefixCache):
        raise InvalidInput(f"prefix_cache is a {type(given).__name__}: a hfopt.PrefixCache is needed")
    if given.model is not model:
        raise InvalidInput(f"prefix_cache is for another model than this {type(model).__name__}")


def prefix_obstacle(model: Model) -> str | None:
    """In words, why no beginnings of prompts are kept for this model; None if they are."""
    return cache_obstacle(model) or obstacle(model)


def run_in(loop: Callable[..., Any], model: Model, arguments: Mapping[str, Any]) -> Any:
    """A request, with the arguments of `generate` by name, in a loop of ours; raises Unfit if that cannot go on."""
    streamer = arguments.get("streamer")
    if streamer is not None:  # `generate` hands it to its own loops only
        loop = functools.partial(loop, streamer=streamer)
    with our_cache(True):
        return type(model).generate(model, **{**arguments, "custom_generate": loop})


def run(loop: Callable[..., Any], model: Model, arguments: dict[str, Any]) -> Any:
    """`run_in`, or, where the loop finds behind the prompt that it is not fit for the request, anew in transformers' own."""
    rollback = Rollback(host.cache_in(arguments.values()))
    try:
        return run_in(loop, model, arguments)
    except Unfit as reason:
        rollback.undo(reason)
        logger.warning("The request runs in transformers' own loop: %s.", reason)
    if (streamer := arguments.get("streamer")) is not None:
        arguments = {**arguments, "streamer": Resumed(streamer)}
    with our_cache(False):
        return type(model).generate(model, **arguments)


def prepare_cache(model: Model, *args: Any, **kwargs: Any) -> Any:
    """The method of GenerationMixin that makes a request's cache, with an IndirectCache in place of a DynamicCache of
    layers that have one of ours."""
    name, given = host.REQUEST_CACHE, (*args, *kwargs.values())
    # by type, because they may be given in another order than today's
    config = next((each for each in given if isinstance(each, GenerationConfig)), None)
    request = next((each for each in given if isinstance(each, dict)), None)
    had_cache = request is not None and request.get(name) is not None
    result = getattr(type(model), host.PREPARE_CACHE)(model, *args, **kwargs)
    if name is None or config is None or request is None or had_cache or not takes_our_cache():
        return result
    made = request.get(name)
    if type(made) is DynamicCache and not made.offloading and _is_ours(made):
        cache = request[name] = IndirectCache(
            model.config.get_text_config(decoder=True),
            copies=int(max(config.num_beams, config.num_return_sequences)),
            kv_cache=installed(model).kv_cache,
            max_length=config.max_length,
        )
        if config.is_assistant:
            cache.activate_past_recording()
    return result


def _is_ours(cache: DynamicCache) -> bool:
    """Whether all layers have full attention or that of a window, and nothing else to remember."""
    layers = host.holding(cache.layers)
    return bool(layers) and all(host.window_of(layer) is not None for layer in layers)


_BOUND: dict[str, Callable] = {
    "generate": generate,
    host.PREPARE_CACHE: prepare_cache,
    host.CRITERIA: stopping_criteria,
    host.HEAL: heal,
}
