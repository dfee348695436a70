"""What `hfopt bench` compares the stock and the optimised model on, and the figures of a comparison."""

import functools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedModel

import hfopt
from hfopt.bench import roofline
from hfopt.console import prompts
from hfopt.host import Config

from .measure import Case, Pair, Sample, paired_ratio

# "first" times the prompt and its first token, "next" every later token
Part = Literal["first", "next"]


@dataclass(frozen=True)
class Workload:
    """`n_rows` prompts of random ids, and the tokens that are generated for each.

    filled: the prompts are not read. Random keys and values stand in the cache for all their tokens, and
    each timed step is a decode step behind them: its cost does not depend on the values. Reading 16 k
    tokens takes the stock model minutes, filling the cache milliseconds, which are not timed.
    kv_cache: of the optimised model's filled cache, as in `IndirectCache`.
    """

    prompt_tokens: int
    new_tokens: int
    n_rows: int = 1
    num_beams: int = 1
    filled: bool = False
    kv_cache: str | None = None


def case_name(optimized: bool, workload: Workload) -> str:
    """Name of the case that measures a workload."""
    kind = f" as {workload.kv_cache}" if optimized and workload.kv_cache is not None else ""
    return (
        f"{'optimized' if optimized else 'stock'}, batch {workload.n_rows}, {workload.num_beams} beams, "
        f"{workload.prompt_tokens} tokens{' filled in' if workload.filled else ''}{kind}"
    )


def cases_of(model: PreTrainedModel, workloads: Iterable[Workload]) -> list[Case]:
    """The cases of each workload, stock and optimised side by side."""
    cases = (_case(model, workload, optimized) for workload in workloads for optimized in (False, True))
    return list({case.name: case for case in cases}.values())


def _case(model: PreTrainedModel, workload: Workload, optimized: bool) -> Case:
    # behind a filled cache there is one token to read, as in every later step
    length = workload.prompt_tokens + workload.filled
    return Case(
        case_name(optimized, workload),
        optimized,
        prompts.random_ids(model, length, workload.n_rows),
        {"do_sample": False, "num_beams": workload.num_beams, "max_new_tokens": workload.new_tokens},
        functools.partial(filled_cache, model, workload, optimized) if workload.filled else None,
    )


def filled_cache(model: PreTrainedModel, workload: Workload, optimized: bool) -> DynamicCache:
    """A cache as if the prompts had been read, of the kind that `generate` makes; the same values for both.

    As in `generate`, the stock model's has a copy of the prompt for each beam.
    """
    config = model.config.get_text_config(decoder=True)
    n_layers, _, n_kv_heads, head_dim = roofline.attention_shape(model)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(
        (2, workload.n_rows, n_kv_heads, workload.prompt_tokens, head_dim), generator=generator
    ).to(model.dtype)
    if optimized:
        cache: DynamicCache = hfopt.IndirectCache(
            config, copies=workload.num_beams, kv_cache=workload.kv_cache
        )
    else:
        cache = DynamicCache(config=config)
        states = states.repeat_interleave(workload.num_beams, dim=1)
    with torch.no_grad():
        for layer_idx in range(n_layers):
            cache.update(states[0], states[1], layer_idx)
    return cache


def has_positions(config: Config, workload: Workload) -> bool:
    """Whether a model of this configuration has positions for all tokens of a workload."""
    n_tokens = workload.prompt_tokens + workload.filled + workload.new_tokens
    text_config = config.get_text_config(decoder=True)
    return n_tokens <= getattr(text_config, "max_position_embeddings", n_tokens)


def seconds_of(samples: Sequence[Sample], part: Part) -> list[float]:
    """One figure a repetition: the first token's time, or the median of the later ones'."""
    return [sample.first if part == "first" else statistics.median(sample.next) for sample in samples]


def bytes_of(model: PreTrainedModel, workload: Workload, part: Part, optimized: bool = True) -> float:
    """Bytes that must pass through memory at least: the weights, and the keys and values of all tokens."""
    kv_cache = workload.kv_cache if optimized else None
    n_rows, prompt_tokens = workload.n_rows, workload.prompt_tokens
    if part == "first":
        return roofline.bytes_per_step(model, n_rows, prompt_tokens, n_rows, 0, kv_cache)
    n_copies = n_rows * workload.num_beams
    return roofline.bytes_per_step(model, n_rows, prompt_tokens, n_copies, workload.new_tokens, kv_cache)


def operations_of(model: PreTrainedModel, workload: Workload, part: Part) -> float:
    """Operations that must be done at least; beams read their prompt once."""
    if part == "first":
        return roofline.prefill_operations(model, workload.n_rows, workload.prompt_tokens)
    length = workload.prompt_tokens + workload.new_tokens / 2
    return roofline.step_operations(model, workload.n_rows * workload.num_beams, length)


def compared(
    pair: Pair, workload: Workload, part: Part, samples: dict[str, list[Sample]], rates: tuple[float, float]
) -> dict[str, Any]:
    """The figures of both models. Seconds are medians over the repetitions, `ratio` that of neighbours' ratios.

    `limit` is the share of what the machine could do in the same minute: of the measured bandwidth for
    decoding, of `rates`, operations a second of the stock and of the optimised model, for reading prompts.
    """
    figures: dict[str, Any] = {}
    models = (("stock", pair.stock, rates[0]), ("optimized", pair.optimized, rates[1]))
    for optimized, (who, model, rate) in enumerate(models):
        chosen = samples[case_name(bool(optimized), workload)]
        seconds = seconds_of(chosen, part)
        figures[who] = {"seconds": statistics.median(seconds)}
        if part == "next":
            needed = bytes_of(model, workload, part, bool(optimized))
            shares = [needed / (one.bandwidth * time) for one, time in zip(chosen, seconds, strict=True)]
            figures[who]["limit"] = statistics.median(shares)
        else:
            operations = operations_of(model, workload, part)
            figures[who]["limit"] = operations / statistics.median(seconds) / rate
            n_tokens = workload.n_rows * workload.prompt_tokens
            figures[who]["tokens_per_second"] = n_tokens / statistics.median(seconds)
    stock, ours = (seconds_of(samples[case_name(who, workload)], part) for who in (False, True))
    figures["ratio"] = paired_ratio(stock, ours)
    return figures


def cells_of(figures: dict[str, Any]) -> list[str]:
    """The cells of a table: stock, optimised, ratio, shares of the limit."""
    stock, optimized = figures["stock"], figures["optimized"]
    return [
        _milliseconds(stock["seconds"]),
        _milliseconds(optimized["seconds"]),
        f"{figures['ratio']:.2f} ×",
        f"{stock['limit']:.0%} / {optimized['limit']:.0%}",
    ]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{1 if seconds >= 0.01 else 2}f} ms"
