"""`hfopt bench --profile`: where the time of a decode step goes, by the instructions of its program.

The step in one call and its instructions one by one run in turn over the same cache and scratch. Instructions run in the
order of the program, so that the weights of each have left the CPU's caches when it comes again, as in a real step.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import hfopt
from hfopt import generation, host
from hfopt.bench import roofline
from hfopt.console import models
from hfopt.console.output import progress, say, show_table, write_json
from hfopt.errors import InvalidInput
from hfopt.kernels.jit import launch as jit
from hfopt.machine import env
from hfopt.program.adapters import AdaptedProgram
from hfopt.program.listing import Line
from hfopt.program.program import Program

from .cases import Workload, cases_of, filled_cache, has_positions
from .kernel_case import launches_of
from .launches import launches
from .measure import Case
from .rows import ROWS, formats_of

ROWS_BY_DEFAULT = "decode-bf16,decode-small"
_MIN_TOKENS = 3  # of which the first two are not timed
_WANTED_OUTSIDE = 0.15e-3  # seconds
_NOTICED = 1 << 16  # bytes; what reads less is not bound by memory

_COLUMNS = ["instruction", "shapes", "number", "each", "of the step", "GB/s", "of the limit"]


def run(args: argparse.Namespace, configuration: dict[str, Any]) -> int:
    """Measure the steps of the rows that the flags name, show and write them; the exit code."""
    names = (args.rows or ROWS_BY_DEFAULT).split(",")
    known = [name for name, row in ROWS.items() if row.part == "next" and row.num_beams == 1]
    if not set(names) <= set(known) or args.new_tokens < _MIN_TOKENS:
        raise InvalidInput(
            f"--rows={','.join(names)} must name some of {', '.join(known)} with --profile; "
            f"--new-tokens={args.new_tokens} must be at least {_MIN_TOKENS}"
        )
    configuration["quantization"] = formats_of(ROWS[name].quantization for name in names)
    report: dict[str, Any] = {"configuration": configuration, "profiles": {}}
    for name in names:
        report["profiles"][name] = _of_row(args, name)
    configuration["threading layer"] = env.threading_layer()
    if args.json != "-":
        for key, value in configuration.items():
            say(f"{key:<18}{value}")
        for figures in report["profiles"].values():
            say("")
            _show(figures)
    if args.json is not None:
        write_json(args.json, report)
    return 0


def _of_row(args: argparse.Namespace, name: str) -> dict[str, Any]:
    row = ROWS[name]
    shape, n_layers = row.source(args)
    with progress(f"Making random weights of {shape}"):
        model = models.random_model(models.named_config(shape, n_layers), row.dtype)
    workload = Workload(
        row.prompt_tokens or args.prompt_tokens, args.new_tokens, n_rows=row.n_rows, filled=True
    )
    if not has_positions(model.config, workload):
        raise InvalidInput(f"--rows={name}: {shape} has positions for fewer tokens")
    hfopt.optimize(model, kernels="hfopt", quantization=row.quantization)
    with progress(f"Profiling {name}", args.repetitions + 1) as advance:
        figures = profile(model, workload, args.repetitions, advance)
    return {"title": row.title, "shape": shape, "layers": model.config.num_hidden_layers} | figures


# ---- measuring -------------------------------------------------------------------------------------------------------


class ReadyStep:
    """A decode step behind a filled cache that can be made again and again: whole, or instruction by instruction.

    Raises `InvalidInput` if the model, which is optimised, makes its steps module by module.
    """

    def __init__(self, model: PreTrainedModel, workload: Workload) -> None:
        n_rows = workload.n_rows
        cache: Any = filled_cache(model, workload, optimized=True)
        programs = generation.installed(model).programs
        program = None if programs is None else programs.of(model, n_rows)
        if not isinstance(program, Program | AdaptedProgram):
            reason = hfopt.explain(model).by_module or f"a step of {n_rows} rows has other kernels"
            raise InvalidInput(f"--profile: decode steps of this model go module by module: {reason}")
        appended = cache.append_everywhere(n_rows, 1, program.layouts)
        run = program.steps(n_rows)
        tokens, positions = np.zeros(n_rows, np.int64), np.full(n_rows, workload.prompt_tokens)
        #: logits of the last one
        self.logits, (launch,) = launches_of(lambda: run.logits(tokens, positions, appended))
        self._owners = cache, run  # of what the launch has the addresses of
        self._launch = launch
        self.kernel: Any = launch.func
        self.instructions: Sequence[Line] = program.listing.instructions
        n_tokens = workload.prompt_tokens + 1
        self.bytes_read = [each.bytes_read(n_rows, n_tokens) for each in self.instructions]
        self.whole = launch
        self.parts = [self._part(index, index + 1) for index in range(len(self.instructions))]
        #: a launch that finds no instruction
        self.empty = self._part(0, 0)

    def _part(self, begin: int, end: int) -> partial:
        like, held, code, quantized, scalars, *rest = self._launch.args
        tables = (code, quantized, scalars)  # a row for each instruction
        own = (None if table is None else table[begin:end] for table in tables)
        return partial(self.kernel, like, held, *own, *rest)


@dataclass(frozen=True)
class Round:
    """Seconds: medians over the steps of a round; an empty launch is taken off those of parts. Bytes a second."""

    whole: float
    empty: float
    parts: list[float]
    token: float
    outside: float
    bandwidth: float


def profile(
    model: PreTrainedModel,
    workload: Workload,
    repetitions: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The figures of a decode step of an optimised model, from as many rounds after one that does not count."""
    case = next(case for case in cases_of(model, [workload]) if case.optimized)
    meter = roofline.BandwidthMeter()
    with torch.inference_mode():
        ready = ReadyStep(model, workload)
        rounds = []
        before = meter.measure()
        for _ in range(repetitions + 1):
            steps = [_steps(ready) for _ in range(workload.new_tokens)]
            tokens = _tokens(model, case, ready.kernel)
            after = meter.measure()
            rounds.append(_round(steps, tokens, (before + after) / 2))
            before = after
            advance()
    return figures_of(ready.instructions, ready.bytes_read, rounds[1:])


def _steps(ready: ReadyStep) -> list[float]:
    """Seconds of the whole step, of an empty launch, and of each instruction."""
    clock, empty = time.perf_counter, ready.empty
    begin = clock()
    ready.whole()
    whole, empties, parts = clock() - begin, [], []
    for part in ready.parts:
        # Weights have just passed through the caches. The first launch brings back what launches need, so that the second
        # one and the instruction find the same.
        empty()
        begin = clock()
        empty()
        between = clock()
        part()
        end = clock()
        empties.append(between - begin)
        parts.append(end - between)
    return [whole, statistics.median(empties), *parts]


def _tokens(model: Any, case: Case, kernel: jit.Launch) -> list[tuple[float, float]]:
    """(seconds, seconds of them outside kernels) of tokens that `generate` makes, from one step's end to the next one's.

    Tokens of one launch share its time.
    """
    given = {} if case.cache is None else {str(host.REQUEST_CACHE): case.cache()}
    with launches() as found:
        model.generate(**case.inputs, **case.options, **given)
    ends = [index for index, each in enumerate(found) if each.kernel is kernel and each.result]
    tokens: list[tuple[float, float]] = []
    for first, last in itertools.pairwise(ends):
        seconds = found[last].end - found[first].end
        inside = sum(each.end - each.begin for each in found[first + 1 : last + 1])
        n_steps = found[last].result
        tokens += [(seconds / n_steps, (seconds - inside) / n_steps)] * n_steps
    return tokens


def _round(steps: list[list[float]], tokens: list[tuple[float, float]], bandwidth: float) -> Round:
    whole, empty, *parts = (statistics.median(seconds) for seconds in zip(*steps, strict=True))
    token, outside = (statistics.median(seconds) for seconds in zip(*tokens, strict=True))
    return Round(whole, empty, [max(0.0, part - empty) for part in parts], token, outside, bandwidth)


def figures_of(
    instructions: Sequence[Line], bytes_read: Sequence[int], rounds: Sequence[Round]
) -> dict[str, Any]:
    """Medians over the rounds, instructions that do the same together.

    Seconds are those of all instructions of a kind; share: of their sum over the whole program; rate: bytes a second that
    were read, limit: its share of the bandwidth measured in the same round; None where memory matters little.
    """
    kinds: dict[tuple[str, ...], list[int]] = {}
    for index, line in enumerate(instructions):
        kinds.setdefault(line.kind, []).append(index)

    def rates(n_bytes: int, seconds: Sequence[float], number: int = 1) -> dict[str, float | None]:
        told: dict[str, float | None] = {"seconds": statistics.median(seconds), "rate": None, "limit": None}
        if n_bytes >= number * _NOTICED and min(seconds) > 0:
            reached = [n_bytes / one for one in seconds]
            told["rate"] = statistics.median(reached)
            told["limit"] = statistics.median(
                rate / one.bandwidth for rate, one in zip(reached, rounds, strict=True)
            )
        return told

    sums = [sum(one.parts) for one in rounds]
    lines = []
    for (name, shapes, then), members in kinds.items():
        seconds = [sum(one.parts[index] for index in members) for one in rounds]
        n_bytes = sum(bytes_read[index] for index in members)
        share = statistics.median(part / whole for part, whole in zip(seconds, sums, strict=True))
        told = {"name": name, "shapes": shapes, "then": then, "number": len(members), "bytes": n_bytes}
        lines.append(told | {"share": share} | rates(n_bytes, seconds, len(members)))
    total = sum(bytes_read)
    return {
        "instructions": lines,
        "parts": rates(total, sums),
        "whole": rates(total, [one.whole for one in rounds]),
        "bytes": total,
        "empty_launch": statistics.median(one.empty for one in rounds),
        "token": statistics.median(one.token for one in rounds),
        "outside_kernels": statistics.median(one.outside for one in rounds),
        "bandwidth": statistics.median(one.bandwidth for one in rounds),
    }


# ---- lines -----------------------------------------------------------------------------------------------------------


def _show(figures: dict[str, Any]) -> None:
    say(f"{figures['title']}: {figures['shape']}, number of layers {figures['layers']}")
    show_table(_COLUMNS, lines_of(figures))
    say(
        f"a token in generate: {_milliseconds(figures['token'])}, {_milliseconds(figures['outside_kernels'])} of it outside "
        f"kernels (wanted: ≤ {_milliseconds(_WANTED_OUTSIDE)})"
    )
    say(
        f"bandwidth {figures['bandwidth'] / 1e9:.1f} GB/s; an empty launch takes {figures['empty_launch'] * 1e6:.1f} µs, "
        "which is taken off each instruction"
    )


def lines_of(figures: dict[str, Any]) -> list[list[str]]:
    """The cells of the table: a line for each kind of instruction, their sum, the step in one call."""
    lines = [
        [
            line["name"],
            ", ".join(filter(None, (line["shapes"], line["then"]))),
            str(line["number"]),
            f"{line['seconds'] / line['number'] * 1e6:,.1f} µs",
            f"{line['share']:.1%}",
            *_rate_cells(line),
        ]
        for line in figures["instructions"]
    ]
    number = sum(line["number"] for line in figures["instructions"])
    for name, count, one in (("one by one", number, figures["parts"]), ("in one call", 1, figures["whole"])):
        share = one["seconds"] / figures["parts"]["seconds"]
        cells = [name, "", str(count), _milliseconds(one["seconds"]), f"{share:.1%}"]
        lines.append([*cells, *_rate_cells(one)])
    return lines


def _rate_cells(one: dict[str, float | None]) -> list[str]:
    rate, limit = one["rate"], one["limit"]
    return ["", ""] if rate is None or limit is None else [f"{rate / 1e9:.1f}", f"{limit:.0%}"]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
