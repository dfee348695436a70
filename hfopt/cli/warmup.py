"""`hfopt warmup`: compile every kernel into the cache folder."""

import argparse

import hfopt
from hfopt import env

from .output import progress, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hfopt warmup`: none."""


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    with progress("Compiling the kernels"):
        hfopt.warmup()
    folder, state = env.cache_folder()
    say(f"{folder or 'no cache folder'}: {state}")
    return 0
