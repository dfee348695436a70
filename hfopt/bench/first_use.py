"""What the first use of a model costs; `hfopt bench` runs this module in processes of their own.

    python -m hfopt.cli.first_use SHAPE [--layers N] [--optimize] [--prompt-tokens N] [--new-tokens N]

prints a JSON object with seconds and bytes.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

import hfopt
from hfopt.console import models, prompts
from hfopt.console.output import progress, say
from hfopt.machine import env

from .launches import launches
from .measure import in_new_process

NAMES = ("first-use",)
COLUMNS = ["first use", "measured", "wanted"]


def figures_of(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Costs of `optimize` and of the first `generate`: nothing cached, and in later processes."""
    arguments = [args.shape, *(["--layers", str(args.layers)] if args.layers else [])]
    later, stock = [], []
    rounds = 1 if args.quick else 3
    with (
        tempfile.TemporaryDirectory() as folder,
        progress("First use in new processes", 1 + 2 * rounds) as advance,
    ):
        cold = _measured(folder, *arguments, "--optimize")
        advance()
        for _ in range(rounds):
            stock.append(_measured(folder, *arguments))
            advance()
            later.append(_measured(folder, *arguments, "--optimize"))
            advance()
    stock_seconds = statistics.median(sample["generate"] for sample in stock)

    def over_stock(sample: dict[str, Any]) -> float:
        return sample["optimize"] + sample["generate"] - stock_seconds

    figures = {
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
    return dict.fromkeys(names, figures)


def lines_of(rows: dict[str, Any]) -> list[list[str]]:
    """The lines of their table."""
    (figures,) = rows.values()
    again, memory_again = figures["optimize_again"], figures["optimize_again_memory"] / 2**20
    return [
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
    ]


def _measured(cache_folder: str, *arguments: str) -> dict[str, Any]:
    """Measure in a new process whose kernels are cached in `cache_folder`."""
    return in_new_process(__name__, *arguments, HFOPT_CACHE_DIR=cache_folder)


def _timed_optimize(model: PreTrainedModel) -> tuple[float, int]:
    """(seconds, growth of the resident memory in bytes) of one `hfopt.optimize`."""
    memory = env.resident_memory()
    begin = time.perf_counter()
    hfopt.optimize(model)
    return time.perf_counter() - begin, env.resident_memory() - memory


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--optimize", action="store_true")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=8)
    args = parser.parse_args()
    model: Any = models.random_model(models.named_config(args.shape, args.layers), torch.bfloat16)
    inputs = prompts.random_ids(model, args.prompt_tokens, 1)
    figures: dict[str, Any] = {"optimize": 0.0}
    if args.optimize:
        figures["optimize"], figures["optimize_memory"] = _timed_optimize(model)
        hfopt.restore(model)
        figures["optimize_again"], figures["optimize_again_memory"] = _timed_optimize(model)
    with launches() as found:
        begin = time.perf_counter()
        model.generate(**inputs, do_sample=False, max_new_tokens=args.new_tokens)
        figures["generate"] = time.perf_counter() - begin
    # the first call of the program compiles it, or loads it from the cache
    seconds = [each.end - each.begin for each in found if each.kernel.__name__ == "run_step"]
    figures["program"] = seconds[0] - min(seconds) if seconds else 0.0
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
