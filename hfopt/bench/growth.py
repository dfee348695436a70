"""`hfopt bench --growth`: the cost of a decode step, or of reading a prompt, as one thing grows alone."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from hfopt.bench import roofline
from hfopt.console import models
from hfopt.console.output import progress, say, show_table, write_json
from hfopt.errors import InvalidInput
from hfopt.machine import env
from hfopt.words import dtype_name

from . import plot as bench_plot
from .cases import Part, Workload, bytes_of, cases_of, cells_of, compared, has_positions, operations_of
from .measure import Pair, alternate

_DTYPE = torch.bfloat16
_CONTEXTS = (128, 512, 2048, 4096, 8192, 16384)
_BATCHES = (1, 2, 4, 8, 16, 32)
_BEAMS = (1, 2, 4, 8)
_PROMPTS = (128, 512, 2048, 4096)  # the stock model needs minutes for more
_LAYERS = 4  # enough for the slope in a run of minutes
_NEW_TOKENS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hfopt bench` that concern growth."""
    parser.add_argument(
        "--growth",
        action="store_true",
        help="in place of the rows, a table of the cost as context, batch, beams, layers and prompt grow "
        f"(--layers is {_LAYERS} then by default)",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="--growth, and draw it into FILE (.svg, .png): roofline, and latency against context length",
    )
    parser.add_argument(
        "--from",
        dest="plot_from",
        metavar="JSON",
        help="with --plot: measure nothing, draw what an earlier --growth --json has written",
    )


def is_asked_for(args: argparse.Namespace) -> bool:
    """Whether the flags ask for growth in place of the rows."""
    return args.growth or args.plot is not None or args.plot_from is not None


def run(args: argparse.Namespace, configuration: dict[str, Any]) -> int:
    """Measure, show, draw and write, as the flags say; the exit code."""
    if args.plot is not None:
        bench_plot.check_target(args.plot)
    if args.plot_from is not None:
        if args.plot is None:
            raise InvalidInput(f"--from={args.plot_from} needs --plot=FILE")
        bench_plot.draw(bench_plot.figures_from(args.plot_from), args.plot)
        return 0
    configuration.pop("small shape")  # of the rows only
    report = measured(args)
    report["configuration"] = configuration | report["configuration"]
    if args.json != "-":
        for key, value in report["configuration"].items():
            say(f"{key:<18}{value}")
        say("")
        columns = ["what grows", "stock", "optimized", "ratio", "of the limit, stock / optimized"]
        show_table(columns, [[line["title"], *cells_of(line)] for line in report["growth"]["lines"]])
    if args.json is not None:
        write_json(args.json, report)
    if args.plot is not None:
        bench_plot.draw(report, args.plot)
    return 0


@dataclass(frozen=True)
class Point:
    """One line of the table: `size` of what grows, in a model of `n_layers`."""

    series: Literal["context", "batch", "beams", "layers", "prompt"]
    size: int
    n_layers: int
    workload: Workload

    @property
    def part(self) -> Part:
        """Name of what is timed: of a prompt its first token, else a decode step."""
        return "first" if self.series == "prompt" else "next"

    @property
    def title(self) -> str:
        """The first cell of the line."""
        return f"{'prefill, prompt' if self.series == 'prompt' else self.series} {self.size:,}"


def points_of(n_layers: int, prompt_tokens: int) -> list[Point]:
    """All points, in the order of the table; where something else grows, the context is `prompt_tokens`."""
    base = Workload(prompt_tokens, _NEW_TOKENS, filled=True)
    layers = sorted({max(1, n_layers // 4), max(1, n_layers // 2), n_layers})
    return [
        *(Point("context", size, n_layers, replace(base, prompt_tokens=size)) for size in _CONTEXTS),
        *(Point("batch", size, n_layers, replace(base, n_rows=size)) for size in _BATCHES),
        *(Point("beams", size, n_layers, replace(base, num_beams=size)) for size in _BEAMS),
        *(Point("layers", size, size, base) for size in layers),
        *(Point("prompt", size, n_layers, Workload(size, new_tokens=1)) for size in _PROMPTS),
    ]


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of all points that the model has positions for, for programs and for the plot."""
    config = models.named_config(args.shape)
    n_layers = args.layers or min(_LAYERS, config.num_hidden_layers)
    all_points = points_of(n_layers, args.prompt_tokens)
    points = [point for point in all_points if has_positions(config, point.workload)]
    if not points:
        raise InvalidInput(f"--prompt-tokens={args.prompt_tokens}: {args.shape} has fewer positions")
    lines: dict[Point, dict[str, Any]] = {}
    samples = []
    for size in sorted({point.n_layers for point in points}, reverse=True):
        more, group = _measure(args, size, [point for point in points if point.n_layers == size])
        lines |= more
        samples.append(group)
    bandwidths = [
        one["bandwidth"] for group in samples for chosen in group["cases"].values() for one in chosen
    ]
    return {
        "configuration": {
            "layers": n_layers,
            "new tokens": _NEW_TOKENS,
            "dtype": dtype_name(_DTYPE),
            "threading layer": env.threading_layer(),
            "left out": ", ".join(point.title for point in all_points if point not in points) or "nothing",
        },
        "growth": {
            "bandwidth": statistics.median(bandwidths),
            "rate": statistics.median(group["peak_rate"] for group in samples),
            "lines": [lines[point] for point in points],
        },
        "samples": samples,
    }


def _measure(
    args: argparse.Namespace, n_layers: int, points: Sequence[Point]
) -> tuple[dict[Point, dict[str, Any]], dict[str, Any]]:
    """The lines of one model, and all its samples."""
    with progress(f"Making random weights of {args.shape} with {n_layers} layers"):
        model = models.random_model(models.named_config(args.shape, n_layers), _DTYPE)
    pair = Pair(model, model)
    cases = cases_of(model, [point.workload for point in points])
    with progress(f"Measuring {n_layers} layers", (args.repetitions + 1) * len(cases)) as advance:
        samples = alternate(pair, cases, args.repetitions, 1, advance)
    rate = roofline.MultiplyAdd(_DTYPE).measure()
    lines = {
        point: {
            "series": point.series,
            "size": point.size,
            "title": point.title,
            "operations": operations_of(model, point.workload, point.part),
            "bytes": bytes_of(model, point.workload, point.part),
        }
        | compared(pair, point.workload, point.part, samples, (rate, rate))
        for point in points
    }
    return lines, {
        "layers": n_layers,
        "peak_rate": rate,
        "cases": {case: [sample.to_dict() for sample in chosen] for case, chosen in samples.items()},
    }
