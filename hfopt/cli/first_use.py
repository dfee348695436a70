"""What the first use of a model costs; `hfopt bench` runs this module in processes of their own.

    python -m hfopt.cli.first_use SHAPE [--layers N] [--optimize] [--prompt-tokens N] [--new-tokens N]

prints a JSON object with seconds and bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

import hfopt
from hfopt import env

from . import models, prompts
from .output import say


def measured(cache_folder: str, *arguments: str) -> dict[str, Any]:
    """Run this module in a new process whose kernels are cached in `cache_folder`; what it measured."""
    finished = subprocess.run(
        [sys.executable, "-m", __name__, *arguments],
        env=os.environ | {"HFOPT_CACHE_DIR": cache_folder},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(finished.stdout)


def _timed_optimize(model: PreTrainedModel) -> tuple[float, int]:
    """(seconds, growth of the resident memory in bytes) of one `hfopt.optimize`."""
    memory = env.resident_memory()
    begin = time.perf_counter()
    hfopt.optimize(model)
    return time.perf_counter() - begin, env.resident_memory() - memory


@contextmanager
def _timed_program() -> Iterator[list[float]]:
    """Seconds of every call of a model's program in the block; the first one compiles it, or loads it from the cache."""
    from hfopt.kernels import _jit

    seconds: list[float] = []
    original = _jit.Launch.__call__

    def timed(self: _jit.Launch, *args: Any) -> Any:
        begin = time.perf_counter()
        result = original(self, *args)
        if self.__name__ == "run_step":  # type: ignore[attr-defined]
            seconds.append(time.perf_counter() - begin)
        return result

    with mock.patch.object(_jit.Launch, "__call__", timed):
        yield seconds


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
    begin = time.perf_counter()
    with _timed_program() as seconds:
        model.generate(**inputs, do_sample=False, max_new_tokens=args.new_tokens)
    figures["generate"] = time.perf_counter() - begin
    figures["program"] = seconds[0] - min(seconds) if seconds else 0.0
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
