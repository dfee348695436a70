"""A long prompt and the steps behind it: by ranks of one thread together, and by one process of as many threads, in turn.

    python scripts/ring.py                                   llama-3.2-1b of two layers, 8,192 tokens, 2 ranks
    python scripts/ring.py llama-2-7b --tokens 16384 --ranks 4

Each round asks one after the other; processes that are not asked sleep. Printed are medians of the rounds, that of the
quotients of each round, the seconds of all cores (of the whole request, which others that use the machine disturb less), and
what a process holds of keys and values.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor

import hfopt
from hfopt.cache import IndirectCache
from hfopt.console import models
from hfopt.generation import prefill
from hfopt.machine import env

_PRINTED = (("prompt", "s", 1.0), ("cores", "s", 1.0), ("step", "ms", 1e3), ("bytes", "MiB", 2.0**-20))
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def work(given: argparse.Namespace) -> None:
    """What a process does: a request for each line that it reads, and a line that says how long it took."""
    torch.set_num_threads(given.threads)
    model: Any = models.random_model(models.named_config(given.shape, given.layers), _DTYPES[given.dtype])
    is_one = given.store is not None
    if is_one:
        store = f"file://{given.store}"
        dist.init_process_group("gloo", init_method=store, rank=given.rank, world_size=given.ranks)
    hfopt.optimize(model, context_parallel=is_one, kernels=given.kernels)
    caches: list[IndirectCache] = []
    _note_caches(caches)
    ids = torch.randint(10, model.config.vocab_size - 1, (1, given.tokens))
    torch.manual_seed(0)
    dist.broadcast(ids, 0) if is_one else None
    _ask(model, ids[:, :1280], given.steps)  # compiles
    print("{}", flush=True)
    for _ in sys.stdin:
        caches.clear()
        print(json.dumps({**_ask(model, ids, given.steps), "bytes": _held(caches[-1])}), flush=True)


def _note_caches(caches: list[IndirectCache]) -> None:
    """Remember the caches of prompts."""
    theirs = prefill.with_cache

    def noted(model: Any, inputs: dict[str, Any], cache: Any) -> dict[str, Any]:
        caches.append(cache)
        return theirs(model, inputs, cache)

    prefill.with_cache = noted


def _ask(model: Any, ids: Tensor, steps: int) -> dict[str, float]:
    begin = time.process_time()
    with hfopt.record_latency(model) as latency:
        model.generate(ids, max_new_tokens=steps + 1, min_new_tokens=steps + 1, do_sample=False)
    cores = time.process_time() - begin
    return {"prompt": latency.first[0], "step": statistics.median(latency.next), "cores": cores}


def _held(cache: IndirectCache) -> int:
    """Bytes of keys and values, without room for more."""
    return sum(layer.prefix_len * (layer.prefix.nbytes // layer.prefix.shape[3]) for layer in cache.layers)


class Worker:
    """A process that does `work`."""

    def __init__(self, arguments: list[str], threads: int, *more: str) -> None:
        command = [sys.executable, __file__, *arguments, "--threads", str(threads), *more]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def begin(self) -> None:
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)

    def end(self) -> dict[str, float]:
        assert self._process.stdout is not None
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def together(workers: list[Worker]) -> dict[str, float]:
    """What the slowest of them says; of the time of cores the sum."""
    for worker in workers:
        worker.begin()
    said = [worker.end() for worker in workers]
    kinds = {name: [each[name] for each in said] for name in said[0]}
    return {name: sum(each) if name == "cores" else max(each) for name, each in kinds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("shape", nargs="?", default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, default=2, help="of the shape")
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt")
    parser.add_argument("--steps", type=int, default=16, help="behind it")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--kernels", choices=("auto", "hfopt"), default="auto")
    for name in ("--rank", "--threads", "--store"):  # of a process
        parser.add_argument(name, type=str if name == "--store" else int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.threads:
        work(given)
        return 0
    print(
        f"{given.shape}, {given.layers} layers, {given.dtype}, prompt of {given.tokens}, {env.cpu_path()}, {given.kernels}"
    )
    with tempfile.TemporaryDirectory() as folder:
        store, arguments = str(Path(folder, "store")), sys.argv[1:]
        one = [Worker(arguments, given.ranks)]
        one[0].end()
        ranks = [Worker(arguments, 1, "--store", store, "--rank", str(rank)) for rank in range(given.ranks)]
        rounds: list[tuple[dict[str, float], dict[str, float]]] = []
        try:
            for worker in ranks:
                worker.end()
            for _ in range(given.rounds):
                rounds.append((together(one), together(ranks)))
                seconds = "  ".join(f"{each['prompt']:.2f} s" for each in rounds[-1])
                print(f"prompt by one process, by {given.ranks} ranks: {seconds}", flush=True)
        finally:
            for worker in (*one, *ranks):
                worker.close()
    for name, unit, factor in _PRINTED:
        alone, shared = ([factor * each[place][name] for each in rounds] for place in (0, 1))
        quotient = statistics.median(ours / theirs for theirs, ours in zip(alone, shared, strict=True))
        numbers = (
            f"{statistics.median(alone):8.2f} {statistics.median(shared):8.2f} {unit:4} {quotient:.2f} x"
        )
        print(f"{name:8} one process, {given.ranks} ranks: {numbers}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
