"""The loops as functions, for `generate(custom_generate=...)` of any model, optimised or not."""

from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer

from hfopt import host
from hfopt.errors import InvalidInput

from ._types import Ids, Model, Outputs
from .plan import prepared_plan
from .restart import Rollback, Unfit


def hf_greedy_search(
    model: Model,
    input_ids: Ids,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Outputs:
    """Greedy search: the most likely token of each row, step by step.

    For `model.generate(..., custom_generate=hf_greedy_search)`, which prepares all arguments; results are those of
    transformers' own loop. A prompt that is repeated, for beams or for several sequences, is read once. A streamer has to be
    bound (`functools.partial(hf_greedy_search, streamer=streamer)`), because `generate` drops it, and an assistant, beside
    `custom_generate`.

    input_ids: int64 [rows, length]. Raises `InvalidInput` if the configuration asks for another way to choose tokens. Where
    our loop does not fit (another release, an encoder, a model that is not on the CPU), transformers' own runs.

    Example:
        >>> import hfopt, torch
        >>> from transformers import AutoModelForCausalLM
        >>> from hfopt.generation import hf_greedy_search
        >>> model = AutoModelForCausalLM.from_pretrained(hfopt.embedded_model())
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model.generate(ids, custom_generate=hf_greedy_search, max_new_tokens=2, do_sample=False).shape
        torch.Size([1, 5])
    """
    arguments = input_ids, logits_processor, stopping_criteria, generation_config
    return _run("hf_greedy_search", ("GREEDY_SEARCH",), model, *arguments, streamer, model_kwargs)


def hf_sample(
    model: Model,
    input_ids: Ids,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Outputs:
    """Sampling: a token of each row by its probability, step by step; greedy search with `do_sample=False`.

    As `hf_greedy_search`, with the random numbers of transformers' own loop. A prompt with `num_return_sequences` is read
    once.

    Example:
        >>> import hfopt, torch
        >>> from transformers import AutoModelForCausalLM
        >>> from hfopt.generation import hf_sample
        >>> model = AutoModelForCausalLM.from_pretrained(hfopt.embedded_model())
        >>> ids, options = torch.tensor([[1, 2, 3]]), {"do_sample": True, "num_return_sequences": 4}
        >>> model.generate(ids, custom_generate=hf_sample, max_new_tokens=2, min_new_tokens=2, **options).shape
        torch.Size([4, 5])
    """
    arguments = input_ids, logits_processor, stopping_criteria, generation_config
    return _run("hf_sample", ("SAMPLE", "GREEDY_SEARCH"), model, *arguments, streamer, model_kwargs)


def hf_beam_search(
    model: Model,
    input_ids: Ids,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Outputs:
    """Beam search; beam sampling with `do_sample=True`.

    As `hf_greedy_search`; `num_beams` has to be above 1, and the prompt is read once for all beams.

    Example:
        >>> import hfopt, torch
        >>> from transformers import AutoModelForCausalLM
        >>> from hfopt.generation import hf_beam_search
        >>> model = AutoModelForCausalLM.from_pretrained(hfopt.embedded_model())
        >>> ids, options = torch.tensor([[1, 2, 3]]), {"do_sample": False, "num_beams": 4}
        >>> model.generate(ids, custom_generate=hf_beam_search, max_new_tokens=2, min_new_tokens=2, **options).shape
        torch.Size([1, 5])
    """
    arguments = input_ids, logits_processor, stopping_criteria, generation_config
    return _run("hf_beam_search", ("BEAM_SEARCH", "BEAM_SAMPLE"), model, *arguments, None, model_kwargs)


def hf_beam_sample(
    model: Model,
    input_ids: Ids,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Outputs:
    """Beam search in which continuations are drawn instead of chosen.

    As `hf_beam_search`, with the random numbers of transformers' own loop; `do_sample` has to be True.

    Example:
        >>> import hfopt, torch
        >>> from transformers import AutoModelForCausalLM
        >>> from hfopt.generation import hf_beam_sample
        >>> model = AutoModelForCausalLM.from_pretrained(hfopt.embedded_model())
        >>> ids, options = torch.tensor([[1, 2, 3]]), {"do_sample": True, "num_beams": 4}
        >>> model.generate(ids, custom_generate=hf_beam_sample, max_new_tokens=2, min_new_tokens=2, **options).shape
        torch.Size([1, 5])
    """
    arguments = input_ids, logits_processor, stopping_criteria, generation_config
    return _run("hf_beam_sample", ("BEAM_SAMPLE",), model, *arguments, None, model_kwargs)


def _run(
    name: str,
    modes: tuple[str, ...],
    model: Model,
    input_ids: Ids,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> Outputs:
    """A prepared request in our loop, or in transformers' own where ours does not fit."""
    mode = generation_config.get_generation_mode()
    if mode.name not in modes:
        settings = f"do_sample={generation_config.do_sample}, num_beams={generation_config.num_beams}"
        raise InvalidInput(f"{name}: {settings} asks for {mode.value}, which it does not do")
    arguments = input_ids, logits_processor, stopping_criteria, generation_config
    streamed: dict[str, Any] = {} if streamer is None else {"streamer": streamer}
    if streamer is not None:  # as `generate` does with one of its own
        streamer.put(input_ids.cpu())
    loop = prepared_plan(model, generation_config).loop
    if loop is not None:
        rollback = Rollback(host.cache_in(model_kwargs.values()))
        try:
            return loop(model, *arguments, **streamed, **model_kwargs)
        except Unfit as reason:
            rollback.undo(reason)
    theirs: Callable[..., Any] = getattr(type(model), str(host.loop_of(mode)))
    return theirs(model, *arguments, **streamed, **model_kwargs)
