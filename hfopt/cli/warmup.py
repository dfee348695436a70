"""`hfopt warmup`: compile every kernel into the cache folder."""

import argparse

import hfopt
from hfopt.console.arguments import add_kv_cache, add_quantization
from hfopt.console.output import progress, say
from hfopt.machine import env


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hfopt warmup`."""
    add_quantization(parser, "the kernels of a format too")
    add_kv_cache(parser, "the kernels of keys and values too,")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    with progress("Compiling the kernels"):
        hfopt.warmup(args.quantization, kv_cache=args.kv_cache)
    folder, state = env.cache_folder()
    say(f"{folder or 'no cache folder'}: {state}")
    return 0
