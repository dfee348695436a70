"""`hfopt bench`: the stock and the optimised model in turn, the memory bandwidth measured in between."""

import argparse
import statistics
import tempfile
from typing import Any

import torch

from hfopt import env, limits
from hfopt.errors import InvalidInput
from hfopt.quantization import config_of

from . import bench_growth, first_use, models
from .bench_cases import cases_of, has_positions
from .bench_rows import ROWS, Row, figures_of, formats_of, line_of
from .measure import alternate, pair_of
from .output import progress, say, show_table, write_json
from .run import positive

_FIRST_USE = "first-use"
_QUICK = {"repetitions": 2, "prompt_tokens": 64, "new_tokens": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hfopt bench`."""
    names = [*ROWS, _FIRST_USE]
    parser.add_argument("--rows", help=f"which rows, separated by commas (default: all: {','.join(names)})")
    parser.add_argument(
        "--shape",
        default="llama-3.2-1b",
        metavar="CONFIG",
        help="a named shape or config.json (default: %(default)s)",
    )
    parser.add_argument(
        "--small-shape",
        default="llama-160m",
        metavar="CONFIG",
        help="of the row decode-small (default: %(default)s)",
    )
    parser.add_argument("--layers", type=positive, metavar="N", help="shrink the shapes to N layers")
    parser.add_argument("--repetitions", type=positive, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--prompt-tokens", type=positive, default=512, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=32, metavar="N", help="at least 2 (default: %(default)s)"
    )
    parser.add_argument(
        "--kernels",
        nargs="?",
        const="all",
        metavar="NAMES",
        help="measure single kernels instead: linear, attention, small, sampling, launch, separated by commas "
        "(default: all)",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="in place of the table, the time of the instructions of the decode steps that --rows names",
    )
    parser.add_argument("--quick", action="store_true", help=f"a rough look: {_QUICK}")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="figures as JSON to FILE, or instead of the text"
    )
    bench_growth.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    if args.kernels is not None:
        from . import bench_kernels  # here, because it loads Numba

        return bench_kernels.run(args, _machine())
    if args.quick:
        vars(args).update(_QUICK)
    if bench_growth.is_asked_for(args):
        return bench_growth.run(args, _configuration(args))
    if args.profile:
        from . import bench_profile  # here, because it loads Numba

        return bench_profile.run(args, _configuration(args))
    names = args.rows.split(",") if args.rows is not None else [*ROWS, _FIRST_USE]
    unknown = sorted(set(names) - {*ROWS, _FIRST_USE})
    if unknown or args.new_tokens < 2:
        raise InvalidInput(
            f"--rows={','.join(names)} must name some of {', '.join([*ROWS, _FIRST_USE])}; "
            f"--new-tokens={args.new_tokens} must be at least 2"
        )
    configuration = _configuration(args) | {"quantization": formats_of(names)}
    report: dict[str, Any] = {"configuration": configuration, "rows": {}}
    if args.json != "-":
        for key, value in report["configuration"].items():
            say(f"{key:<18}{value}")
        say("")
    lines: list[list[str]] = []
    groups: dict[tuple[tuple[str, int | None], torch.dtype, str | None], dict[str, Row]] = {}
    for name in names:
        if name in ROWS:
            row = ROWS[name]
            groups.setdefault((row.source(args), row.dtype, row.quantization), {})[name] = row
    for (source, dtype, quantization), chosen in groups.items():
        figures = _measure(args, source, dtype, quantization, chosen)
        report["rows"] |= figures["rows"]
        report.setdefault("samples", []).append(figures["samples"])
        lines += [line_of(row) for row in figures["rows"].values()]
    measured = {*report["rows"], _FIRST_USE}
    report["left out"] = [name for name in names if name not in measured]
    # which layer Numba loads shows after the first kernel
    report["configuration"]["threading layer"] = env.threading_layer()
    if args.json != "-" and lines:
        columns = [
            "row",
            "stock",
            "optimized",
            "ratio",
            "wanted",
            "of the limit, stock / optimized",
        ]
        say(f"{'threading layer':<18}{env.threading_layer()}")
        show_table(columns, lines)
        for name in report["left out"]:
            say(f"{name} is left out: the shape has positions for fewer tokens")
        say("")
    if _FIRST_USE in names:
        report["rows"][_FIRST_USE] = _first_use(args)
        if args.json != "-":
            _show_first_use(report["rows"][_FIRST_USE])
    if args.json is not None:
        write_json(args.json, report)
    return 0


def _machine() -> dict[str, Any]:
    cores = env.usable_cores()
    return {
        "cpu": env.cpu_model(),
        "cpu path": env.cpu_path(),
        "cores": f"{cores.usable}: {cores.reason}",
        "threads": env.threads(),
        "versions": " ".join(f"{name} {version}" for name, version in env.versions().items()),
    }


def _configuration(args: argparse.Namespace) -> dict[str, Any]:
    return _machine() | {
        "shape": args.shape,
        "small shape": args.small_shape,
        "layers": args.layers or "all",
        "prompt tokens": args.prompt_tokens,
        "new tokens": args.new_tokens,
        "repetitions": args.repetitions,
    }


def _measure(
    args: argparse.Namespace,
    source: tuple[str, int | None],
    dtype: torch.dtype,
    quantization: str | None,
    rows: dict[str, Row],
) -> dict[str, Any]:
    """The figures of the rows of one model, and all samples."""
    shape, n_layers = source
    name = str(dtype).removeprefix("torch.") if quantization is None else quantization
    with progress(f"Making random weights of {shape} in {name}"):
        pair = pair_of(lambda: models.random_model(models.named_config(shape, n_layers), dtype), quantization)
    model = pair.stock
    lengths = args.prompt_tokens, args.new_tokens
    rows = {key: row for key, row in rows.items() if has_positions(model.config, row.workload(*lengths))}
    cases = cases_of(model, [workload for row in rows.values() for workload in row.workloads(*lengths)])
    with progress(f"Measuring {shape} in {name}", (args.repetitions + 1) * len(cases)) as advance:
        samples = alternate(pair, cases, args.repetitions, 1, advance)
    rates = _peak_rates(dtype, quantization)
    figures = {row_name: figures_of(row, pair, samples, *lengths, rates) for row_name, row in rows.items()}
    return {
        "rows": figures,
        "samples": {
            "shape": shape,
            "layers": model.config.num_hidden_layers,
            "dtype": str(dtype).removeprefix("torch."),
            "quantization": quantization,
            "peak_rates": rates,
            "cases": {case: [sample.to_dict() for sample in chosen] for case, chosen in samples.items()},
        },
    }


def _peak_rates(dtype: torch.dtype, quantization: str | None) -> tuple[float, float]:
    """Operations a second at most, in the arithmetic of the stock model's matrices and of the optimised one's."""
    stock = limits.MultiplyAdd(dtype).measure()
    if quantization is None or config_of(quantization).body.compute == "float":
        return stock, stock
    return stock, limits.MultiplyAdd(torch.int8).measure()


def _first_use(args: argparse.Namespace) -> dict[str, Any]:
    """Costs of `optimize` and of the first `generate`: nothing cached, and in later processes."""
    arguments = [args.shape, *(["--layers", str(args.layers)] if args.layers else [])]
    later, stock = [], []
    rounds = 1 if args.quick else 3
    with (
        tempfile.TemporaryDirectory() as folder,
        progress("First use in new processes", 1 + 2 * rounds) as advance,
    ):
        cold = first_use.measured(folder, *arguments, "--optimize")
        advance()
        for _ in range(rounds):
            stock.append(first_use.measured(folder, *arguments))
            advance()
            later.append(first_use.measured(folder, *arguments, "--optimize"))
            advance()
    stock_seconds = statistics.median(sample["generate"] for sample in stock)

    def over_stock(sample: dict[str, Any]) -> float:
        return sample["optimize"] + sample["generate"] - stock_seconds

    return {
        "optimize": statistics.median(sample["optimize"] for sample in later),
        "optimize_again": statistics.median(sample["optimize_again"] for sample in later),
        "optimize_memory": statistics.median(sample["optimize_memory"] for sample in later),
        "optimize_again_memory": statistics.median(sample["optimize_again_memory"] for sample in later),
        "first_generate_cold": over_stock(cold),
        "first_generate_later": statistics.median(over_stock(sample) for sample in later),
        "program_cold": cold["program"],
        "program_later": statistics.median(sample["program"] for sample in later),
        "samples": {"stock": stock, "cold": cold, "later": later},
    }


def _show_first_use(figures: dict[str, Any]) -> None:
    again, memory_again = figures["optimize_again"], figures["optimize_again_memory"] / 2**20
    show_table(
        ["first use", "measured", "wanted"],
        [
            ["optimize(), first in a process", f"{figures['optimize']:.2f} s", "≤ 0.5 s"],
            ["optimize(), again", f"{again:.3f} s", "≤ 0.5 s"],
            [
                "memory of the first optimize(), libraries included",
                f"{figures['optimize_memory'] / 2**20:.0f} MiB",
                "",
            ],
            ["memory of optimize(), again", f"{memory_again:.0f} MiB", "≤ 50 MiB"],
            [
                "first generate() over stock's, nothing cached",
                f"{figures['first_generate_cold']:.1f} s",
                "≤ 25 s",
            ],
            [
                "first generate() over stock's, later processes",
                f"{figures['first_generate_later']:.2f} s",
                "≤ 2 s",
            ],
            [
                "of it the program of decode steps, nothing cached",
                f"{figures['program_cold']:.1f} s",
                "≤ 10 s",
            ],
            ["of it the program, later processes", f"{figures['program_later']:.2f} s", "≤ 0.5 s"],
        ],
    )
