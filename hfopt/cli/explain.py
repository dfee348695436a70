"""`hfopt explain`: what optimize() does with a model, module by module; or the program of its decode steps."""

import argparse
from pathlib import Path

import hfopt
from hfopt.console.arguments import add_model_arguments, add_quantization, load_model
from hfopt.console.output import progress, say, write_json
from hfopt.errors import InvalidInput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hfopt explain`."""
    parser.add_argument("model_id", metavar="MODEL", nargs="?", help="a folder or hub id")
    add_model_arguments(parser)
    add_quantization(parser, "what becomes of the model when its weights turn into a format")
    parser.add_argument(
        "--program",
        action="store_true",
        help="the instructions of a decode step instead: shapes, bytes of weights, scratch",
    )
    parser.add_argument(
        "--all-layers",
        action="store_true",
        help="with --program: every layer (default: of layers that do the same, the first)",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="the report with the whole program as JSON to FILE, or instead of the text",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    if args.all_layers and not args.program:
        raise InvalidInput("--all-layers needs --program")
    if args.json is not None and Path(args.json).is_dir():
        raise InvalidInput(
            f"--json={args.json} is a folder: name the model first, as in explain {args.json} --json"
        )
    model = load_model(args)
    with progress("Optimizing"):
        hfopt.optimize(model, quantization=args.quantization)
    report = hfopt.explain(model)
    if args.json is not None:
        write_json(args.json, report.to_dict())
    if args.json != "-":
        say(_program_text(report, args.all_layers) if args.program else str(report))
    return 0


def _program_text(report: hfopt.Report, all_layers: bool) -> str:
    if report.program is None:
        return f"{report.model_class} has no program, decode steps go module by module: {report.by_module}"
    return "\n".join(report.program.lines(folded=not all_layers))
