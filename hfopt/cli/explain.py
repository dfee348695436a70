"""`hfopt explain`: what optimize() does with a model, module by module."""

import argparse

import hfopt

from .output import progress, say, write_json
from .run import add_model_arguments, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hfopt explain`."""
    parser.add_argument("model_id", metavar="MODEL", nargs="?", help="a folder or hub id")
    add_model_arguments(parser)
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="the report as JSON to FILE, or instead of the text",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    model, _ = load_model(args)
    with progress("Optimizing"):
        hfopt.optimize(model)
    report = hfopt.explain(model)
    if args.json is not None:
        write_json(args.json, report.to_dict())
    if args.json != "-":
        say(str(report))
    return 0
