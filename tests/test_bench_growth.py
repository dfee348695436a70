"""`hfopt bench --growth` and `--plot`: filled caches, the figures, the drawing, and one-line errors."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hfopt
from hfopt.bench import growth as bench_growth
from hfopt.bench import measure, roofline
from hfopt.bench import plot as bench_plot
from hfopt.bench.cases import Workload, cases_of, filled_cache, has_positions
from hfopt.cli import main
from tests.generation_cases import CACHE

pytestmark = pytest.mark.usefixtures("quick_limits")

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 600,
}


@pytest.fixture
def model() -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=None, pad_token_id=0)).eval()
    # larger than the default, so that the most likely token is not a matter of rounding
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.mark.parametrize(("n_rows", "num_beams"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_behind_a_filled_cache_both_models_decode_the_same(
    model: LlamaForCausalLM, n_rows: int, num_beams: int
) -> None:
    workload = Workload(37, 6, n_rows, num_beams, filled=True)
    stock_case, optimized_case = cases_of(model, [workload])
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    stock = measure.generate(model, stock_case)
    hfopt.optimize(model)
    optimized = measure.generate(model, optimized_case)
    hook.remove()
    assert lengths == [1] * 12  # no step reads the prompt
    assert torch.equal(stock.sequences, optimized.sequences)
    assert len(stock.next) == len(optimized.next) == 5


def test_filled_caches_are_those_of_generate(model: LlamaForCausalLM) -> None:
    workload = Workload(37, 6, n_rows=2, num_beams=3, filled=True)
    stock, optimized = (filled_cache(model, workload, who) for who in (False, True))
    assert type(stock) is DynamicCache
    assert isinstance(optimized, hfopt.IndirectCache)
    assert optimized.n_rows == 2  # prompts, that are forked by the first step
    optimized.fork()
    layers: list[tuple[Any, Any]] = list(zip(optimized.layers, stock.layers, strict=True))
    for mine, theirs in layers:
        assert mine.keys.shape == (6, 2, 37, 8)
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


def test_positions_end_a_workload() -> None:
    config = LlamaConfig(**SHAPE)
    assert has_positions(config, Workload(590, 10))
    assert not has_positions(config, Workload(590, 11))
    assert not has_positions(config, Workload(590, 10, filled=True))


def test_operations_of_a_step_are_those_that_torch_counts(model: LlamaForCausalLM) -> None:
    model.set_attn_implementation("eager")  # its products are counted, those of the fused kernel are not
    cache = filled_cache(model, Workload(20, 1, n_rows=3, filled=True), optimized=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 1, dtype=torch.long), **{CACHE: cache})
    assert counter.get_total_flops() == roofline.step_operations(model, 3, 21)


def test_points_grow_alone() -> None:
    points = bench_growth.points_of(8, 300)
    sizes: dict[str, list[int]] = {}
    for point in points:
        sizes.setdefault(point.series, []).append(point.size)
    assert sizes["layers"] == [2, 4, 8]
    assert sizes["context"][-1] == 16384
    assert sizes["batch"][-1] == 32
    assert sizes["beams"] == [1, 2, 4, 8]
    base = next(point for point in points if point.series == "batch").workload
    assert base == Workload(300, base.new_tokens, filled=True)
    assert all(
        {point.workload.prompt_tokens, point.n_layers} == {300, 8}
        for point in points
        if point.series in ("batch", "beams")
    )
    assert [point.n_layers for point in bench_growth.points_of(1, 300) if point.series == "layers"] == [1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, quick_limits: None) -> tuple[Path, str]:
    """The folder of one run of the command on a small shape, and its output."""
    folder = tmp_path_factory.mktemp("growth")
    (folder / "config.json").write_text(json.dumps(SHAPE | {"model_type": "llama"}))
    arguments = ["--shape", str(folder / "config.json"), "--json", str(folder / "growth.json")]
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(bench_growth, "_BATCHES", (1, 4))
        assert main(["bench", "--growth", "--quick", *arguments]) == 0
    return folder, output.getvalue()


def test_the_table_of_growth(run: tuple[Path, str]) -> None:
    folder, output = run
    report = json.loads((folder / "growth.json").read_text())
    lines = report["growth"]["lines"]
    assert [(line["series"], line["size"]) for line in lines] == [
        *(("context", size) for size in (128, 512)),
        *(("batch", size) for size in (1, 4)),
        *(("beams", size) for size in (1, 2, 4, 8)),
        *(("layers", size) for size in (1, 2)),
        *(("prompt", size) for size in (128, 512)),
    ]
    for line in lines:
        assert line["title"] in output
        assert line["ratio"] > 0
        assert line["stock"]["limit"] > 0
    one, all_layers = (line for line in lines if line["series"] == "layers")
    assert all_layers["bytes"] > one["bytes"]
    assert all_layers["stock"] == lines[2]["stock"]  # batch 1 is the same point, measured once
    assert report["configuration"]["layers"] == 2
    assert "context 2,048" in report["configuration"]["left out"]
    steps = [one for group in report["samples"] for samples in group["cases"].values() for one in samples]
    assert {len(sample["next"]) for sample in steps} == {0, bench_growth._NEW_TOKENS - 1}


@pytest.mark.parametrize(("suffix", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_plot_of_an_earlier_run(run: tuple[Path, str], suffix: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib")
    folder, _ = run
    target = folder / f"plot.{suffix}"
    assert main(["bench", "--plot", str(target), "--from", str(folder / "growth.json")]) == 0
    assert target.read_bytes().startswith(begins)


def line_of(series: str, size: int, seconds: float) -> dict[str, Any]:
    models = {"stock": {"seconds": seconds}, "optimized": {"seconds": seconds / 2}}
    return {"series": series, "size": size, "operations": 4e9, "bytes": 1e9} | models


def test_what_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    lines = [line_of("context", 128, 0.4), line_of("context", 512, 0.8), line_of("batch", 1, 0.4)]
    figure: Any = bench_plot.figure_of(
        {
            "growth": {"bandwidth": 1e10, "rate": 1e11, "lines": [*lines, line_of("prompt", 128, 0.5)]},
            "configuration": {"shape": "x", "layers": 2, "dtype": "y", "cpu": "z", "threads": 2},
        }
    )
    roofline, latency = figure.axes
    roof, *points = [one.get_xydata().tolist() for one in roofline.lines]
    assert roof == [[2.0, 20.0], [10.0, 100.0], [20.0, 100.0]]  # the ridge at 10 operations a byte
    assert points == [[[4.0, 10.0]], [[4.0, 8.0]], [[4.0, 20.0]], [[4.0, 16.0]]]
    drawn = {one.get_label(): one.get_xydata()[:, 1].tolist() for one in latency.lines}
    assert drawn == {
        "stock transformers": [400.0, 800.0],
        "hfopt": [200.0, 400.0],
        "all weights, keys and values at 10 GB/s": pytest.approx([100.0, 100.0]),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "{folder}/growth.json"], "needs --plot=FILE"),
        (["--plot", "{folder}/plot.txt"], "must end in .svg or .png"),
        (["--plot", "{folder}/nowhere/plot.svg"], "there is no such folder"),
        (["--plot", "{folder}/plot.svg", "--from", "{folder}/nothing.json"], "cannot be read"),
        (["--plot", "{folder}/plot.svg", "--from", "{folder}/text.json"], "is not a JSON file"),
        (["--plot", "{folder}/plot.svg", "--from", "{folder}/rows.json"], "has no figures of"),
        (
            ["--growth", "--shape", "{folder}/short.json", "--prompt-tokens", "100"],
            "short.json has fewer positions",
        ),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "rows.json").write_text('{"rows": {}}')
    (tmp_path / "short.json").write_text(
        json.dumps(SHAPE | {"model_type": "llama", "max_position_embeddings": 64})
    )
    assert main(["bench", *(argument.format(folder=tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_matplotlib_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_plot.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_growth, "measured", lambda args: pytest.fail("measured"))
    assert main(["bench", "--plot", str(tmp_path / "plot.svg")]) == 2
    assert 'pip install "hfopt[plots]"' in capsys.readouterr().err
