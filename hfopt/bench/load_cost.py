"""What `hfopt.load` takes; `hfopt bench` runs this module in processes of their own, so that peaks are its own.

    python -m hfopt.cli.load_cost FOLDER [--quantization NAME] [--save FOLDER]

prints a JSON object with seconds and bytes.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import hfopt
from hfopt.console import models
from hfopt.console.output import progress, say
from hfopt.machine import env

from .measure import in_new_process

FORMATS = {f"load-{name}": name for name in ("int8", "int4")}
NAMES = tuple(FORMATS)
COLUMNS = ["load", "seconds", "wanted", "result", "peak of memory", "wanted", "from the disk"]
_WANTED = {"floats": 20.0, "saved": 2.0}  # seconds
_MAX_BESIDE = 1e9  # bytes beside the result


def figures_of(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Measure loading in each format, from a folder of bfloat16 and from a saved one: medians, and every sample.

    The first process of each kind does not count: after it the files are in the system's page cache, and kernels in theirs.
    """
    rounds = 1 if args.quick else 3
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        floats = os.path.join(root, "floats")
        with progress(f"Writing random weights of {args.shape}"):
            config = models.named_config(args.shape, args.layers)
            models.random_model(config, torch.bfloat16).save_pretrained(floats)
        with progress("Loading in new processes", 2 * (rounds + 1) * len(names)) as advance:
            for name in names:
                quantization, saved = FORMATS[name], os.path.join(root, name)
                ways = {
                    "floats": (floats, "--quantization", quantization, "--save", saved),
                    "saved": (saved,),
                }
                figures[name] = {"quantization": quantization}
                for way, arguments in ways.items():
                    samples = []
                    for index in range(rounds + 1):
                        os.sync()  # what was written must not be on its way to the disk meanwhile
                        # saved by the first one alone
                        samples.append(in_new_process(__name__, *arguments[: 3 if index else None]))
                        advance()
                    figures[name][way] = _medians(samples[1:]) | {"samples": samples[1:]}
    return figures


def _medians(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}


def lines_of(rows: dict[str, Any]) -> list[list[str]]:
    """The lines of their table."""
    lines = []
    for row in rows.values():
        for way, of in (("floats", "bfloat16"), ("saved", "what was saved")):
            one = row[way]
            lines.append(
                [
                    f"{row['quantization']} from {of}",
                    f"{one['seconds']:.2f} s",
                    f"≤ {_WANTED[way]:.0f} s",
                    _gigabytes(one["result"]),
                    _gigabytes(one["peak"]),
                    f"≤ {_gigabytes(one['result'] + _MAX_BESIDE)}",
                    _gigabytes(one["fetched"]),
                ]
            )
    return lines


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


def _size(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers, of each once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--quantization")
    parser.add_argument("--save")
    args = parser.parse_args()
    disable_progress_bar()  # the bench has one of its own
    memory, fetched = env.resident_memory(), env.bytes_fetched()
    env.reset_peak_memory()
    begin = time.perf_counter()
    model = hfopt.load(args.folder, quantization=args.quantization)
    figures = {
        "seconds": time.perf_counter() - begin,
        "result": _size(model),
        "peak": env.peak_memory() - memory,
        "fetched": env.bytes_fetched() - fetched,
    }
    if args.save is not None:
        hfopt.save(model, args.save)
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
