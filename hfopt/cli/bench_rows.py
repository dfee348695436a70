"""The rows of `hfopt bench`: what each one measures, and its figures from the samples."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from hfopt import limits

from . import prompts
from .measure import Case, Sample, paired_ratio


@dataclass(frozen=True)
class Row:
    """One line of the table.

    part: "first" times the prompt and its first token, "next" every later token.
    num_beams above 1: the figure is the time with beams over that of greedy search, at most `wanted`;
    else it is the stock model's time over the optimised one's, at least `wanted`.
    """

    title: str
    small: bool
    dtype: torch.dtype
    part: Literal["first", "next"]
    wanted: float
    n_rows: int = 1
    num_beams: int = 1


_BF16, _F32 = torch.bfloat16, torch.float32

ROWS: dict[str, Row] = {
    "decode-bf16": Row("decode bfloat16, batch 1", False, _BF16, "next", 1.8),
    "prefill-bf16": Row("prefill bfloat16", False, _BF16, "first", 1.0),
    "beam-first": Row(
        "beam search, 4 beams: first token / greedy's", False, _BF16, "first", 1.1, num_beams=4
    ),
    "beam-next": Row("beam search, 4 beams: next token / greedy's", False, _BF16, "next", 1.25, num_beams=4),
    "decode-f32": Row("decode float32, batch 1", False, _F32, "next", 1.9),
    "decode-f32-b8": Row("decode float32, batch 8", False, _F32, "next", 3.0, n_rows=8),
    "prefill-f32": Row("prefill float32", False, _F32, "first", 1.5),
    "decode-small": Row("decode bfloat16, batch 1, small shape", True, _BF16, "next", 2.0),
}


def case_name(optimized: bool, n_rows: int, num_beams: int) -> str:
    """Name of the case that measures these settings."""
    return f"{'optimized' if optimized else 'stock'}, batch {n_rows}, {num_beams} beams"


def cases_of(rows: Sequence[Row], model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> list[Case]:
    """The cases that rows of one model need, stock and optimised side by side; beams bring greedy along."""
    settings = dict.fromkeys(
        setting for row in rows for setting in ((row.n_rows, 1), (row.n_rows, row.num_beams))
    )
    return [
        Case(
            case_name(optimized, n_rows, num_beams),
            optimized,
            prompts.random_ids(model, prompt_tokens, n_rows),
            {"do_sample": False, "num_beams": num_beams, "max_new_tokens": new_tokens},
        )
        for n_rows, num_beams in settings
        for optimized in (False, True)
    ]


def _seconds(samples: Sequence[Sample], part: Literal["first", "next"]) -> list[float]:
    """One figure a repetition: the first token's time, or the median of the later ones'."""
    return [sample.first if part == "first" else statistics.median(sample.next) for sample in samples]


def figures_of(
    row: Row,
    model: PreTrainedModel,
    samples: dict[str, list[Sample]],
    prompt_tokens: int,
    new_tokens: int,
    rate: float,
) -> dict[str, Any]:
    """The figures of a row. Seconds are medians over the repetitions, ratios medians of ratios of neighbours.

    `limit` is the share of what the machine could do in the same minute: of the measured bandwidth for
    decoding, of `rate`, torch's matrix multiplication in operations a second, for reading prompts.
    """
    figures: dict[str, Any] = {"title": row.title, "wanted": row.wanted}
    for who, optimized in (("stock", False), ("optimized", True)):
        chosen = samples[case_name(optimized, row.n_rows, row.num_beams)]
        seconds = _seconds(chosen, row.part)
        figures[who] = {"seconds": statistics.median(seconds)}
        if row.num_beams > 1:
            greedy = _seconds(samples[case_name(optimized, row.n_rows, 1)], row.part)
            figures[who]["ratio"] = paired_ratio(seconds, greedy)
        elif row.part == "next":
            needed = limits.bytes_per_step(model, row.n_rows, prompt_tokens, row.n_rows, new_tokens)
            shares = [needed / (one.bandwidth * time) for one, time in zip(chosen, seconds, strict=True)]
            figures[who]["limit"] = statistics.median(shares)
        else:
            operations = limits.prefill_operations(model, row.n_rows, prompt_tokens)
            figures[who]["limit"] = operations / statistics.median(seconds) / rate
            figures[who]["tokens_per_second"] = row.n_rows * prompt_tokens / statistics.median(seconds)
    if row.num_beams == 1:
        stock, optimized_samples = (samples[case_name(who, row.n_rows, 1)] for who in (False, True))
        figures["ratio"] = paired_ratio(_seconds(stock, row.part), _seconds(optimized_samples, row.part))
    return figures


def line_of(figures: dict[str, Any]) -> list[str]:
    """The cells of the table: title, stock, optimised, ratio, wanted, shares of the limit."""
    stock, optimized = figures["stock"], figures["optimized"]
    cells = [figures["title"], f"{stock['seconds'] * 1e3:.1f} ms", f"{optimized['seconds'] * 1e3:.1f} ms"]
    if "ratio" in figures:
        cells += [f"{figures['ratio']:.2f} ×", f"≥ {figures['wanted']} ×"]
        return [*cells, f"{stock['limit']:.0%} / {optimized['limit']:.0%}"]
    return [
        *cells,
        f"{optimized['ratio']:.2f} × (stock {stock['ratio']:.2f} ×)",
        f"≤ {figures['wanted']} ×",
        "",
    ]
