"""A model split over the ranks of this machine, and the whole of it in one process with as many threads, in turn.

    python scripts/ranks.py                           2 ranks of one thread, Llama-3.2-1B's shape, bfloat16
    python scripts/ranks.py --layers 4 --prompt 128   less of it

Each round times a greedy request with the whole model (rank 0, one thread a rank; the others sleep) and one with its parts
(one thread each): the prompt's first token, and the tokens behind it. Printed are medians and the median of the rounds'
ratios, and what sums of a step cost by themselves.

The last lines are a model of what more ranks give: a step takes what one thread takes for what is no weights, the bytes of
the weights / what the ranks' cores read together, and the sums. It is made of measurements with one thread, of the memory,
and of sums, and set beside the step that was measured.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import hfopt
from hfopt.bench.roofline import BandwidthMeter, bytes_per_step
from hfopt.console.models import named_config, random_model
from hfopt.distributed import SharedGroup
from hfopt.machine import env


def timed(model: Any, prompt: torch.Tensor, n_new: int) -> tuple[float, float]:
    """Seconds to the first token, and for each of those behind it."""
    begin = time.perf_counter()
    model.generate(prompt, max_new_tokens=1, min_new_tokens=1, do_sample=False, pad_token_id=0)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    model.generate(
        prompt, max_new_tokens=n_new + 1, min_new_tokens=n_new + 1, do_sample=False, pad_token_id=0
    )
    return first, (time.perf_counter() - begin - first) / n_new


def sum_of(group: SharedGroup, n: int, dtype: torch.dtype) -> float:
    """Seconds of a sum of n values."""
    x = torch.zeros(n, dtype=dtype)
    spans = []
    for _ in range(5):
        group.barrier()
        begin = time.perf_counter()
        for _ in range(200):
            group.all_reduce(x)
        spans.append((time.perf_counter() - begin) / 200)
    return statistics.median(spans)


def bandwidth(meter: BandwidthMeter, threads: int) -> float:
    """Bytes a second that so many threads read."""
    torch.set_num_threads(threads)
    found = meter.measure(passes=2)
    torch.set_num_threads(1)
    return found


class Scaling(NamedTuple):
    """What a step of n ranks is made of: bytes of weights, seconds of what is none; rates of memory, of one core and of all
    cores of a socket; how many sums, and seconds of one: so many, and so many more for each rank beside the first.
    """

    n_bytes: float
    rest: float
    alone: float
    socket: float
    n_sums: int
    latency: float
    by_rank: float

    def seconds(self, n_ranks: int, n_sockets: int = 1) -> float:
        """Of a step."""
        rate = n_sockets * min(n_ranks / n_sockets * self.alone, self.socket)
        sums = self.n_sums * (self.latency + (n_ranks - 1) * self.by_rank)
        return self.rest + self.n_bytes / rate + sums


class Round(NamedTuple):
    """Seconds of a step with one thread and with the ranks; bytes a second of one core and of as many as there are ranks."""

    alone: float
    together: float
    core: float
    socket: float


def scalings(
    rounds: list[Round], n_bytes: float, n_sums: int, sums: tuple[float, float], size: int
) -> list[Scaling]:
    """By what was measured in each round; sums: seconds of one of a step, and of one that is four times as long."""
    one, long = sums
    by_rank = (long - one) / 3 / (size - 1)
    latency = one - (size - 1) * by_rank
    return [
        Scaling(n_bytes, each.alone - n_bytes / each.core, each.core, each.socket, n_sums, latency, by_rank)
        for each in rounds
    ]


def measure(options: argparse.Namespace) -> None:
    """In each rank."""
    dist.init_process_group("gloo")
    rank, size, dtype = dist.get_rank(), dist.get_world_size(), getattr(torch, options.dtype)
    torch.set_num_threads(1)
    whole = None
    if rank == 0:
        torch.set_num_threads(size)
        whole = hfopt.optimize(
            AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype).eval(),
            quantization=options.quantization,
        )
        torch.set_num_threads(1)
    dist.barrier()
    parts = hfopt.load(options.folder, dtype=dtype, tensor_parallel=True, quantization=options.quantization)
    group, meter = SharedGroup(), BandwidthMeter()
    alone = core = socket = 1.0  # of the first rank alone
    prompt = torch.randint(
        5, parts.config.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0)
    )
    rounds: list[Round] = []
    taken: dict[str, list[tuple[float, float]]] = {"whole": [], "parts": []}
    for k in range(options.rounds + 1):  # the first one compiles
        if whole is not None:
            torch.set_num_threads(size)
            found = timed(whole, prompt, options.new)
            torch.set_num_threads(1)
            if k:
                taken["whole"].append(found)
                alone = timed(whole, prompt, options.new)[1]
                core, socket = bandwidth(meter, 1), bandwidth(meter, size)
        dist.barrier()
        found = timed(parts, prompt, options.new)
        if k:
            taken["parts"].append(found)
            rounds.append(Round(alone, found[1], core, socket))
        dist.barrier()
    hidden, n_sums = parts.config.hidden_size, 2 * parts.config.num_hidden_layers + 1
    one_sum, long_sum = (sum_of(group, n, dtype) for n in (hidden, 4 * hidden))
    if rank == 0:
        assert whole is not None
        shape = f"{options.shape}, {parts.config.num_hidden_layers} layers, {options.dtype}"
        print(f"{size} ranks of one thread; {shape}, quantization {options.quantization}; {env.cpu_model()}")
        print(f"prompt of {options.prompt}, {options.new} new tokens, {options.rounds} rounds")
        for place, name in enumerate((f"first token of {options.prompt}", "a token")):
            one, all_of_them = ([each[place] for each in times] for times in taken.values())
            ratios = [b / a for a, b in zip(one, all_of_them, strict=True)]
            print(
                f"{name}: one process, {size} threads {1e3 * statistics.median(one):.2f} ms, "
                f"{size} ranks {1e3 * statistics.median(all_of_them):.2f} ms, ratio {statistics.median(ratios):.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f})"
            )
        print(f"sums of a step by themselves: {1e3 * n_sums * one_sum:.3f} ms")
        n_bytes = bytes_per_step(whole, 1, options.prompt, 1, options.new)
        models = scalings(rounds, n_bytes, n_sums, (one_sum, long_sum), size)

        def middle(values: Iterable[float]) -> float:
            return statistics.median(values)

        print(
            f"one thread: a token {1e3 * middle(each.alone for each in rounds):.2f} ms, "
            f"{1e3 * middle(each.rest for each in models):.2f} ms of it beside reading weights; memory: "
            f"one core {middle(each.core for each in rounds) / 1e9:.1f} GB/s, "
            f"{size} cores {middle(each.socket for each in rounds) / 1e9:.1f} GB/s"
        )
        quotients = [each.together / model.seconds(size) for each, model in zip(rounds, models, strict=True)]
        predicted = middle(model.seconds(size) for model in models)
        print(
            f"{size} ranks: predicted {1e3 * predicted:.2f} ms; measured / predicted {middle(quotients):.3f}"
        )
        for n in (2, 4, 8):
            predicted = middle(model.seconds(n, 2) for model in models)
            print(f"{n} ranks on 2 sockets with this memory each: predicted {1e3 * predicted:.2f} ms")
    dist.barrier()
    os._exit(0)  # gloo's threads may wait


def main() -> None:
    """Make the model, and start the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = named_config(options.shape, options.layers)
        random_model(config, getattr(torch, options.dtype)).save_pretrained(folder)
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.ranks}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HFOPT_PIN": "0"}
        command = [*launcher, __file__, *sys.argv[1:], "--folder", folder]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
