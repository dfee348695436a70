"""A measured choice: whether hfopt's kernel or torch's computes an operation faster on this machine.

There are two such operations: "linear" (`functional.linear` with all that follows the product), in classes by number
of rows, and "attention" (`functional.attend`), in classes by new tokens a row. One new token a row is no class: torch
would need copies of keys and values first, and takes 1.7 (float32) to 40 times as long (bfloat16, beams) here.

A class is timed when it is first needed, on one call that stands for it (`trials.py`), both ways in turn. torch's way is
taken if it is more than 5 % faster and the timings agree; while other work keeps the cores busy, nothing is learnt, and
ours is taken. The answer holds for the rest of the process, and one that was learnt for later processes too: a JSON file
beside the compiled kernels keeps it for this CPU, number of threads and release of torch.
"""

import bisect
import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch

from hfopt.errors import InvalidInput
from hfopt.kernels.linear.rows import ROW_LIMIT
from hfopt.machine.memory import available_memory
from hfopt.words import DTYPES, dtype_name

from . import choice_file

logger = logging.getLogger(__name__)

Kernels: TypeAlias = Literal["auto", "hfopt", "torch"]
KERNELS = ("auto", "hfopt", "torch")

MARGIN = 1.05  # torch has to be faster by this factor, so that noise does not decide
PAIRS = 5
SPARE_PAIRS = 2  # that may be disturbed by other work
QUIET = 0.9  # share of the time that the calling thread has to have had its core
SCRATCH = 128 << 20  # bytes of a trial's weights: more than last-level caches hold


class SizeClass(NamedTuple):
    """Sizes from `first` to the next class's, and the one that is timed for all of them."""

    first: int
    timed: int


# where kernels change (ours behind ROW_LIMIT, torch's attention takes larger blocks from 768 tokens on), and for the linear
# layer also where reading the weights no longer takes the time, from 9 rows on, and where it hardly counts, from 33 on
CLASSES: dict[str, tuple[SizeClass, ...]] = {
    "linear": (
        SizeClass(1, 1),
        SizeClass(2, 4),
        SizeClass(9, 16),
        SizeClass(33, 48),
        SizeClass(ROW_LIMIT + 1, 96),
        SizeClass(128, 192),
    ),
    "attention": (SizeClass(2, 8), SizeClass(32, 256), SizeClass(768, 1024)),
}
_UNITS = {"linear": "row", "attention": "new token"}
_FIRSTS = {operation: [each.first for each in classes] for operation, classes in CLASSES.items()}


class _Verdict(NamedTuple):
    ratio: float  # torch's time / ours, the median
    is_torch: bool

    @classmethod
    def of(cls, ratio: float) -> "_Verdict":
        return cls(ratio, ratio * MARGIN < 1)


_Key: TypeAlias = tuple[str, torch.dtype, int, int]  # operation, dtype, 1 + index of the class, threads
_used: dict[_Key, _Verdict] = {}
_lock = threading.Lock()


def check_kernels(name: str, kernels: object) -> None:
    """Raise `InvalidInput` unless it is one of `KERNELS`."""
    if kernels not in KERNELS:
        raise InvalidInput(f"{name} = {kernels!r}: {', '.join(map(repr, KERNELS))} are allowed")


def takes_torch(by: str, operation: str, dtype: torch.dtype, size: int) -> bool:
    """Whether torch is to compute an operation on `size` rows or new tokens; by "auto", what is faster.

    Raises `InvalidInput` for anything else than "auto", "hfopt" and "torch".
    """
    if by != "auto":
        check_kernels("by", by)
        return by == "torch"
    key = operation, dtype, bisect.bisect(_FIRSTS[operation], size), torch.get_num_threads()
    verdict = _used.get(key)
    return (_decide(key) if verdict is None else verdict).is_torch


def _decide(key: _Key) -> _Verdict:
    # one at a time: two timings at once would measure each other
    with _lock:
        verdict = _used.get(key)
        if verdict is not None:
            return verdict
        operation, dtype, place, n_threads = key
        label = _label(operation, dtype, place)
        ratio = choice_file.read(n_threads).get(label)
        if ratio is None:
            ratios = _measure(operation, dtype, CLASSES[operation][place - 1].timed)
            verdict, is_clear = _conclude(ratios)
            logger.info("%s, %d threads: torch's time / hfopt's %s", label, n_threads, ratios)
            if is_clear:
                choice_file.add(n_threads, label, verdict.ratio)
        else:
            verdict = _Verdict.of(ratio)
        _used[key] = verdict
        return verdict


def _conclude(ratios: list[float]) -> tuple[_Verdict, bool]:
    """What follows from a measurement, and whether it is clear enough to be kept."""
    if not ratios:
        return _Verdict(math.nan, False), False
    verdict = _Verdict.of(round(statistics.median(ratios), 3))
    if verdict.is_torch and sum(ratio < 1 for ratio in ratios) < len(ratios) - 1:
        return _Verdict(verdict.ratio, False), False
    return verdict, True


# ---- timing ------------------------------------------------------------------------------------------------


def _measure(operation: str, dtype: torch.dtype, size: int) -> list[float]:
    """torch's time / ours of PAIRS pairs of calls; none if there is no memory for a trial, or no quiet for it."""
    from .trials import TRIALS  # it calls the operations, which call this file

    if available_memory() < 4 * SCRATCH:
        return []
    run = TRIALS[operation](dtype, size)
    run("hfopt")  # compiles
    run("torch")
    ratios: list[float] = []
    disturbed = 0
    while len(ratios) < PAIRS and disturbed <= SPARE_PAIRS:
        ratio = _pair(run, is_torch_first=bool(len(ratios) % 2))
        if ratio is None:
            disturbed += 1
        else:
            ratios.append(ratio)
    return ratios if len(ratios) == PAIRS else []


def _pair(run: Callable[[Kernels], None], is_torch_first: bool) -> float | None:
    """torch's time / ours of a call each; None if other work took the core away meanwhile.

    Threads that wait for each other then take ten times as long, and a torch that uses one thread seems fast.
    """
    order: tuple[Kernels, Kernels] = ("torch", "hfopt") if is_torch_first else ("hfopt", "torch")
    seconds = {}
    for by in order:
        begin, begin_on_core = time.perf_counter(), time.thread_time()
        run(by)
        seconds[by] = time.perf_counter() - begin
        if time.thread_time() - begin_on_core < QUIET * seconds[by]:
            return None
    return seconds["torch"] / seconds["hfopt"]


# ---- what reports show -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One class of an operation, and what "auto" takes for it.

    kernels: "hfopt" or "torch", None as long as nobody needed it. ratio: torch's time / hfopt's; None if that could not
    be measured (other work on the cores, no memory).
    """

    operation: str
    dtype: str
    sizes: str
    kernels: str | None
    ratio: float | None

    @property
    def label(self) -> str:
        """Operation, dtype and sizes."""
        return f"{self.operation}, {self.dtype}, {self.sizes}"

    @property
    def outcome(self) -> tuple[str, str]:
        """Kernels and ratio in words."""
        if self.kernels is None:
            return "not needed yet", ""
        return self.kernels, "not measurable" if self.ratio is None else f"{self.ratio:.2f}"


def is_known_for_torch(operation: str, dtype: torch.dtype, size: int) -> bool:
    """Whether "auto" is known to take torch's kernels; measures nothing."""
    n_threads = torch.get_num_threads()
    key = operation, dtype, bisect.bisect(_FIRSTS[operation], size), n_threads
    verdict = _known(key, choice_file.read(n_threads))
    return verdict is not None and verdict.is_torch


def _known(key: _Key, stored: dict[str, float]) -> _Verdict | None:
    """What this process uses, or else what the file of this machine holds."""
    verdict, label = _used.get(key), _label(*key[:3])
    if verdict is None and label in stored:
        verdict = _Verdict.of(stored[label])
    return verdict


def choices() -> list[Choice]:
    """All classes at torch's number of threads: what this process uses, or else what the file of this machine holds."""
    n_threads = torch.get_num_threads()
    stored = choice_file.read(n_threads)
    found = []
    for operation, dtype, place in _classes():
        verdict = _known((operation, dtype, place, n_threads), stored)
        kernels = None if verdict is None else "torch" if verdict.is_torch else "hfopt"
        ratio = None if verdict is None or math.isnan(verdict.ratio) else verdict.ratio
        found.append(Choice(operation, dtype_name(dtype), _sizes(operation, place), kernels, ratio))
    return found


def choose_all() -> None:
    """Measure every class that has no answer yet."""
    for operation, dtype, place in _classes():
        takes_torch("auto", operation, dtype, CLASSES[operation][place - 1].first)


def settle(dtype: torch.dtype, first: Callable[[int], int]) -> None:
    """Take in each class of this dtype what `first` makes of the answer here, for the rest of the process: processes that
    have a model together must not differ.
    """
    n_threads = torch.get_num_threads()
    for operation, each, place in _classes():
        if each is dtype:
            size = CLASSES[operation][place - 1].first
            is_torch = bool(first(takes_torch("auto", operation, dtype, size)))
            key = operation, dtype, place, n_threads
            _used[key] = _used[key]._replace(is_torch=is_torch)


def _classes() -> Iterator[tuple[str, torch.dtype, int]]:
    for operation, classes in CLASSES.items():
        for dtype in DTYPES:
            for place in range(1, len(classes) + 1):
                yield operation, dtype, place


def _sizes(operation: str, place: int) -> str:
    classes, unit = CLASSES[operation], _UNITS[operation]
    first = classes[place - 1].first
    if place == len(classes):
        return f"{first} {unit}s and more"
    last = classes[place].first - 1
    return f"{first} {unit}" if first == last else f"{first}-{last} {unit}s"


def _label(operation: str, dtype: torch.dtype, place: int) -> str:
    return f"{operation}, {dtype_name(dtype)}, {_sizes(operation, place)}"
