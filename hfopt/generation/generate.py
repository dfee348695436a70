"""What a model is given when it is optimised: its own `generate`, with our loops and our cache in it.

`generate` of transformers takes its loop from the class and its cache from the instance. So the loop is
handed over as `custom_generate` in each call, and the rest are attributes and hooks of the instance. The
attributes are `Bound` to functions of this module: a copied model refers to itself, and a
pickled one can be read.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMode

from ..cache import IndirectCache
from ..progress import compile_progress
from ._types import Model
from .beam import beam_search
from .binding import Bound
from .decoding import PROGRAMS
from .inputs import check_counts, check_inputs
from .prompt import share_prompts, unshare_prompts
from .sample import sample

_KV_CACHE = "_hfopt_kv_cache"  # attribute of an optimized model

# mode -> transformers' loop, and ours
_LOOPS: dict[GenerationMode, tuple[str, Callable]] = {
    GenerationMode.GREEDY_SEARCH: ("_sample", sample),
    GenerationMode.SAMPLE: ("_sample", sample),
    GenerationMode.BEAM_SEARCH: ("_beam_search", beam_search),
    GenerationMode.BEAM_SAMPLE: ("_beam_search", beam_search),
}


def generator_of(model: nn.Module) -> Model | None:
    """The outermost part that generates: the model itself, or the one that an adapter is wrapped around."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and isinstance(module, GenerationMixin):
            return module if module.can_generate() else None
    return None


def install(model: Model, programs: Any = None, kv_cache: str | None = None) -> None:
    """Gives `model` our `generate`, our cache and the sharing of prompts; what its class overrides stays.

    programs: a `patches.programs.Programs`, from which decode steps are taken. kv_cache: of the caches that requests get.
    """
    uninstall(model)
    for name, function in _BOUND.items():
        if name not in model.__dict__ and getattr(type(model), name, None) is getattr(GenerationMixin, name):
            setattr(model, name, Bound(function, model, name))
    if programs is not None:
        model.__dict__[PROGRAMS] = programs
    if kv_cache is not None:
        model.__dict__[_KV_CACHE] = kv_cache
    model.register_forward_pre_hook(share_prompts, with_kwargs=True)
    model.register_forward_hook(unshare_prompts, with_kwargs=True)


def uninstall(model: Model) -> None:
    """Undoes `install`, on a copy of the model too; harmless where there is nothing to undo."""
    for name, function in _BOUND.items():
        bound = model.__dict__.get(name)
        if isinstance(bound, Bound) and bound.function is function:
            delattr(model, name)
    model.__dict__.pop(PROGRAMS, None)
    model.__dict__.pop(_KV_CACHE, None)
    # found by function: the handles of a copied or unpickled model are not ours
    for hooks, flags, function in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs, share_prompts),
        (model._forward_hooks, model._forward_hooks_with_kwargs, unshare_prompts),
    ):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
            flags.pop(key, None)


def kv_cache_of(model: Model) -> str | None:
    """`kv_cache` of the caches that requests of this model get."""
    kind: str | None = model.__dict__.get(_KV_CACHE)
    return kind


def cache_obstacle(model: Model) -> str | None:
    """In words, why requests of this model get transformers' own cache; None if they get ours."""
    if not isinstance(model.__dict__.get("_prepare_cache_for_generation"), Bound):
        return "its class prepares caches of its own"
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return "not all of its layers have full attention"
    return None


def generate(
    model: Model,
    inputs: Any = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Any = None,
    synced_gpus: bool | None = None,
    assistant_model: Any = None,
    streamer: Any = None,
    negative_prompt_ids: Any = None,
    negative_prompt_attention_mask: Any = None,
    custom_generate: Any = None,
    **kwargs: Any,
) -> Any:
    """`GenerationMixin.generate`: same arguments, same results.

    Greedy search, sampling, beam search and beam sampling run in our loops, all else in transformers' own.

    Raises InvalidInput for a prompt that the model cannot read.
    """
    # an assistant is called for a few tokens at a time, with prompts that have been looked at
    assists = generation_config is not None and generation_config.is_assistant
    if custom_generate is None and not assists and kwargs.get("cache_implementation") != "paged":
        check_inputs(model, {**kwargs, "inputs": inputs, "generation_config": generation_config})
        custom_generate = _loop(model, generation_config, synced_gpus, assistant_model, streamer, kwargs)
    with compile_progress():
        return type(model).generate(
            model,
            inputs,
            generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            synced_gpus=synced_gpus,
            assistant_model=assistant_model,
            streamer=streamer,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            custom_generate=custom_generate,
            **kwargs,
        )


def prepare_cache(
    model: Model,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    """`_prepare_cache_for_generation`, with an IndirectCache in place of a DynamicCache of plain layers."""
    given = model_kwargs.get("past_key_values")
    type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    made = model_kwargs.get("past_key_values")
    if given is not None or type(made) is not DynamicCache or made.offloading:
        return
    if not made.layers or any(type(layer) is not DynamicLayer for layer in made.layers):
        return
    copies = int(max(generation_config.num_beams, generation_config.num_return_sequences))
    config = model.config.get_text_config(decoder=True)
    cache = IndirectCache(config, copies=copies, kv_cache=kv_cache_of(model))
    if generation_config.is_assistant:
        cache.activate_past_recording()
    model_kwargs["past_key_values"] = cache


def _loop(
    model: Model,
    generation_config: GenerationConfig | None,
    synced_gpus: bool | None,
    assistant_model: Any,
    streamer: Any,
    kwargs: dict[str, Any],
) -> Callable | None:
    """Our loop for this call, or None where transformers' own has to run."""
    if synced_gpus or assistant_model is not None or kwargs.get("assistant_tokenizer") is not None:
        return None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    if model.config.is_encoder_decoder or not hasattr(model, "_prefill"):
        return None
    if model.device.type not in ("cpu", "meta"):
        return None
    prepared, _ = model._prepare_generation_config(generation_config, **kwargs)
    check_counts(prepared.num_beams, prepared.num_return_sequences)
    if prepared.compile_config is not None or prepared.low_memory:
        return None
    if prepared.stop_strings is not None or prepared.token_healing:
        return None  # `generate` keeps the tokenizer that these need for its own loops
    name, loop = _LOOPS.get(prepared.get_generation_mode(assistant_model), ("", None))
    if loop is None or getattr(type(model), name) is not getattr(GenerationMixin, name):
        return None
    if streamer is None:
        return loop
    # `generate` hands a streamer to its own loops only, and beam search refuses one
    return functools.partial(loop, streamer=streamer) if loop is sample else None


_BOUND: dict[str, Callable] = {"generate": generate, "_prepare_cache_for_generation": prepare_cache}
