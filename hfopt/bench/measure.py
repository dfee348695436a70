"""Timed generation: one run, alternating runs of the stock and the optimised model, their summary."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from transformers import Cache, PreTrainedModel

import hfopt
from hfopt import host
from hfopt.bench import roofline
from hfopt.machine import env


@dataclass(frozen=True)
class Pair:
    """The models of a comparison: one object in both, or two of the same weights where one's are quantised.

    kv_cache: as in `optimize`, of an object that is both.
    """

    stock: PreTrainedModel
    optimized: PreTrainedModel
    kv_cache: str | None = None

    def ready(self, optimized: bool) -> PreTrainedModel:
        """The stock or the optimised model; one object is made what is asked for."""
        if self.optimized is self.stock:
            if optimized:
                hfopt.optimize(self.stock, kv_cache=self.kv_cache)
            else:
                hfopt.restore(self.stock)
        return self.optimized if optimized else self.stock


def pair_of(make: Callable[[], PreTrainedModel], quantization: str | None) -> Pair:
    """Pair of the model that `make` makes anew at each call, optimised into a format; None: its weights stay as they are."""
    if quantization is None:
        model = make()
        return Pair(model, model)
    # first the one whose float weights are freed: both never are in memory as floats
    optimized = hfopt.optimize(make(), quantization=quantization)
    return Pair(make(), optimized)


@dataclass(frozen=True)
class Case:
    """Something to measure: the stock or the optimised model, and what `generate` gets.

    cache: makes the cache that `generate` starts from, outside the timed part.
    """

    name: str
    optimized: bool
    inputs: dict[str, torch.Tensor]
    options: dict[str, Any]
    cache: Callable[[], Cache] | None = None


@dataclass(frozen=True)
class Sample:
    """One `generate`. Seconds, bytes, bytes a second."""

    sequences: torch.Tensor = field(repr=False)
    total: float
    first: float
    next: list[float]
    peak_memory: int
    bandwidth: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures, for programs."""
        figures = asdict(self)
        del figures["sequences"]
        return figures


def generate(model: Any, case: Case) -> Sample:
    """Run one case on a model that already is in the state that the case asks for."""
    torch.manual_seed(0)
    given = {} if case.cache is None else {str(host.REQUEST_CACHE): case.cache()}
    if dist.is_initialized():
        dist.barrier()  # or the time until another one comes would count
    env.reset_peak_memory()
    begin = time.perf_counter()
    with hfopt.record_latency(model) as timings:
        sequences = model.generate(**case.inputs, **case.options, **given)
    total = time.perf_counter() - begin
    return Sample(sequences, total, statistics.fmean(timings.first), list(timings.next), env.peak_memory())


def alternate(
    pair: Pair,
    cases: Sequence[Case],
    repetitions: int,
    warmup: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[Sample]]:
    """Measure the cases in turn; the first `warmup` rounds do not count.

    Each sample carries the mean of the bandwidths measured just before and just after it. A model that is both of the pair
    is left as the last case asks for.
    """
    meter = roofline.BandwidthMeter()
    before = meter.measure()
    samples: dict[str, list[Sample]] = {case.name: [] for case in cases}
    for index in range(warmup + repetitions):
        for case in cases:
            sample = generate(pair.ready(case.optimized), case)
            after = meter.measure()
            if index >= warmup:
                own = sample.peak_memory - meter.n_bytes  # a user has no meter
                samples[case.name].append(replace(sample, bandwidth=(before + after) / 2, peak_memory=own))
            before = after
            advance()
    return samples


def in_new_process(module: str, *arguments: str, **environment: str) -> Any:
    """Run a module in a new process; returns what it prints as JSON."""
    finished = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(finished.stdout)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all values lie below: ipex.llm's definition, sorted[int(n * share)]."""
    return sorted(values)[int(len(values) * share)]


@dataclass(frozen=True)
class Summary:
    """The figures of a case over its repetitions. Seconds; `next_*` are None when one token was generated."""

    latency: float
    first: float
    next_mean: float | None
    next_p90: float | None
    next_p99: float | None
    tokens_per_second: float
    peak_memory: int
    bandwidth: float
    bandwidth_used: float | None

    @classmethod
    def of(cls, samples: Sequence[Sample], n_rows: int, n_new: int, step_bytes: float) -> "Summary":
        """Summary of samples of `n_rows` texts with `n_new` tokens each, whose steps read `step_bytes` at least."""
        latency = statistics.fmean(sample.total for sample in samples)
        steps = [seconds for sample in samples for seconds in sample.next]
        bandwidth = statistics.fmean(sample.bandwidth for sample in samples)
        return cls(
            latency=latency,
            first=statistics.fmean(sample.first for sample in samples),
            next_mean=statistics.fmean(steps) if steps else None,
            next_p90=percentile(steps, 0.9) if steps else None,
            next_p99=percentile(steps, 0.99) if steps else None,
            tokens_per_second=n_rows * n_new / latency,
            peak_memory=max(sample.peak_memory for sample in samples),
            bandwidth=bandwidth,
            bandwidth_used=step_bytes / statistics.fmean(steps) if steps else None,
        )

    def lines(self) -> Iterator[str]:
        """The summary as ipex.llm's run.py words it, then what it does not say."""
        yield f"Inference latency: {self.latency:.5f} sec."
        yield f"First token average latency: {self.first:.5f} sec."
        if self.next_mean is not None:
            yield f"Average 2... latency: {self.next_mean:.5f} sec."
            yield f"P90 2... latency: {self.next_p90:.5f} sec."
            yield f"P99 2... latency: {self.next_p99:.5f} sec."
        yield f"Throughput: {self.tokens_per_second:.1f} tokens/s"
        yield f"Peak memory: {self.peak_memory / 2**20:.0f} MiB"
        if self.bandwidth_used is not None:
            yield (
                f"Memory bandwidth: {self.bandwidth_used / self.bandwidth:.0%} of the measured "
                f"{self.bandwidth / 1e9:.1f} GB/s (weights and cache at {self.bandwidth_used / 1e9:.1f} GB/s)"
            )


def paired_ratio(stock: Sequence[float], optimized: Sequence[float]) -> float:
    """Median over the repetitions of stock seconds / optimised seconds: how many times as fast."""
    return statistics.median(slow / fast for slow, fast in zip(stock, optimized, strict=True))
