"""The figures of `hfopt bench` and of the summaries, from samples whose figures are known."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfopt.bench import cases as bench_cases
from hfopt.bench import load_cost, measure, roofline
from hfopt.bench import rows as bench_rows
from hfopt.cli import main
from hfopt.console import models
from tests import fresh

pytestmark = pytest.mark.usefixtures("quick_limits")

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
GREEDY = bench_cases.Workload(prompt_tokens=10, new_tokens=4)


def sample(first: float, later: list[float], bandwidth: float = 1e9, total: float = 1.0) -> measure.Sample:
    return measure.Sample(torch.zeros(1, 3), total, first, later, peak_memory=1 << 20, bandwidth=bandwidth)


def test_percentiles_are_those_of_ipex() -> None:
    values = list(range(100, 0, -1))
    assert measure.percentile(values, 0.9) == 91
    assert measure.percentile(values, 0.99) == 100
    assert measure.percentile([5.0], 0.99) == 5.0


def test_the_summary_pools_the_later_tokens() -> None:
    samples = [sample(2.0, [0.1] * 9, total=3.0), sample(4.0, [0.1] * 9 + [0.2] * 2, total=5.0)]
    summary = measure.Summary.of(samples, n_rows=2, n_new=10, step_bytes=6e7)
    assert summary.latency == 4.0
    assert summary.first == 3.0
    assert summary.next_mean == pytest.approx((18 * 0.1 + 2 * 0.2) / 20)
    assert (summary.next_p90, summary.next_p99) == (0.2, 0.2)
    assert summary.tokens_per_second == 5.0
    assert summary.bandwidth_used == pytest.approx(6e7 / 0.11)
    lines = list(summary.lines())
    assert lines[:3] == [
        "Inference latency: 4.00000 sec.",
        "First token average latency: 3.00000 sec.",
        "Average 2... latency: 0.11000 sec.",
    ]
    assert "55%" in lines[-1]


def test_a_summary_of_one_token_has_no_later_ones() -> None:
    summary = measure.Summary.of([sample(2.0, [])], n_rows=1, n_new=1, step_bytes=1.0)
    assert summary.next_mean is None
    assert not any("2..." in line for line in summary.lines())


def test_ratios_are_medians_of_neighbours() -> None:
    # the machine was slow in the middle: medians of each alone would say 3 / 1
    assert measure.paired_ratio([2.0, 30.0, 3.0], [1.0, 15.0, 1.0]) == 2.0


@pytest.fixture
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


@pytest.fixture
def pair(model: LlamaForCausalLM) -> measure.Pair:
    return measure.Pair(model, model)


def samples_of(
    stock: list[measure.Sample], optimized: list[measure.Sample], workload: bench_cases.Workload = GREEDY
) -> dict[str, Any]:
    return {
        bench_cases.case_name(False, workload): stock,
        bench_cases.case_name(True, workload): optimized,
    }


def test_a_decode_row(model: LlamaForCausalLM, pair: measure.Pair) -> None:
    needed = roofline.bytes_per_step(model, 1, 10, 1, 4)
    # the second half of the run had half the bandwidth
    stock = [sample(9.0, [0.4, 0.4, 9.0], needed * 10), sample(9.0, [0.8, 0.8, 0.1], needed * 5)]
    optimized = [sample(9.0, [0.2, 0.2, 0.2], needed * 10), sample(9.0, [0.4, 0.4, 0.4], needed * 5)]
    row = bench_rows.ROWS["decode-bf16"]
    figures = bench_rows.figures_of(row, pair, samples_of(stock, optimized), 10, 4, (1.0, 1.0))
    assert figures["ratio"] == 2.0
    assert figures["stock"]["seconds"] == pytest.approx(0.6)
    assert figures["stock"]["limit"] == pytest.approx(0.25)
    assert figures["optimized"]["limit"] == pytest.approx(0.5)
    cells = bench_rows.line_of(figures)
    assert cells[3:] == ["2.00 ×", "≥ 2.0 ×, ≥ 92%", "25% / 50%"]


def test_a_row_with_a_length_of_its_own(model: LlamaForCausalLM, pair: measure.Pair) -> None:
    row = bench_rows.ROWS["decode-bf16-8k"]
    workload = bench_cases.Workload(8192, 4, filled=True)
    assert row.workloads(10, 4) == [workload]
    needed = roofline.bytes_per_step(model, 1, 8192, 1, 4)
    samples = samples_of([sample(9.0, [0.4], needed * 10)], [sample(9.0, [0.2], needed * 10)], workload)
    figures = bench_rows.figures_of(row, pair, samples, 10, 4, (1.0, 1.0))
    assert figures["optimized"]["limit"] == pytest.approx(0.5)
    assert bench_rows.line_of(figures)[4] == "≥ 80%"


def test_a_row_with_a_time_of_its_own(pair: measure.Pair) -> None:
    row = bench_rows.ROWS["decode-32-layers"]
    workload = bench_cases.Workload(32, 4)
    samples = samples_of([sample(9.0, [10e-3])], [sample(9.0, [0.5e-3])], workload)
    cells = bench_rows.line_of(bench_rows.figures_of(row, pair, samples, 10, 4, (1.0, 1.0)))
    assert cells[1:5] == ["10.0 ms", "0.50 ms", "20.00 ×", "≤ 0.6 ms"]


def test_rows_name_their_models() -> None:
    args = argparse.Namespace(shape="a", small_shape="b", layers=None)
    fewer = argparse.Namespace(shape="a", small_shape="b", layers=2)
    sources = {
        name: [bench_rows.ROWS[name].source(given) for given in (args, fewer)]
        for name in ("decode-bf16", "decode-small", "decode-1-layer")
    }
    assert sources == {
        "decode-bf16": [("a", None), ("a", 2)],
        "decode-small": [("b", None), ("b", 2)],
        "decode-1-layer": [("llama-hidden-64", 1), ("llama-hidden-64", 1)],
    }


def test_a_prefill_row(model: LlamaForCausalLM, pair: measure.Pair) -> None:
    operations = roofline.prefill_operations(model, 1, 10)
    row = bench_rows.ROWS["prefill-bf16"]
    samples = samples_of([sample(0.5, [1.0])], [sample(0.25, [1.0])])
    figures = bench_rows.figures_of(row, pair, samples, 10, 4, rates=(operations * 4, operations * 16))
    assert figures["ratio"] == 2.0
    assert figures["stock"] == {"seconds": 0.5, "limit": 0.5, "tokens_per_second": 20.0}
    assert figures["optimized"] == {"seconds": 0.25, "limit": 0.25, "tokens_per_second": 40.0}
    assert bench_rows.line_of(figures)[1:3] == ["500.0 ms, 20 tokens/s", "250.0 ms, 40 tokens/s"]


def test_a_beam_row_compares_with_greedy(pair: measure.Pair) -> None:
    samples = samples_of([sample(1.0, [0.1])], [sample(1.0, [0.1])])
    beams = bench_cases.Workload(10, 4, num_beams=4)
    samples |= samples_of([sample(4.0, [0.3])], [sample(1.05, [0.12])], beams)
    first, later = (
        bench_rows.figures_of(bench_rows.ROWS[name], pair, samples, 10, 4, (1.0, 1.0))
        for name in ("beam-first", "beam-next")
    )
    assert (first["stock"]["over_one"], first["optimized"]["over_one"]) == (4.0, 1.05)
    assert later["optimized"]["over_one"] == pytest.approx(1.2)
    assert later["ratio"] == pytest.approx(2.5)
    assert bench_rows.line_of(first)[3:5] == ["1.05 × (stock 4.00 ×)", "≤ 1.1 ×"]


WIDE = SHAPE | {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2}


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_models_of_a_format_have_the_same_weights(name: str) -> None:
    config = LlamaConfig(**WIDE)
    pair = measure.pair_of(lambda: models.random_model(config, torch.bfloat16), name)
    assert pair.stock is not pair.optimized
    assert (pair.ready(False), pair.ready(True)) == (pair.stock, pair.optimized)
    stock: Any = pair.stock.get_submodule("model.layers.0.mlp.up_proj")
    packed: Any = pair.optimized.get_submodule("model.layers.0.mlp.up_proj")
    assert type(stock) is torch.nn.Linear and packed.format.name == name
    assert (stock.weight - packed.weight).abs().max() < 0.2 * stock.weight.abs().max()
    assert pair.stock.config is not pair.optimized.config
    assert "hfopt" not in pair.stock.__dict__


def test_a_row_of_a_format_counts_the_bytes_of_each_model() -> None:
    config = LlamaConfig(**WIDE)
    pair = measure.pair_of(lambda: models.random_model(config, torch.bfloat16), "int8")
    stock, packed = (roofline.bytes_per_step(model, 1, 10, 1, 4) for model in (pair.stock, pair.optimized))
    assert 0.5 * stock < packed < 0.6 * stock
    samples = samples_of([sample(9.0, [0.4], stock * 10)], [sample(9.0, [0.1], packed * 20)])
    figures = bench_rows.figures_of(bench_rows.ROWS["decode-int8"], pair, samples, 10, 4, (1.0, 1.0))
    assert (figures["stock"]["limit"], figures["optimized"]["limit"]) == pytest.approx((0.25, 0.5))
    assert bench_rows.line_of(figures)[3:5] == ["4.00 ×", "≥ 4.0 ×, ≥ 90%"]
    assert figures["quantization"] == "int8"


def test_rows_at_a_time_compare_with_one_row(pair: measure.Pair) -> None:
    row = bench_rows.ROWS["decode-int8-b8"]
    eight, one = (bench_cases.Workload(10, 4, n_rows, filled=True) for n_rows in (8, 1))
    assert row.workloads(10, 4) == [one, eight]
    samples = samples_of([sample(1.0, [0.1])], [sample(1.0, [0.02])], one)
    samples |= samples_of([sample(1.0, [0.2])], [sample(1.0, [0.025])], eight)
    figures = bench_rows.figures_of(row, pair, samples, 10, 4, (1.0, 1.0))
    assert (figures["stock"]["over_one"], figures["optimized"]["over_one"]) == pytest.approx((2.0, 1.25))
    assert bench_rows.line_of(figures)[3:5] == ["1.25 × (stock 2.00 ×)", "≤ 1.3 ×"]


def test_a_cache_of_codes_compares_with_one_of_floats(pair: measure.Pair) -> None:
    row = bench_rows.ROWS["decode-int4-16k-kv-int8"]
    codes = bench_cases.Workload(16384, 4, filled=True, kv_cache="int8")
    floats = bench_cases.Workload(16384, 4, filled=True)
    assert row.workloads(10, 4) == [floats, codes]
    cases = bench_cases.cases_of(pair.stock, row.workloads(10, 4))
    assert [case.optimized for case in cases] == [False, True, True]
    small: list[Any] = [
        bench_cases.filled_cache(pair.stock, replace(each, prompt_tokens=70), True)
        for each in (floats, codes)
    ]
    assert [cache.kv_cache for cache in small] == [None, "int8"]
    samples = samples_of([sample(1.0, [0.2])], [sample(1.0, [0.1])], floats)
    samples |= samples_of([sample(1.0, [0.2])], [sample(1.0, [0.08])], codes)
    figures = bench_rows.figures_of(row, pair, samples, 10, 4, (1.0, 1.0))
    assert (figures["stock"]["over_one"], figures["optimized"]["over_one"]) == pytest.approx((1.0, 0.8))
    fewer = roofline.bytes_per_token_in_cache(pair.stock) - roofline.bytes_per_token_in_cache(
        pair.stock, "int8"
    )
    saved = bench_cases.bytes_of(pair.stock, codes, "next", False) - bench_cases.bytes_of(
        pair.stock, codes, "next", True
    )
    assert fewer > 0 and saved == (16384 + 2) * fewer


def test_rows_share_their_cases(model: LlamaForCausalLM) -> None:
    rows = [bench_rows.ROWS[name] for name in ("decode-bf16", "prefill-bf16", "beam-first", "beam-next")]
    cases = bench_cases.cases_of(model, [workload for row in rows for workload in row.workloads(10, 4)])
    assert [(case.optimized, case.options["num_beams"]) for case in cases] == [
        (False, 1),
        (True, 1),
        (False, 4),
        (True, 4),
    ]


def test_cases_alternate_on_one_model_and_are_left_as_the_last_asks(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(measure.hfopt, "optimize", lambda model, kv_cache: seen.append("optimize"))
    monkeypatch.setattr(measure.hfopt, "restore", lambda model: seen.append("restore"))
    monkeypatch.setattr(
        measure.roofline, "BandwidthMeter", lambda: iter_meter([9.0, 9.0, 4.0, 2.0, 1.0, 1.0, 3.0])
    )
    cases = bench_cases.cases_of(model, [bench_cases.Workload(5, 3)])
    monkeypatch.setattr(measure.env, "peak_memory", lambda: 5 << 30)
    samples = measure.alternate(measure.Pair(model, model), cases, repetitions=2, warmup=1)
    assert seen == ["restore", "optimize"] * 3
    stock, optimized = samples.values()
    assert [one.bandwidth for one in stock] == [3.0, 1.0]
    assert [one.bandwidth for one in optimized] == [1.5, 2.0]
    assert all(len(one.next) == 2 and one.peak_memory == 4 << 30 for one in stock + optimized)


def test_cases_of_two_models_run_on_their_own(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def note(model: Any, case: measure.Case) -> measure.Sample:
        seen.append(model)
        return sample(1.0, [1.0])

    monkeypatch.setattr(measure, "generate", note)
    pair = measure.Pair(model, LlamaForCausalLM(model.config))
    cases = bench_cases.cases_of(model, [bench_cases.Workload(5, 3)])
    measure.alternate(pair, cases, repetitions=1, warmup=1)
    assert seen == [pair.stock, pair.optimized] * 2


def iter_meter(values: list[float]) -> Any:
    """A bandwidth meter that reads these values, over memory of its own."""

    class Meter:
        n_bytes = 1 << 30
        measure = iter(values).__next__

    return Meter()


def test_the_command_on_a_small_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape, target = tmp_path / "config.json", tmp_path / "bench.json"
    shape.write_text(json.dumps(SHAPE | {"model_type": "llama", "num_hidden_layers": 3}))
    arguments = ["--shape", str(shape), "--small-shape", str(shape), "--layers", "2", "--quick"]
    assert (
        main(
            [
                "bench",
                *arguments,
                "--rows",
                "decode-small,decode-1-layer,beam-next,decode-bf16-8k,decode-f32-b8,prefill-f32",
                "--json",
                str(target),
            ]
        )
        == 0
    )
    output = capsys.readouterr().out
    for text in (
        "versions",
        "threading layer",
        "small shape",
        "prefill float32",
        "decode-bf16-8k is left out",
    ):
        assert text in output
    figures = json.loads(target.read_text())
    assert set(figures["rows"]) == {
        "beam-next",
        "decode-small",
        "decode-1-layer",
        "decode-f32-b8",
        "prefill-f32",
    }
    assert [group["layers"] for group in figures["samples"]] == [2, 1, 2]
    assert figures["left out"] == ["decode-bf16-8k"]  # the model has positions for 2,048 tokens
    assert figures["configuration"]["repetitions"] == 2
    for group in figures["samples"]:
        for samples in group["cases"].values():
            assert len(samples) == 2
            assert all(one["bandwidth"] > 0 for one in samples)


def test_the_rows_of_formats_on_a_small_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape, target = tmp_path / "config.json", tmp_path / "bench.json"
    shape.write_text(json.dumps(WIDE | {"model_type": "llama"}))
    names = [
        name for name, row in bench_rows.ROWS.items() if row.quantization is not None and not row.kv_cache
    ]
    assert len(names) == 8
    arguments = ["--shape", str(shape), "--quick", "--prompt-tokens", "40", "--rows", ",".join(names)]
    assert main(["bench", *arguments, "--json", str(target)]) == 0
    output = capsys.readouterr().out
    for text in ("decode int4, batch 1", "prefill int8", "tokens/s", "Int4(group=128"):
        assert text in output
    figures = json.loads(target.read_text())
    assert set(figures["rows"]) == set(names)
    assert [group["quantization"] for group in figures["samples"]] == ["int8", "int4"]
    for group in figures["samples"]:
        assert all(rate > 0 for rate in group["peak_rates"])


# ---- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_loading_is_measured_in_new_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules: list[str] = []

    def in_new_process(module: str, *arguments: str) -> Any:
        """The first one imports everything itself, which takes seconds."""
        modules.append(module)
        if len(modules) == 1:
            return measure.in_new_process(module, *arguments)
        code = f"import runpy; runpy.run_module({module!r}, run_name='__main__')"
        return json.loads(fresh.run(code, *arguments))

    monkeypatch.setattr(load_cost, "in_new_process", in_new_process)
    shape, target = tmp_path / "config.json", tmp_path / "bench.json"
    shape.write_text(json.dumps(WIDE | {"model_type": "llama", "vocab_size": 4096}))
    arguments = ["bench", "--shape", str(shape), "--quick", "--rows", "load-int8"]
    assert main([*arguments, "--json", str(target)]) == 0
    output = capsys.readouterr().out
    assert "int8 from bfloat16" in output and "int8 from what was saved" in output
    (row,) = json.loads(target.read_text())["rows"].values()
    assert modules == [load_cost.__name__] * 4
    floats, saved = row["floats"], row["saved"]
    assert floats["result"] == saved["result"]
    # embedding in bfloat16, head in bytes
    assert 3 * 4096 * 128 < saved["result"] < 3.5 * 4096 * 128
    for one in (floats, saved):
        assert len(one["samples"]) == 1 and one["seconds"] > 0 and one["peak"] > 0


def test_figures_of_loading_are_medians_with_their_bounds() -> None:
    samples = [
        {"seconds": seconds, "result": 1.25e9, "peak": 1.5e9, "fetched": 0.0}
        for seconds in (30.0, 12.0, 13.0)
    ]
    one = load_cost._medians(samples)
    row = {"quantization": "int4", "floats": one, "saved": one}
    floats, saved = load_cost.lines_of({"load-int4": row})
    bounds = ["1.25 GB", "1.50 GB", "≤ 2.25 GB", "0.00 GB"]
    assert floats == ["int4 from bfloat16", "13.00 s", "≤ 20 s", *bounds]
    assert saved == ["int4 from what was saved", "13.00 s", "≤ 2 s", *bounds]
