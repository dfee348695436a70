"""`hfopt bench --kernels`: every kernel beside what it replaces and what the machine can do, in the same minute.

The calls of a case are timed in turn, round after round, and compared by the medians of the ratios within a round: on a
shared machine the bandwidth swings within minutes.
"""

import argparse
import ctypes
import gc
import statistics
import time
from typing import Any

import torch

from hfopt.bench import roofline
from hfopt.console.output import progress, say, show_table, write_json
from hfopt.errors import InvalidInput
from hfopt.machine import env
from hfopt.words import DTYPES, dtype_name

from .kernel_case import FULL, QUICK, Call, Case, Target
from .kernel_cases import GROUPS

Samples = dict[str, list[float]]  # seconds of each call, a round each
Memory = dict[str, int]  # bytes that a call takes beyond its result

_COLUMNS = ["kernel", "shapes", "time", "measured", "wanted", "met", "of the limit"]
_MIN_ROUNDS = 3  # rounds of a case that takes long
_SIGNS = {"share": "≥", "rate": "≥", "faster": "≥", "slower": "≤", "seconds": "≤"}


def run(args: argparse.Namespace, machine: dict[str, Any]) -> int:
    """Measure the groups of `--kernels` and show them; the exit code. machine: what JSON says about it."""
    names = list(GROUPS) if args.kernels == "all" else args.kernels.split(",")
    if not set(names) <= set(GROUPS):
        raise InvalidInput(f"--kernels={args.kernels} must name some of {', '.join(GROUPS)}")
    sizes = QUICK if args.quick else FULL
    cases = [(name, case) for name in GROUPS if name in names for case in GROUPS[name](sizes)]
    rows = []
    with progress("Measuring kernels", len(cases)) as advance, torch.inference_mode():
        for name, case in cases:
            rows += [{"group": name} | row for row in measure(case, sizes.repetitions, sizes.seconds)]
            advance()
    peaks = {dtype_name(dtype): roofline.MultiplyAdd(dtype).measure() for dtype in (*DTYPES, torch.int8)}
    report: dict[str, Any] = {
        "configuration": machine
        | {
            "threading layer": env.threading_layer(),
            "multiply-adds": ", ".join(f"{name} {rate / 1e9:,.0f} GOP/s" for name, rate in peaks.items()),
        },
        "rows": rows,
    }
    if args.json != "-":
        for key, value in report["configuration"].items():
            say(f"{key:<18}{value}")
        say("")
        show_table(_COLUMNS, [line_of(row) for row in rows])
    if args.json is not None:
        write_json(args.json, report)
    return 0


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(case: Case, repetitions: int, seconds: float) -> list[dict[str, Any]]:
    """The figures of a case's lines, from `repetitions` rounds of its calls after one that does not count.

    Fewer rounds, but at least 3, where they would take more than `seconds`.
    """
    gc.collect()  # memory of the case before this one
    calls = case.make()
    _round(calls)
    memory = {name: 0 for name, call in calls.items() if call.result_bytes is not None}
    rounds = [_round(calls, memory)]
    fitting = int(seconds / sum(rounds[0][name] * call.times for name, call in calls.items()))
    rounds += [_round(calls) for _ in range(max(min(repetitions, fitting), _MIN_ROUNDS) - 1)]
    samples = {name: [seconds[name] for seconds in rounds] for name in calls}
    return [
        {"title": target.title, "shapes": case.shapes} | _figures(target, calls, samples, memory)
        for target in case.targets
    ]


def _round(calls: dict[str, Call], memory: Memory | None = None) -> dict[str, float]:
    """Seconds of each call, one after the other; fills in what the calls named in `memory` take."""
    seconds = {}
    for name, call in calls.items():
        if memory is not None and call.result_bytes is not None:
            # what the C library keeps of memory that was given back would hide what is taken anew
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
            before = env.resident_memory()
            env.reset_peak_memory()
        begin = time.perf_counter()
        call.run()
        seconds[name] = (time.perf_counter() - begin) / call.times
        if memory is not None and call.result_bytes is not None:
            memory[name] = max(0, env.peak_memory() - before - call.result_bytes)
    return seconds


def _figures(target: Target, calls: dict[str, Call], samples: Samples, memory: Memory) -> dict[str, Any]:
    ours = samples[target.call]
    limit = max(_limits(target.call, target, calls, samples), key=_share)
    figures: dict[str, Any] = {
        "figure": target.figure,
        "wanted": target.wanted,
        "seconds": statistics.median(ours),
        "limit": limit,
        "memory": memory.get(target.call),
        "samples": {name: samples[name] for name in calls},
    }
    if target.other is not None:
        other = samples[target.other]
        figures["other"] = {
            "name": target.other,
            "seconds": statistics.median(other),
            "memory": memory.get(target.other),
        }
        ratios = [a / b for a, b in zip(ours, other, strict=True)]
        figures["measured"] = statistics.median(1 / r if target.figure == "faster" else r for r in ratios)
        if target.figure == "slower":
            # the other call may be bound by another limit: what the ratio would be if both reached theirs
            bound = max(_limits(target.other, target, calls, samples), key=_share)
            figures["possible"] = figures["measured"] * limit["share"] / bound["share"]
    else:
        of_limit = {"share": limit["share"], "rate": limit["reached"]}
        figures["measured"] = figures["seconds"] if target.figure == "seconds" else of_limit[target.figure]
    if target.wanted is not None:
        at_most = _SIGNS[target.figure] == "≤"
        figures["met"] = (
            figures["measured"] <= target.wanted if at_most else figures["measured"] >= target.wanted
        )
    return figures


def _limits(name: str, target: Target, calls: dict[str, Call], samples: Samples) -> list[dict[str, Any]]:
    """The limits of a call, the fastest of each unit: its name, and the call's share of its rate."""
    by_unit: dict[str, list[dict[str, Any]]] = {}
    call, ours = calls[name], samples[name]
    for name in target.limits:
        limit, theirs = calls[name], samples[name]
        unit = "GB/s" if limit.n_bytes else "GOP/s" if limit.n_operations else "calls/s"
        work, most = {
            "GB/s": (call.n_bytes, limit.n_bytes),
            "GOP/s": (call.n_operations, limit.n_operations),
            "calls/s": (1, 1),
        }[unit]
        rates = [most / seconds for seconds in theirs]
        reached = [work / seconds for seconds in ours]
        by_unit.setdefault(unit, []).append(
            {
                "name": name,
                "unit": unit,
                "rate": statistics.median(rates),
                "reached": statistics.median(reached),
                "share": statistics.median(a / b for a, b in zip(reached, rates, strict=True)),
            }
        )
    return [max(limits, key=lambda limit: limit["rate"]) for limits in by_unit.values()]


def _share(limit: dict[str, Any]) -> float:
    return limit["share"]


# ---- lines -----------------------------------------------------------------------------------------------------------


def line_of(row: dict[str, Any]) -> list[str]:
    """The cells of the table."""
    figure, wanted = row["figure"], row["wanted"]
    measured = _amount(figure, row["measured"])
    if "other" in row:
        other = row["other"]
        measured += f" {other['name'].removeprefix('linear, ')}'s {_time(other['seconds'])}"
        if "possible" in row:
            measured += f"; the limits allow {_amount(figure, row['possible'])}"
        if row["memory"] is not None:
            measured += f"; memory {_memory(row['memory'])}, {other['name']}'s {_memory(other['memory'])}"
    return [
        row["title"],
        row["shapes"],
        _time(row["seconds"]),
        measured,
        "" if wanted is None else f"{_SIGNS[figure]} {_amount(figure, wanted)}",
        "" if wanted is None else "yes" if row["met"] else "NO",
        _limit_text(row["limit"]),
    ]


def _amount(figure: str, value: float) -> str:
    if figure == "share":
        return f"{value:.0%}"
    if figure == "rate":
        return f"{value / 1e9:,.0f} GOP/s"
    return f"{value * 1e6:.1f} µs" if figure == "seconds" else f"{value:.2f} ×"


def _limit_text(limit: dict[str, Any]) -> str:
    if limit["unit"] == "calls/s":
        return f"{limit['name']} {_time(1 / limit['rate'])}"
    return (
        f"{limit['share']:.0%}: {limit['reached'] / 1e9:.1f} of {limit['rate'] / 1e9:.1f} {limit['unit']}, "
        f"{limit['name']}"
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _memory(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
