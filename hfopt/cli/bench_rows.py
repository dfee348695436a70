"""The rows of `hfopt bench`: what each one measures and what is wanted of it."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .bench_cases import Part, Workload, case_name, cells_of, compared, seconds_of
from .measure import Sample, paired_ratio


@dataclass(frozen=True)
class Row:
    """One line of the table.

    num_beams above 1: the figure is the time with beams over that of greedy search, at most `wanted`;
    else it is the stock model's time over the optimised one's, at least `wanted`.
    wanted_limit: the least share of the limit for the optimised model. wanted_seconds: its most time for a token.
    shape: "shape" or "small_shape", the flag that names it, or one of `SHAPES`; n_layers: in place of --layers.
    prompt_tokens: where they are not those of all rows. filled: see `Workload`.
    """

    title: str
    shape: str
    dtype: torch.dtype
    part: Part
    wanted: float | None
    n_rows: int = 1
    num_beams: int = 1
    wanted_limit: float | None = None
    wanted_seconds: float | None = None
    n_layers: int | None = None
    prompt_tokens: int | None = None
    filled: bool = False

    def source(self, args: argparse.Namespace) -> tuple[str, int | None]:
        """Name of the shape and number of layers (None: all of them) for the flags of a run."""
        return getattr(args, self.shape, self.shape), self.n_layers or args.layers

    def workload(self, prompt_tokens: int, new_tokens: int) -> Workload:
        """What is run for the row, where rows without a length of their own have `prompt_tokens`."""
        return Workload(
            self.prompt_tokens or prompt_tokens, new_tokens, self.n_rows, self.num_beams, self.filled
        )

    def workloads(self, prompt_tokens: int, new_tokens: int) -> list[Workload]:
        """All that its figures need: beams bring greedy search along."""
        own = self.workload(prompt_tokens, new_tokens)
        return list(dict.fromkeys([_greedy(own), own]))


_BF16, _F32 = torch.bfloat16, torch.float32

ROWS: dict[str, Row] = {
    "decode-bf16": Row("decode bfloat16, batch 1", "shape", _BF16, "next", 2.0, wanted_limit=0.92),
    "decode-bf16-b8": Row("decode bfloat16, batch 8", "shape", _BF16, "next", 2.0, n_rows=8, filled=True),
    "decode-bf16-8k": Row(
        "decode bfloat16, batch 1, context 8,192",
        "shape",
        _BF16,
        "next",
        None,
        wanted_limit=0.8,
        prompt_tokens=8192,
        filled=True,
    ),
    "prefill-bf16": Row("prefill bfloat16", "shape", _BF16, "first", 1.25),
    "beam-first": Row(
        "beam search, 4 beams: first token / greedy's", "shape", _BF16, "first", 1.1, num_beams=4
    ),
    "beam-next": Row(
        "beam search, 4 beams: next token / greedy's", "shape", _BF16, "next", 1.12, num_beams=4
    ),
    "decode-f32": Row("decode float32, batch 1", "shape", _F32, "next", 2.2),
    "decode-f32-b8": Row("decode float32, batch 8", "shape", _F32, "next", 4.0, n_rows=8, filled=True),
    "prefill-f32": Row("prefill float32", "shape", _F32, "first", 1.8),
    "decode-small": Row(
        "decode bfloat16, batch 1, small shape", "small_shape", _BF16, "next", 2.0, wanted_limit=0.82
    ),
    "decode-1-layer": Row(
        "decode bfloat16, 1 layer of hidden size 64",
        "llama-hidden-64",
        _BF16,
        "next",
        None,
        wanted_seconds=0.25e-3,
        n_layers=1,
        prompt_tokens=32,
    ),
    "decode-32-layers": Row(
        "decode bfloat16, 32 layers of hidden size 64",
        "llama-hidden-64",
        _BF16,
        "next",
        None,
        wanted_seconds=0.6e-3,
        n_layers=32,
        prompt_tokens=32,
    ),
}


def _greedy(workload: Workload) -> Workload:
    return Workload(workload.prompt_tokens, workload.new_tokens, workload.n_rows, filled=workload.filled)


def figures_of(
    row: Row,
    model: PreTrainedModel,
    samples: dict[str, list[Sample]],
    prompt_tokens: int,
    new_tokens: int,
    rate: float,
) -> dict[str, Any]:
    """The figures of a row, as `compared` has them; with beams, each model's ratio to its greedy search too."""
    workload = row.workload(prompt_tokens, new_tokens)
    figures: dict[str, Any] = {
        "title": row.title,
        "wanted": row.wanted,
        "wanted_limit": row.wanted_limit,
        "wanted_seconds": row.wanted_seconds,
    }
    figures |= compared(model, workload, row.part, samples, rate)
    if row.num_beams > 1:
        for who, optimized in (("stock", False), ("optimized", True)):
            beams, greedy = (
                seconds_of(samples[case_name(optimized, one)], row.part)
                for one in (workload, _greedy(workload))
            )
            figures[who]["over_greedy"] = paired_ratio(beams, greedy)
    return figures


def line_of(figures: dict[str, Any]) -> list[str]:
    """The cells of the table: title, stock, optimised, ratio, wanted, shares of the limit."""
    stock, optimized, ratio, shares = cells_of(figures)
    sign = "≥"
    if "over_greedy" in figures["optimized"]:
        both = (figures[who]["over_greedy"] for who in ("optimized", "stock"))
        ratio = "{:.2f} × (stock {:.2f} ×)".format(*both)
        sign = "≤"
    wanted = [] if figures["wanted"] is None else [f"{sign} {figures['wanted']} ×"]
    if figures["wanted_limit"] is not None:
        wanted.append(f"≥ {figures['wanted_limit']:.0%}")
    if figures["wanted_seconds"] is not None:
        wanted.append(f"≤ {figures['wanted_seconds'] * 1e3} ms")
    return [figures["title"], stock, optimized, ratio, ", ".join(wanted), shares]
