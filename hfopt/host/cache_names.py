"""What the installed transformers calls the cache: among arguments, in the fields of outputs, in a request.

Releases differ (`past_key_values` until 5.23, `cache` from 5.24 on, and names of single families), so the names are read
off signatures and fields. Whatever is annotated as a `Cache` is one; known names serve where nothing is annotated.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import Cache, GenerationMixin, generation
from transformers.modeling_outputs import CausalLMOutputWithPast

# What `generate` returns of greedy search and sampling, and of beam search; None in a release that calls them otherwise.
SampleOutput: Any = getattr(generation, "GenerateDecoderOnlyOutput", None)
BeamOutput: Any = getattr(generation, "GenerateBeamDecoderOnlyOutput", None)

# A name that a release does not use does no harm here.
CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value", "cache_params")


def _is_cache(annotation: Any) -> bool:
    """Whether an annotation speaks of a `Cache`, alone or among others."""
    if isinstance(annotation, str):
        return "Cache" in annotation
    if isinstance(annotation, type):
        return issubclass(annotation, Cache)
    return any(_is_cache(part) for part in typing.get_args(annotation))


def _cache_among(annotations: Mapping[str, Any]) -> str | None:
    """The name of the one cache among these; None if there is none, or if nothing tells which of several it is."""
    annotated = [name for name, annotation in annotations.items() if _is_cache(annotation)]
    known = [name for name in annotations if name in CACHE_NAMES]
    found = annotated or known
    return found[0] if len(found) == 1 else None


@functools.cache
def cache_argument(function: Callable[..., Any]) -> str | None:
    """Name of the argument by which a `forward`, or another function of the host, is given the cache; None without one."""
    parameters = inspect.signature(function).parameters.values()
    return _cache_among({each.name: each.annotation for each in parameters})


@functools.cache
def cache_field(output_class: type) -> str | None:
    """Name of the field of an output class that holds the cache; None without one."""
    return _cache_among({field.name: field.type for field in dataclasses.fields(output_class)})


# Among the keyword arguments that `generate` carries from step to step; None if this release does not tell.
REQUEST_CACHE = cache_argument(GenerationMixin.prepare_inputs_for_generation)


def cache_in(values: Iterable[Any]) -> Cache | None:
    """The first cache among these values, whatever its name is: of arguments that a user gives, or of outputs."""
    return next((value for value in values if isinstance(value, Cache)), None)


def cached_length(cache: Cache | None) -> int | None:
    """Tokens in the cache; 0 without one, and of one that holds nothing but states. None if this release does not tell."""
    if cache is None:
        return 0
    length: Any = getattr(cache, "get_seq_length", None)
    try:
        return None if length is None else int(length())
    except ValueError:
        return 0


def cache_given(arguments: Mapping[str, Any]) -> tuple[str, Cache] | None:
    """Name and value of the cache among keyword arguments, under the name that their giver has for it."""
    return next(((name, value) for name, value in arguments.items() if isinstance(value, Cache)), None)


def knows_causal_output() -> bool:
    """Whether `causal_output` can be made in this release."""
    names = {each.name for each in dataclasses.fields(CausalLMOutputWithPast)}
    return "logits" in names and cache_field(CausalLMOutputWithPast) is not None


def causal_output(logits: Any, cache: Cache) -> Any:
    """The output of a causal language model's `forward`. Raises TypeError where this release has other fields."""
    return _output(CausalLMOutputWithPast, cache, {"logits": logits})


def sample_output(cache: Any, **fields: Any) -> Any:
    """What `generate` returns of greedy search and sampling. Raises TypeError where this release has other fields."""
    return _output(SampleOutput, cache, fields)


def beam_output(cache: Any, **fields: Any) -> Any:
    """What `generate` returns of beam search. Raises TypeError where this release has other fields."""
    return _output(BeamOutput, cache, fields)


def _output(output_class: Any, cache: Any, fields: dict[str, Any]) -> Any:
    name = None if output_class is None else cache_field(output_class)
    if name is None:
        raise TypeError("this release has no such output, or no field for the cache in it")
    return output_class(**fields, **{name: cache})
