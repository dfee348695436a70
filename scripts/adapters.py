"""What LoRA adapters that are not merged add to a decode step, turn by turn with the same model without them.

    python scripts/adapters.py                       llama-3.2-1b in bfloat16, all projections, rank 16
    python scripts/adapters.py --rank 64 --layers 4

One adapter in one row, and four of them in eight rows. Adapters are float32, as peft makes them, or of the model's dtype.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import peft
import torch

import hfopt
from hfopt.bench.cases import Workload
from hfopt.bench.profile import ReadyStep
from hfopt.console import models

_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_NAMES = ("one", "two", "three", "four")
_STEPS = 4  # in a row


def _step(model: Any, n_rows: int) -> ReadyStep:
    with torch.inference_mode():
        return ReadyStep(model, Workload(128, 4, n_rows=n_rows, filled=True))


def _seconds(step: ReadyStep) -> float:
    begin = time.perf_counter()
    for _ in range(_STEPS):
        step.whole()
    return (time.perf_counter() - begin) / _STEPS


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--same-dtype", action="store_true", help="adapters of the model's dtype")
    arguments = parser.parse_args()
    model = models.random_model(models.named_config(arguments.shape, arguments.layers), torch.bfloat16)
    hfopt.optimize(model, kernels="hfopt")
    plain = {n_rows: _step(model, n_rows) for n_rows in (1, 8)}
    config = peft.LoraConfig(r=arguments.rank, target_modules=_PROJECTIONS, init_lora_weights=False)
    wide = not arguments.same_dtype
    adapted: Any = peft.get_peft_model(model, config, _NAMES[0], autocast_adapter_dtype=wide)
    for name in _NAMES[1:]:
        adapted.add_adapter(name, config, autocast_adapter_dtype=wide)
    adapted.eval()
    steps = {1: _step(model, 1)}
    with adapted._enable_peft_forward_hooks(adapter_names=[*_NAMES, *_NAMES]):
        steps[8] = _step(model, 8)
    ratios: dict[int, list[float]] = {1: [], 8: []}
    seconds: dict[int, list[float]] = {1: [], 8: []}
    for index in range(arguments.rounds):
        for n_rows, step in steps.items():
            pair = [plain[n_rows], step] if index % 2 else [step, plain[n_rows]]
            found = {each: _seconds(each) for each in pair}
            ratios[n_rows].append(found[step] / found[plain[n_rows]])
            seconds[n_rows].append(found[plain[n_rows]])
    for n_rows, title in ((1, "1 adapter in 1 row"), (8, "4 adapters in 8 rows")):
        low, middle, high = statistics.quantiles(ratios[n_rows], n=4)
        print(
            f"{title:22} {1e3 * statistics.median(seconds[n_rows]):7.2f} ms without,"
            f" {100 * (middle - 1):+5.1f} % ({100 * (low - 1):+.1f} to {100 * (high - 1):+.1f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
