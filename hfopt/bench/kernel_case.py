"""What `hfopt bench --kernels` measures: calls that are timed in turn, and the lines that are drawn from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hfopt.bench import roofline

from .launches import launches


class Call(NamedTuple):
    """Something to time.

    `run` does it `times` times; bytes that it must read or write, and operations, are those of once. Where the bytes of
    the result are given, the memory that it takes beyond them is measured too.
    """

    run: Callable[[], object]
    times: int = 1
    n_bytes: float = 0
    n_operations: float = 0
    result_bytes: int | None = None


class Target(NamedTuple):
    """A line of the table: what is wanted of one call of a case.

    figure: "share" of the limit, or "rate", operations a second: at least `wanted`; "slower" than the other call: at most
    `wanted` times; "faster": at least `wanted` times; "seconds": at most `wanted`. Nothing is wanted where that is None.
    other: name of the call to compare with.
    limits: names of calls that do nothing but what bounds this one. Of those that count the same unit the fastest is the
    limit, of different units the one that is used most.
    """

    title: str
    call: str
    figure: Literal["share", "rate", "slower", "faster", "seconds"]
    wanted: float | None
    other: str | None = None
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """Calls that are timed in turn, and the lines that they fill. `make` allocates what they work on."""

    shapes: str
    make: Callable[[], dict[str, Call]]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Sizes:
    """How large the cases are. `launches` are the calls in one timing of a launch, `seconds` what a case may take."""

    streamed: int = (
        512 << 20
    )  # bytes of weights, or of keys and values, that pass before the first ones come again
    features: tuple[int, int] = (2048, 8192)
    many_rows: tuple[int, ...] = (128, 512, 2048)
    quantized_rows: int = 512
    heads: tuple[tuple[int, int, int], ...] = (
        (32, 8, 64),
        (16, 16, 256),
    )  # of queries, of keys, channels of one
    keys: int = 8192
    shared_keys: int = 4096
    prompts: tuple[int, ...] = (2048, 8192)
    norm_rows: int = 16384
    vocabulary: int = 128 * 1024
    launches: int = 1000
    repetitions: int = 5
    seconds: float = 6.0


FULL = Sizes()
QUICK = Sizes(streamed=128 << 20, many_rows=(128,), prompts=(1024,), norm_rows=4096, repetitions=3)

STREAM = ("torch.sum", "own read")
PEAK = ("multiply-add",)


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random numbers in memory of its own, one block of them again and again."""
    out = torch.empty(shape, dtype=dtype)
    block = (torch.randn(min(1 << 20, out.numel())) / 16).to(dtype)
    for part in out.view(-1).split(len(block)):
        part.copy_(block[: len(part)])
    return out


def rounds_up(total: int, one: int) -> int:
    """How many of size `one` make up `total`."""
    return max(1, -(-total // one))


# ---- calls -----------------------------------------------------------------------------------------------------------


def each(function: Callable[[Any], object], arguments: Sequence[Any]) -> Callable[[], object]:
    """The function on every argument in turn; the last result."""

    def run() -> object:
        result = None
        for argument in arguments:
            result = function(argument)
        return result

    return run


def again(function: Callable[[], object], count: int) -> Call:
    """The function `count` times, for what is too short to be timed once."""

    def run() -> None:
        for _ in range(count):
            function()

    return Call(run, times=count)


def launches_of(function: Callable[[], Any]) -> tuple[Any, list[partial]]:
    """Call the function; its result, and the launches of kernels on the way, which can be made again."""
    with launches() as found:
        result = function()
    return result, [partial(each.kernel, *each.arguments) for each in found]


def launched(function: Callable[[], object]) -> Callable[[], None]:
    """The launches of a call, again with its arguments and into its results: a kernel without what is around it.

    They may hold addresses, but only of what the function keeps or returns.
    """
    result, found = launches_of(function)

    def run(alive: object = (function, result)) -> None:
        for launch in found:
            launch()

    return run


def stream(tensors: Sequence[Tensor]) -> dict[str, Call]:
    """Reading the very memory that a kernel reads."""
    meter = roofline.BandwidthMeter(tensors)
    ways = (meter.read_with_torch, meter.read_with_kernel)
    return {name: Call(run, n_bytes=meter.n_bytes) for name, run in zip(STREAM, ways, strict=True)}


def peak(dtype: torch.dtype) -> dict[str, Call]:
    """Calls that do as many multiply-adds of a dtype as the cores can."""
    most = roofline.MultiplyAdd(dtype)
    return {name: Call(most.run, n_operations=most.operations) for name in PEAK}
