"""The share of the memory's bandwidth that decode steps of several shapes reach, in turn.

    python scripts/shares.py llama-3.2-1b gemma-3-1b gpt-neox-1.4b      named shapes, or files of configurations
    python scripts/shares.py llama-2-7b falcon-7b --layers 4            all of them shrunk
    python scripts/shares.py llama-3.2-1b phi-4-mini:8                  one of them

A step of one row is made behind 512 tokens, from random weights in bfloat16, and the bandwidth is measured right before and
behind: it changes within seconds on machines that others use. Medians of --rounds, and of the differences from the first.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import hfopt
from hfopt.bench import roofline
from hfopt.bench.cases import Workload
from hfopt.bench.profile import ReadyStep
from hfopt.console import models

_WORKLOAD = Workload(512, 32, filled=True)
_STEPS = 8  # in a row


class Measured:
    """A shape, and the shares that its steps have reached."""

    def __init__(self, shape: str, n_layers: int | None) -> None:
        name, _, own = shape.partition(":")
        config = models.named_config(name, int(own) if own else n_layers)
        self.model = models.random_model(config, torch.bfloat16)
        hfopt.optimize(self.model, kernels="hfopt")
        self.shape = shape
        with torch.inference_mode():
            self.ready = ReadyStep(self.model, _WORKLOAD)
        self.n_bytes = sum(self.ready.bytes_read)
        self.seconds: list[float] = []
        self.shares: list[float] = []

    def measure(self, meter: roofline.BandwidthMeter) -> None:
        self.ready.whole()
        before = meter.measure()
        steps = []
        for _ in range(_STEPS):
            begin = time.perf_counter()
            self.ready.whole()
            steps.append(time.perf_counter() - begin)
        bandwidth = (before + meter.measure()) / 2
        self.seconds.append(statistics.median(steps))
        self.shares.append(self.n_bytes / self.seconds[-1] / bandwidth)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("shapes", nargs="+", help="names or files; :N for N layers")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    meter = roofline.BandwidthMeter()
    measured = [Measured(shape, arguments.layers) for shape in arguments.shapes]
    for _ in range(arguments.rounds):
        for each in measured:
            each.measure(meter)
    first = measured[0]
    for each in measured:
        differences = [share - other for share, other in zip(each.shares, first.shares, strict=True)]
        low, middle, high = statistics.quantiles(differences, n=4)
        print(
            f"{each.shape:20} {statistics.median(each.seconds) * 1e3:7.2f} ms  {each.n_bytes / 1e9:5.2f} GB"
            f"  {statistics.median(each.shares):5.1%} of the limit"
            f"  {100 * middle:+5.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
