"""The command `hfopt`: run, chat, bench, accuracy, explain, doctor, warmup."""

import argparse
import sys
from collections.abc import Sequence

from hfopt.errors import HfoptError

_ABOUT = {
    "run": "generate text and say how long it took",
    "chat": "talk with a model",
    "bench": "measure the table of the README on this machine",
    "accuracy": "compare what a model predicts in several forms with the stock model in float32",
    "explain": "list the modules of a model: swapped by what, or kept and why",
    "doctor": "look at this machine, test the kernels, give advice",
    "warmup": "compile the kernels now, so that no first run has to",
}


def _parser() -> argparse.ArgumentParser:
    from hfopt.bench import accuracy
    from hfopt.bench import command as bench

    from . import chat, doctor, explain, run, warmup

    commands = {
        "run": run,
        "chat": chat,
        "bench": bench,
        "accuracy": accuracy,
        "explain": explain,
        "doctor": doctor,
        "warmup": warmup,
    }
    parser = argparse.ArgumentParser(
        prog="hfopt", description="Faster generation on CPUs for transformers models."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=_ABOUT[name], description=command.__doc__)
        command.add_arguments(subparser)
        subparser.set_defaults(function=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own); the exit code, 2 for what the user can mend."""
    try:
        import rich  # noqa: F401
    except ImportError:
        sys.stderr.write('hfopt: the command line needs rich: pip install "hfopt[cli]"\n')
        return 2
    from hfopt.console.output import show_messages

    show_messages()
    args = _parser().parse_args(arguments)
    try:
        return _run(args, sys.argv[1:] if arguments is None else arguments)
    except HfoptError as error:
        sys.stderr.write(f"hfopt: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the command, in processes that have a model together if it can be and they are asked for."""
    if getattr(args, "together", False):
        from . import ranks

        if ranks.n_ranks() > 1:
            return ranks.run_as_rank(args.function, args)
        n = args.tp or args.n_ranks
        if n > 1:
            return ranks.start(n, arguments)
    return args.function(args)
