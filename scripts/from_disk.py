"""Tokens of a model whose weights do not fit into memory, against the disk: turn by turn in one process.

    python scripts/from_disk.py FOLDER --make                       write a model of random weights, llama-3.2-1b in bfloat16
    python scripts/from_disk.py FOLDER                              with memory for two thirds of its weights
    python scripts/from_disk.py FOLDER --memory all                 with what is there, in a control group say

The figure is the time of a token / (bytes of weights that a step has to read / rate of the disk). The rate is that of
another file, of the same disk, which is read from end to end in the same way, as pages of a mapped file, after the system
has been told to forget it. What was really read, by the counters of the system, and what is in memory is printed beside it.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import hfopt
from hfopt.console import models
from hfopt.machine import env, pages
from hfopt.streaming import DiskUse, disk_use

_PROBE_BYTES, _LAYER = 1 << 30, 1 << 27
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Disk:
    """A file of random numbers beside a model."""

    def __init__(self, folder: Path) -> None:
        file = folder / "probe.bin"
        if not file.exists():
            with open(file, "wb") as target:
                for _ in range(_PROBE_BYTES >> 24):
                    target.write(os.urandom(1 << 24))
                target.flush()
                os.fsync(target.fileno())
        self._storage = torch.UntypedStorage.from_file(str(file), False, _PROBE_BYTES)
        (self._all,) = pages.extents([(self._storage.data_ptr(), _PROBE_BYTES)])

    def rate(self) -> float:
        """Bytes a second, of a cold file, of which no more than two layers' worth is in memory at a time."""
        pages.give_back([self._all])
        begin = time.perf_counter()
        behind = None
        for first in range(0, _PROBE_BYTES, _LAYER):
            address, offset = self._all.address + first, self._all.offset + first
            part = self._all._replace(address=address, n_bytes=_LAYER, offset=offset)
            pages.fetch(part)
            if behind is not None:
                pages.give_back([behind])
            behind = part
        seconds = time.perf_counter() - begin
        pages.give_back([self._all])
        return _PROBE_BYTES / seconds


def _make(folder: Path, shape: str, n_layers: int | None, dtype: torch.dtype, format: str | None) -> None:
    model: Any = models.random_model(models.named_config(shape, n_layers), dtype)
    model.generation_config.eos_token_id = None
    if format is not None:
        hfopt.optimize(model, quantization=format)
    hfopt.save(model, folder)


def _disk(model: Any) -> DiskUse:
    use = disk_use(model)
    assert use is not None
    return use


def _measure(model: Any, disk: Disk, ids: torch.Tensor, n_tokens: int) -> tuple[float, float, int, float]:
    """(seconds of a token, bytes fetched for each, bytes in memory then, rate of the disk before and after it)."""
    before = disk.rate()
    fetched = env.bytes_fetched()
    with hfopt.record_latency(model) as timings:
        model.generate(ids, max_new_tokens=n_tokens + 1, do_sample=False)
    fetched = env.bytes_fetched() - fetched
    present, after = _disk(model).present, disk.rate()
    # the prompt reads as much as a token
    return statistics.mean(timings.next), fetched / (n_tokens + 1), present, 2 / (1 / before + 1 / after)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", action="store_true", help="write the model, and nothing else")
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="in place of all")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--format", help="int8, int4 or nf4")
    parser.add_argument(
        "--memory", help="for weights: bytes, 2GiB, or all; two thirds of them if it is not given"
    )
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="1 where other processes use the machine")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.make:
        _make(arguments.folder, arguments.shape, arguments.layers, _DTYPES[arguments.dtype], arguments.format)
        return 0
    n_bytes = sum(file.stat().st_size for file in arguments.folder.glob("*.safetensors"))
    memory = arguments.memory or str(n_bytes * 2 // 3)
    budget = None if memory == "all" else {"cpu": int(memory) if memory.isdigit() else memory}
    begin = time.perf_counter()
    model: Any = hfopt.load(arguments.folder, device_map="disk", max_memory=budget)
    print(
        f"{env.cpu_path()}; {torch.get_num_threads()} threads; files of {n_bytes / 2**20:,.0f} MiB",
        flush=True,
    )
    print(f"loaded in {time.perf_counter() - begin:.1f} s; {_disk(model)}", flush=True)
    ids = torch.randint(3, model.config.vocab_size, (1, arguments.prompt))
    disk, ratios, most = Disk(arguments.folder), [], 0
    model.generate(ids, max_new_tokens=2, do_sample=False)
    for _ in range(arguments.rounds):
        seconds, fetched, present, rate = _measure(model, disk, ids, arguments.tokens)
        use = _disk(model)
        most = max(most, present)
        ratios.append(seconds / (use.step / rate))
        print(
            f"  {1e3 * seconds:8.1f} ms a token, {use.step / 2**20:,.0f} MiB a step ({fetched / 2**20:,.0f} MiB fetched); "
            f"the disk reads {rate / 1e9:.2f} GB/s: {1e3 * use.step / rate:,.1f} ms; ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(
        f"ratio {statistics.median(ratios):.3f} (median of {len(ratios)}); of the parts at most {most / 2**20:,.0f} MiB in "
        f"memory, {_disk(model).budget / 2**20:,.0f} MiB allowed; peak of the process {env.peak_memory() / 2**20:,.0f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
