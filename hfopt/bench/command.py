"""`hfopt bench`: the stock and the optimised model in turn, the memory bandwidth measured in between."""

import argparse
from typing import Any

import torch

from hfopt.bench import roofline
from hfopt.console import models
from hfopt.console.arguments import positive
from hfopt.console.output import progress, say, show_table, write_json
from hfopt.errors import InvalidInput
from hfopt.machine import env
from hfopt.machine.cores import cores_of_process, fit_threads
from hfopt.quantization import config_of
from hfopt.words import dtype_name

from . import first_use, load_cost
from . import growth as bench_growth
from .cases import cases_of, has_positions
from .measure import alternate, pair_of
from .rows import ROWS, Row, figures_of, formats_of, line_of

_IN_PROCESSES: tuple[Any, ...] = (load_cost, first_use)  # modules with rows of their own
_OTHERS = [name for module in _IN_PROCESSES for name in module.NAMES]
_QUICK = {"repetitions": 2, "prompt_tokens": 64, "new_tokens": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hfopt bench`."""
    names = [*ROWS, *_OTHERS]
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
        help="measure single kernels instead: linear, quantized, attention, small, sampling, mamba, lora, launch, "
        "separated by commas (default: all)",
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
    fit_threads()  # the stock model too
    if args.kernels is not None:
        from . import kernels as bench_kernels  # here, because it loads Numba

        return bench_kernels.run(args, _machine())
    if args.quick:
        vars(args).update(_QUICK)
    if bench_growth.is_asked_for(args):
        return bench_growth.run(args, _configuration(args))
    if args.profile:
        from . import profile as bench_profile  # here, because it loads Numba

        return bench_profile.run(args, _configuration(args))
    names = args.rows.split(",") if args.rows is not None else [*ROWS, *_OTHERS]
    unknown = sorted(set(names) - {*ROWS, *_OTHERS})
    if unknown or args.new_tokens < 2:
        raise InvalidInput(
            f"--rows={','.join(names)} must name some of {', '.join([*ROWS, *_OTHERS])}; "
            f"--new-tokens={args.new_tokens} must be at least 2"
        )
    formats = {name: row.quantization for name, row in ROWS.items()} | load_cost.FORMATS
    configuration = _configuration(args) | {"quantization": formats_of(formats.get(name) for name in names)}
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
    measured = {*report["rows"], *_OTHERS}
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
    for module in _IN_PROCESSES:
        asked = [name for name in names if name in module.NAMES]
        if asked:
            others = module.figures_of(args, asked)
            report["rows"] |= others
            if args.json != "-":
                show_table(module.COLUMNS, module.lines_of(others))
                say("")
    if args.json is not None:
        write_json(args.json, report)
    return 0


def _machine() -> dict[str, Any]:
    cores = cores_of_process()
    return {
        "cpu": env.cpu_model(),
        "cpu path": env.cpu_path(),
        "cores": str(cores),
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
    name = dtype_name(dtype) if quantization is None else quantization
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
            "dtype": dtype_name(dtype),
            "quantization": quantization,
            "peak_rates": rates,
            "cases": {case: [sample.to_dict() for sample in chosen] for case, chosen in samples.items()},
        },
    }


def _peak_rates(dtype: torch.dtype, quantization: str | None) -> tuple[float, float]:
    """Operations a second at most, in the arithmetic of the stock model's matrices and of the optimised one's."""
    stock = roofline.MultiplyAdd(dtype).measure()
    if quantization is None:
        return stock, stock
    from hfopt.functional.quantized import terms_of  # here, because it loads Numba

    terms = terms_of(config_of(quantization).body.compute, dtype)
    return stock, roofline.MultiplyAdd(torch.int8).measure() / terms
