"""What hfopt reads of transformers' `generate`: its modes and loops, and the methods that prepare a step."""

import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode, logits_process, stopping_criteria
from transformers.generation import utils as _utils
from transformers.modeling_outputs import CausalLMOutputWithPast

from hfopt.host.cache_layer import DynamicLayer, WindowedLayer
from hfopt.host.cache_names import BeamOutput, SampleOutput, cache_argument
from hfopt.host.release import installed

CRITERIA = "_get_stopping_criteria"
HEAL = "heal_tokens"
PREFILL = "_prefill"
PREPARE_CACHE = "_prepare_cache_for_generation"
PREPARE_CONFIG = "_prepare_generation_config"
REORDER = "_reorder_cache"  # of a few models, in place of the cache's own method
UPDATE = "_update_model_kwargs_for_generation"
PREPARING = ("prepare_inputs_for_generation", UPDATE)  # of each step
TOKENIZER = "tokenizer"  # an argument of `generate`, and of the first two
# methods that our loops call as transformers' do, through the model
_SHARED = frozenset({"generate", PREFILL, PREPARE_CACHE, PREPARE_CONFIG, REORDER, *PREPARING})
# fields of a configuration that our loops read too, or that only decide what is compiled
_HONOURED = frozenset(
    {
        "compile_config", "disable_compile", "do_sample", "early_stopping", "eos_token_id", "is_assistant", "length_penalty",
        "low_memory", "max_length", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
        "output_logits", "output_scores", "return_dict_in_generate", "use_cache",
    }
)  # fmt: skip

# In words, and the loop of those releases that have no table of their own.
_MODES = {
    "GREEDY_SEARCH": ("greedy search", "_sample"),
    "SAMPLE": ("sampling", "_sample"),
    "BEAM_SEARCH": ("beam search", "_beam_search"),
    "BEAM_SAMPLE": ("beam sampling", "_beam_search"),
}
_LOOPS: dict[Any, str] = getattr(_utils, "GENERATION_MODES_MAPPING", {})

# mode -> what it is called in reports; those that this release does not have are left out
MODES: dict[Any, str] = {
    getattr(GenerationMode, name): words
    for name, (words, _) in _MODES.items()
    if hasattr(GenerationMode, name)
}


class Lookup(NamedTuple):
    """Guesses from the text: at most so many tokens at once, behind n-grams of at most so many tokens."""

    most: int
    longest: int


# settings of other ways to guess tokens, or of one that changes them
_OTHER_GUESSES = "assistant_early_exit", "assistant_ensemble_weight", "speculation_type", "use_mtp"


def lookup_in(settings: Any) -> Lookup | None:
    """What a generation config asks for if next tokens are to be guessed from the text, and in no other way."""
    most = getattr(settings, "prompt_lookup_num_tokens", None)
    if not isinstance(most, int) or most < 1 or _guesses_otherwise(settings):
        return None
    longest = getattr(settings, "max_matching_ngram_size", None) or 2
    return Lookup(most, longest) if isinstance(longest, int) and longest > 0 else None


def _guesses_otherwise(settings: Any) -> bool:
    return any(getattr(settings, name, None) is not None for name in _OTHER_GUESSES)


def takes_draft(settings: Any, model: Any, assistant: Any) -> bool:
    """Whether a request with this generation config lets an assistant do no more than guess tokens of the model's own
    vocabulary, from the text, in a cache of its own.
    """
    if _guesses_otherwise(settings) or lookup_in(settings) is not None or not settings.use_cache:
        return False
    if cache_argument(type(assistant).forward) is None:
        return False
    sizes = (each.config.get_text_config(decoder=True).vocab_size for each in (model, assistant))
    return len(set(sizes)) == 1


def vocabulary(model: Any) -> int:
    """Tokens that a model has embeddings of, all processes together that have parts of it."""
    embedding = model.get_input_embeddings()
    part = vars(embedding).get("shard")
    return int(embedding.weight.shape[0] if part is None else part.n)


def prompt_inputs(
    forward: Callable[..., Any], input_ids: Any, mask: Any, positions: Any, cache: Any
) -> dict[str, Any]:
    """Arguments of this unbound `forward` for a prompt whose last logits are wanted, as `generate` gives them."""
    inputs = {"input_ids": input_ids, "attention_mask": mask, str(cache_argument(forward)): cache}
    inputs |= {"use_cache": True, "return_dict": True}
    others = {"position_ids": positions, "logits_to_keep": 1}
    taken = inspect.signature(forward).parameters
    return inputs | {name: value for name, value in others.items() if name in taken}


def mode_without_guesses(settings: Any) -> Any:
    """The mode of a request with one row a prompt, if none of its tokens is guessed."""
    return getattr(GenerationMode, "SAMPLE" if settings.do_sample else "GREEDY_SEARCH", None)


def loop_of(mode: Any) -> str | None:
    """Name of the method of GenerationMixin that runs this mode; None where this release does not tell."""
    name = _LOOPS.get(mode) or _MODES.get(getattr(mode, "name", ""), ("", None))[1]
    return name if isinstance(name, str) and hasattr(GenerationMixin, name) else None


_PARAMETERS = [
    each for each in inspect.signature(GenerationMixin.generate).parameters.values() if each.name != "self"
]
# the named arguments of `generate`, and what it calls the rest of them
GENERATE_ORDER = tuple(each.name for each in _PARAMETERS if each.kind is not each.VAR_KEYWORD)
_OTHERS = next((each.name for each in _PARAMETERS if each.kind is each.VAR_KEYWORD), "")


def generate_arguments(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `generate` by name. Raises TypeError as the call would."""
    bound = inspect.signature(GenerationMixin.generate).bind(model, *args, **kwargs)
    (_, *named) = bound.arguments.items()
    given = dict(named)
    return {**given.pop(_OTHERS, {}), **given}


def missing() -> str | None:
    """In words, what this release lacks that our loops are built on; None if nothing."""
    needed = (PREFILL, PREPARE_CACHE, PREPARE_CONFIG, *PREPARING)
    lacking = [name for name in needed if not hasattr(GenerationMixin, name)]
    return f"it has no {', '.join(lacking)}" if lacking else None


def sorts_samples() -> bool:
    """Whether beam sampling puts the candidates that it has drawn in order, best first (transformers 5.24 does)."""
    method = getattr(GenerationMixin, "_get_top_k_continuations", None)
    return method is not None and "sort" in names_read(method)


@functools.cache
def names_read(function: Callable[..., Any]) -> frozenset[str]:
    """Names of globals and attributes, and strings (of `getattr`), in a function's code and in that of its decorators."""
    strings = (each for code in _codes(function) for each in code.co_consts if isinstance(each, str))
    return frozenset((*(name for code in _codes(function) for name in code.co_names), *strings))


def _codes(function: Callable[..., Any]) -> Iterator[types.CodeType]:
    todo = []
    layer: Any = function
    while layer is not None:
        todo += [layer.__code__] if isinstance(layer, types.FunctionType) else []
        layer = getattr(layer, "__wrapped__", None)
    while todo:
        code = todo.pop()
        yield code
        todo += [each for each in code.co_consts if isinstance(each, types.CodeType)]


# What decides whether a loop of ours gives what transformers' gives: changed by an upgrade, or by whoever patches it.
_CLASSES = (
    GenerationMixin,
    *(kind for kind in (BeamOutput, SampleOutput) if kind is not None),
    CausalLMOutputWithPast,
    DynamicCache,
    DynamicLayer,
    WindowedLayer,
    *DynamicCache.__mro__[1:-1],
    *DynamicLayer.__mro__[1:-1],
    *(
        value
        for module in (stopping_criteria, logits_process)
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ),
)


def methods() -> tuple[Any, ...]:
    """The functions of the classes that loops and caches depend on, as they are now."""
    kinds = GenerationMixin, DynamicCache, DynamicLayer, WindowedLayer
    return tuple(value for kind in kinds for value in vars(kind).values())


_read: dict[str, tuple[tuple[Any, ...], frozenset[str]]] = {}


def _names_in(loop: str) -> frozenset[str]:
    """Names in the code of a loop of GenerationMixin, and of the methods that it calls but for `_SHARED`; as it is now."""
    now = methods()
    known = _read.get(loop)
    if known is None or known[0] != now:
        names, waiting, theirs = {loop}, [loop], vars(GenerationMixin)
        while waiting:
            name = waiting.pop()
            function = getattr(theirs[name], "__func__", theirs[name])
            found = names_read(function) - names if callable(function) else frozenset()
            waiting += (found & theirs.keys()) - _SHARED
            names |= found
        known = _read[loop] = now, frozenset(names)
    return known[1]


def overridden(model: Any, loop: str) -> str | None:
    """The first method that a loop of GenerationMixin calls and that this model, or its class, has something else for."""
    names = (_names_in(loop) & vars(GenerationMixin).keys()) - _SHARED
    kind, state = type(model), vars(model)
    return next(
        (
            name
            for name in sorted(names)
            if name in state or getattr(kind, name) is not getattr(GenerationMixin, name)
        ),
        None,
    )


def unknown_option(config: Any, loop: str) -> str | None:
    """The first field of a generation config that has a value and that a loop of GenerationMixin reads, but none of ours."""
    state = vars(config)
    names = (_names_in(loop) & state.keys()) - _HONOURED
    return next(
        (each for each in sorted(names) if not each.startswith("_") and state[each] is not None), None
    )


def settings_in(prepared: Any) -> Any:
    """The generation config in what `PREPARE_CONFIG` gives; None if there is none."""
    parts = prepared if isinstance(prepared, tuple) else (prepared,)
    return next((each for each in parts if isinstance(each, GenerationConfig)), None)


def fingerprint() -> str:
    """Hash of the installed release and of the code that loops and caches depend on."""
    digest = hashlib.sha256(installed().encode())
    for kind in dict.fromkeys(_CLASSES):
        digest.update(repr((kind.__qualname__, sorted(getattr(kind, "__dataclass_fields__", ())))).encode())
        for name, value in sorted(vars(kind).items()):
            function = getattr(value, "__func__", value)
            if isinstance(function, property):
                function = function.fget
            for code in _codes(function) if callable(function) else ():
                constants = [each for each in code.co_consts if isinstance(each, (str, int, float, tuple))]
                digest.update(repr((name, code.co_code, code.co_names, constants)).encode())
    return digest.hexdigest()
