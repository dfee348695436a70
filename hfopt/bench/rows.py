"""The rows of `hfopt bench`: what each one measures and what is wanted of it."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hfopt.quantization import config_of

from .cases import Part, Workload, case_name, cells_of, compared, seconds_of
from .measure import Pair, Sample, paired_ratio


@dataclass(frozen=True)
class Row:
    """One line of the table.

    over_one: the figure is the time over that of greedy search of one row by the same model, or with kv_cache over that
    with a cache of floats, at most `wanted`; else it is the stock model's time over the optimised one's, at least `wanted`.
    quantization: name of the format of the optimised model's weights; the stock model has the same weights in `dtype`.
    wanted_limit: the least share of the limit for the optimised model. wanted_seconds: its most time for a token.
    shape: "shape" or "small_shape", the flag that names it, or one of `SHAPES`; n_layers: in place of --layers.
    prompt_tokens: where they are not those of all rows. filled, kv_cache: see `Workload`.
    """

    title: str
    shape: str
    dtype: torch.dtype
    part: Part
    wanted: float | None
    n_rows: int = 1
    num_beams: int = 1
    over_one: bool = False
    quantization: str | None = None
    wanted_limit: float | None = None
    wanted_seconds: float | None = None
    n_layers: int | None = None
    prompt_tokens: int | None = None
    filled: bool = False
    kv_cache: str | None = None

    def source(self, args: argparse.Namespace) -> tuple[str, int | None]:
        """Name of the shape and number of layers (None: all of them) for the flags of a run."""
        return getattr(args, self.shape, self.shape), self.n_layers or args.layers

    def workload(self, prompt_tokens: int, new_tokens: int) -> Workload:
        """Workload of the row, where rows without a length of their own have `prompt_tokens`."""
        return Workload(
            self.prompt_tokens or prompt_tokens,
            new_tokens,
            self.n_rows,
            self.num_beams,
            self.filled,
            self.kv_cache,
        )

    def workloads(self, prompt_tokens: int, new_tokens: int) -> list[Workload]:
        """All that its figures need."""
        own = self.workload(prompt_tokens, new_tokens)
        return [_one(own), own] if self.over_one else [own]


_BF16, _F16, _F32 = torch.bfloat16, torch.float16, torch.float32


def _rows_in(name: str, *, decode: float, of_limit: float, several: float, prefill: float) -> dict[str, Row]:
    """The rows of a format, and what is wanted: of a token, of its share of the limit, of 8 rows over 1, of a prompt."""
    row = partial(Row, shape="shape", dtype=_BF16, quantization=name)
    return {
        f"decode-{name}": row(f"decode {name}, batch 1", part="next", wanted=decode, wanted_limit=of_limit),
        f"decode-{name}-b8": row(
            f"decode {name}: 8 rows / 1 row",
            part="next",
            wanted=several,
            n_rows=8,
            over_one=True,
            filled=True,
        ),
        f"beam-next-{name}": row(
            f"beam search {name}, 4 beams: next token / greedy's",
            part="next",
            wanted=None,
            num_beams=4,
            over_one=True,
        ),
        f"prefill-{name}": row(f"prefill {name}", part="first", wanted=prefill),
    }


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
        "beam search, 4 beams: first token / greedy's",
        "shape",
        _BF16,
        "first",
        1.1,
        num_beams=4,
        over_one=True,
    ),
    "beam-next": Row(
        "beam search, 4 beams: next token / greedy's",
        "shape",
        _BF16,
        "next",
        1.12,
        num_beams=4,
        over_one=True,
    ),
    "decode-f32": Row("decode float32, batch 1", "shape", _F32, "next", 2.2),
    "decode-f32-b8": Row("decode float32, batch 8", "shape", _F32, "next", 4.0, n_rows=8, filled=True),
    "prefill-f32": Row("prefill float32", "shape", _F32, "first", 1.8),
    "decode-f16": Row("decode float16, batch 1", "shape", _F16, "next", 2.0, wanted_limit=0.9),
    "prefill-f16": Row("prefill float16", "shape", _F16, "first", 3.0),
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
    **_rows_in("int8", decode=4.0, of_limit=0.9, several=1.3, prefill=2.0),
    "decode-int4-16k-kv-int8": Row(
        "decode int4, context 16,384: 8-bit cache / bfloat16 cache",
        "shape",
        _BF16,
        "next",
        0.9,
        over_one=True,
        quantization="int4",
        prompt_tokens=16384,
        filled=True,
        kv_cache="int8",
    ),
    **_rows_in("int4", decode=7.0, of_limit=0.85, several=1.6, prefill=1.5),
}


def formats_of(names: Iterable[str | None]) -> str:
    """Formats in full, in words; None stands for float weights."""
    configs = (config_of(name) for name in dict.fromkeys(names) if name is not None)
    return "; ".join(f"{config.body}, the head {config.head}" for config in configs) or "none"


def _one(workload: Workload) -> Workload:
    """Row that a row with `over_one` is compared with."""
    if workload.kv_cache is not None:
        return replace(workload, kv_cache=None)
    return Workload(workload.prompt_tokens, workload.new_tokens, filled=workload.filled)


def figures_of(
    row: Row,
    pair: Pair,
    samples: dict[str, list[Sample]],
    prompt_tokens: int,
    new_tokens: int,
    rates: tuple[float, float],
) -> dict[str, Any]:
    """The figures of a row, as `compared` has them; with `over_one`, each model's ratio to its greedy search of one row."""
    workload = row.workload(prompt_tokens, new_tokens)
    figures: dict[str, Any] = {
        "title": row.title,
        "quantization": row.quantization,
        "wanted": row.wanted,
        "wanted_limit": row.wanted_limit,
        "wanted_seconds": row.wanted_seconds,
    }
    figures |= compared(pair, workload, row.part, samples, rates)
    if row.over_one:
        for who, optimized in (("stock", False), ("optimized", True)):
            several, one = (
                seconds_of(samples[case_name(optimized, each)], row.part)
                for each in (workload, _one(workload))
            )
            figures[who]["over_one"] = paired_ratio(several, one)
    return figures


def line_of(figures: dict[str, Any]) -> list[str]:
    """The cells of the table: title, stock, optimised, ratio, wanted, shares of the limit."""
    stock, optimized, ratio, shares = cells_of(figures)
    sign = "≥"
    if "over_one" in figures["optimized"]:
        both = (figures[who]["over_one"] for who in ("optimized", "stock"))
        ratio = "{:.2f} × (stock {:.2f} ×)".format(*both)
        sign = "≤"
    elif "tokens_per_second" in figures["optimized"]:
        stock, optimized = (
            f"{cell}, {figures[who]['tokens_per_second']:.0f} tokens/s"
            for cell, who in ((stock, "stock"), (optimized, "optimized"))
        )
    wanted = [] if figures["wanted"] is None else [f"{sign} {figures['wanted']} ×"]
    if figures["wanted_limit"] is not None:
        wanted.append(f"≥ {figures['wanted_limit']:.0%}")
    if figures["wanted_seconds"] is not None:
        wanted.append(f"≤ {figures['wanted_seconds'] * 1e3} ms")
    return [figures["title"], stock, optimized, ratio, ", ".join(wanted), shares]
