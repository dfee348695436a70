"""`hfopt bench --kernels`: its figures from samples that are known, and every case on small shapes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hfopt.bench import kernel_case, kernel_cases, roofline
from hfopt.bench import kernels as bench_kernels
from hfopt.bench.kernel_case import Call, Case, Sizes, Target
from hfopt.cli import main
from hfopt.functional import rms_norm
from hfopt.kernels import peak
from hfopt.words import DTYPES

pytestmark = pytest.mark.usefixtures("quick_limits")

TINY = Sizes(
    streamed=1 << 16,
    features=(128, 256),
    many_rows=(40,),
    quantized_rows=40,
    heads=((4, 2, 16), (2, 2, 32)),
    keys=70,
    shared_keys=70,
    prompts=(33, 40),
    norm_rows=9,
    vocabulary=300,
    launches=2,
    repetitions=2,
)


class Clock:
    """Calls that advance `perf_counter` by given seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(bench_kernels.time, "perf_counter", lambda: self.now)

    def call(self, name: str, *seconds: float, **work: Any) -> Call:
        """A call that takes these seconds, one after the other, and the last ones from then on."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Call(run, **work)


def figures_of(calls: dict[str, Call], *targets: Target, seconds: float = 1e9) -> list[dict[str, Any]]:
    return bench_kernels.measure(Case("shapes", lambda: calls, targets), 5, seconds)


def test_calls_alternate_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {"a": clock.call("a", 100.0, 2.0), "b": clock.call("b", 100.0, 1.0)}
    (row,) = figures_of(calls, Target("t", "a", "slower", 2.0, "b", ("b",)))
    assert clock.calls == ["a", "b"] * 6
    assert row["samples"] == {"a": [2.0] * 5, "b": [1.0] * 5}
    assert (row["measured"], row["met"]) == (2.0, True)


def test_a_long_case_has_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {"a": clock.call("a", 1.0, times=2), "b": clock.call("b", 1.0)}
    (row,) = figures_of(calls, Target("t", "a", "seconds", 1.0, limits=("b",)), seconds=4.0)
    assert row["samples"]["a"] == [0.5] * 3
    assert len(clock.calls) == 2 * 4


def test_ratios_are_those_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # the machine gets four times as slow: medians of each alone would say 5 / 1
    ours = clock.call("ours", 0.0, 1.0, 1.0, 5.0, 5.0, 5.0)
    torchs = clock.call("torch", 0.0, 2.0, 2.0, 1.0, 10.0, 10.0)
    (row,) = figures_of(
        {"ours": ours, "torch": torchs}, Target("t", "ours", "faster", 2.1, "torch", ("torch",))
    )
    assert (row["measured"], row["met"]) == (2.0, False)
    assert "2.00 × torch's 2000.00 ms" in bench_kernels.line_of(row)
    assert bench_kernels.line_of(row)[4:6] == ["≥ 2.10 ×", "NO"]


def test_the_limit_is_the_fastest_way_and_the_resource_that_binds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {
        "slow read": clock.call("", 2.0, n_bytes=10e9),
        "fast read": clock.call("", 1.0, n_bytes=10e9),
        "arithmetic": clock.call("", 1.0, n_operations=100e9),
        "few": clock.call("", 1.0, n_bytes=8e9, n_operations=10e9),
        "many": clock.call("", 2.0, times=2, n_bytes=2e9, n_operations=90e9),
    }
    names = ("slow read", "fast read", "arithmetic")
    few, many = figures_of(
        calls, *(Target("t", name, "share", 0.85, limits=names) for name in ("few", "many"))
    )
    assert few["limit"]["name"] == "fast read"
    assert few["measured"] == pytest.approx(0.8)
    assert not few["met"]
    assert bench_kernels.line_of(few)[-1] == "80%: 8.0 of 10.0 GB/s, fast read"
    assert many["limit"]["name"] == "arithmetic"
    assert many["measured"] == pytest.approx(0.9)
    assert many["met"]
    assert bench_kernels.line_of(many)[-1] == "90%: 90.0 of 100.0 GOP/s, arithmetic"


def test_a_ratio_comes_with_the_one_that_the_limits_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {
        "read": clock.call("", 1.0, n_bytes=10e9),
        "arithmetic": clock.call("", 1.0, n_operations=100e9),
        "one": clock.call("", 1.25, n_bytes=10e9, n_operations=40e9),
        "four": clock.call("", 2.5, n_bytes=10e9, n_operations=160e9),
    }
    (row,) = figures_of(calls, Target("t", "four", "slower", 1.25, "one", ("read", "arithmetic")))
    assert row["measured"] == 2.0
    assert row["possible"] == pytest.approx(1.6)  # 1.6 s of arithmetic, 1 s of reading
    assert bench_kernels.line_of(row)[3] == "2.00 × one's 1250.00 ms; the limits allow 1.60 ×"


def test_a_launch_is_judged_by_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {"empty": clock.call("", 1e-3, times=1000), "kernel": clock.call("", 9e-3, times=1000)}
    (row,) = figures_of(calls, Target("t", "kernel", "seconds", 8e-6, limits=("empty",)))
    assert bench_kernels.line_of(row)[2:] == ["9.0 µs", "9.0 µs", "≤ 8.0 µs", "NO", "empty 1.0 µs"]


def test_operations_are_judged_by_their_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {
        "arithmetic": clock.call("", 1.0, n_operations=900e9),
        "ours": clock.call("", 2.0, n_operations=900e9),
    }
    (row,) = figures_of(calls, Target("t", "ours", "rate", 1.5e12, limits=("arithmetic",)))
    assert bench_kernels.line_of(row)[3:] == [
        "450 GOP/s",
        "≥ 1,500 GOP/s",
        "NO",
        "50%: 450.0 of 900.0 GOP/s, arithmetic",
    ]


def test_nothing_is_wanted_of_a_line_without_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    (row,) = figures_of({"a": clock.call("", 1.0)}, Target("t", "a", "slower", None, "a", ("a",)))
    assert "met" not in row
    assert bench_kernels.line_of(row)[4:6] == ["", ""]


def test_memory_beyond_the_result_is_measured() -> None:
    kept = torch.empty(0)

    def take() -> None:
        nonlocal kept
        torch.ones(48 << 18)
        kept = torch.ones(16 << 18)

    (row,) = figures_of({"a": Call(take, result_bytes=16 << 20)}, Target("t", "a", "slower", 1, "a", ("a",)))
    # the result of the call before is given back during the call
    assert 24 << 20 < row["memory"] < 72 << 20
    assert "MiB, a's" in bench_kernels.line_of(row)[3]


def test_launches_run_again_without_what_is_around() -> None:
    x, weight = torch.randn(3, 64), torch.ones(64)
    made = []
    run = kernel_case.launched(lambda: made.append(rms_norm(x, weight, 1e-6)))
    (out,) = made
    expected = out.clone()
    out.zero_()
    run()
    assert len(made) == 1
    assert torch.equal(out, expected)


@pytest.mark.parametrize("group", kernel_cases.GROUPS)
def test_every_case_does_what_it_compares_with(group: str) -> None:
    with torch.inference_mode():
        for case in kernel_cases.GROUPS[group](TINY):
            calls = case.make()
            for target in case.targets:
                names = (target.call, *target.limits, *filter(None, [target.other]))
                assert set(names) <= set(calls)
            if "torch" in calls or "SDPA" in calls:
                check_results(calls)
            for call in calls.values():
                call.run()


def check_results(calls: dict[str, Call]) -> None:
    """The two calls that do the same give the same."""
    theirs, ours = calls.get("torch") or calls["SDPA"], calls["hfopt"]
    if ours.times > 1:
        return
    expected, given = theirs.run(), ours.run()
    assert isinstance(expected, torch.Tensor) and isinstance(given, torch.Tensor)
    if expected.ndim == 4:
        expected = expected.transpose(1, 2).flatten(2)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2.5e-3}.get(expected.dtype, 1e-5)
    torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_kernels, "QUICK", TINY)
    # once a case, through all that the tests before have left
    monkeypatch.setattr(bench_kernels.gc, "collect", lambda: 0)
    target = tmp_path / "kernels.json"
    assert main(["bench", "--kernels", "--quick", "--json", str(target)]) == 0
    output = capsys.readouterr().out
    report = json.loads(target.read_text())
    assert {row["group"] for row in report["rows"]} == set(kernel_cases.GROUPS)
    for row in report["rows"]:
        assert row["title"] in output
        assert math.isfinite(row["measured"])
        assert row["limit"]["name"]
    assert "multiply-adds     float32 " in output and ", int8 " in output
    assert {"cpu", "threads", "versions", "threading layer"} <= set(report["configuration"])


def test_some_groups(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "QUICK", TINY)
    assert main(["bench", "--kernels", "sampling,launch", "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["group"] for row in report["rows"]} == {"sampling", "launch"}


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [0, 255, 256, 512, 5000])
def test_read_reads_all_but_the_last_values(size: int, threads: int) -> None:
    x = torch.arange(size + 2048, dtype=torch.float32)
    sums = np.zeros(threads, np.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peak.read(x[:size].numpy(), sums)
    finally:
        torch.set_num_threads(before)
    read = size - size % (256 * threads)
    assert sums.sum() == pytest.approx(x[:read].double().sum().item(), rel=1e-5)


def test_multiply_add_multiplies_and_adds() -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((peak.DEPTH, peak.ROWS)).astype(np.float32)
    b = generator.standard_normal((peak.DEPTH, peak.COLUMNS)).astype(np.float32)
    out = np.zeros((torch.get_num_threads(), peak.ROWS, peak.COLUMNS), np.float32)
    peak.multiply_add(a, b, out, 3)
    for mine in out:
        np.testing.assert_allclose(mine, a.T.astype(np.float64) @ b, atol=1e-4)


def test_multiply_codes_multiplies_and_adds() -> None:
    rng = np.random.default_rng(0)
    signed = rng.integers(-128, 128, (peak.DEPTH, peak.ROWS, 4)).astype(np.int8)
    unsigned = rng.integers(0, 256, (peak.DEPTH, peak.COLUMNS, 4)).astype(np.uint8)
    out = np.zeros((torch.get_num_threads(), peak.ROWS, peak.COLUMNS), np.int32)
    peak.multiply_codes(signed.view(np.int32)[..., 0], unsigned.view(np.int32)[..., 0], out, 3)
    expected = np.einsum("kif,kjf->ij", signed.astype(np.int64), unsigned.astype(np.int64))
    for mine in out:
        assert np.array_equal(mine, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_the_arithmetic_of_a_run_is_counted(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline.MultiplyAdd, "_ROUNDS", 1)
    most = roofline.MultiplyAdd(dtype)
    most.run()
    per_unit = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 1, torch.int8: 4}[dtype]
    tile = peak.DEPTH * peak.ROWS * peak.COLUMNS
    assert most.operations == 2 * per_unit * tile * torch.get_num_threads()


def test_the_meter_reads_what_it_is_given() -> None:
    tensors = [torch.ones(4096, dtype=torch.bfloat16), torch.ones(512, 4)]
    meter = roofline.BandwidthMeter(tensors)
    assert meter.n_bytes == 2 * 8192
    assert meter.measure(passes=1) > 0
