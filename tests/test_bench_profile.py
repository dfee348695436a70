"""`hfopt bench --profile`: instructions one by one do what the step does, and figures from rounds that are known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hfopt
from hfopt.bench import profile as bench_profile
from hfopt.bench.cases import Workload, cases_of
from hfopt.bench.profile import ReadyStep, Round
from hfopt.cli import main
from hfopt.program.listing import Line

pytestmark = pytest.mark.usefixtures("quick_limits")

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture
def model() -> LlamaForCausalLM:
    return hfopt.optimize(LlamaForCausalLM(LlamaConfig(**SHAPE)).eval(), kernels="hfopt")


@pytest.fixture
def shape(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SHAPE | {"model_type": "llama"}))
    return str(file)


# ---- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [1, 3])
def test_instructions_one_by_one_are_the_step(model: LlamaForCausalLM, n_rows: int) -> None:
    with torch.inference_mode():
        ready = ReadyStep(model, Workload(20, 4, n_rows=n_rows, filled=True))
        expected = ready.logits.clone()
        assert len(ready.parts) == len(ready.instructions) == 22
        ready.logits.zero_()
        ready.empty()
        for part in ready.parts[:-1]:
            part()
        assert not ready.logits.any()
        ready.parts[-1]()
        assert torch.equal(ready.logits, expected)
        ready.logits.zero_()
        ready.whole()
        assert torch.equal(ready.logits, expected)


def test_bytes_are_those_of_all_rows(model: LlamaForCausalLM) -> None:
    with torch.inference_mode():
        ready = ReadyStep(model, Workload(20, 4, n_rows=3, filled=True))
    by_name = {line.name: n_bytes for line, n_bytes in zip(ready.instructions, ready.bytes_read, strict=True)}
    assert by_name["attend"] == 3 * 21 * 2 * 2 * 16 * 4
    assert by_name["rms_norm"] == 64 * 4
    assert by_name["rotate and store"] == 0


def test_a_step_is_timed_whole_and_in_parts(model: LlamaForCausalLM) -> None:
    with torch.inference_mode():
        ready = ReadyStep(model, Workload(20, 4, filled=True))
        calls: list[str] = []
        ready.whole = lambda: calls.append("whole")  # type: ignore[assignment]
        ready.empty = lambda: calls.append("empty")  # type: ignore[assignment]
        ready.parts = [lambda: calls.append("part")] * 2  # type: ignore[list-item]
        assert len(bench_profile._steps(ready)) == 4
    assert calls == ["whole"] + ["empty", "empty", "part"] * 2


def test_tokens_are_timed_from_step_to_step(model: LlamaForCausalLM) -> None:
    workload = Workload(20, 6, filled=True)
    (case,) = (case for case in cases_of(model, [workload]) if case.optimized)
    with torch.inference_mode():
        kernel = ReadyStep(model, workload).kernel
        tokens = bench_profile._tokens(model, case, kernel)
    # the time of the first one, which is made by reading the prompt, begins nowhere
    assert len(tokens) == 5
    assert all(0 < outside < seconds for seconds, outside in tokens)


def test_an_empty_launch_is_taken_off() -> None:
    steps = [[9.0, 1.0, 1.5, 5.0], [8.0, 2.0, 1.5, 7.0], [30.0, 2.0, 1.5, 6.0]]
    one = bench_profile._round(steps, [(10.0, 1.0), (12.0, 3.0), (50.0, 4.0)], 7.0)
    assert one == Round(whole=9.0, empty=2.0, parts=[0.0, 4.0], token=12.0, outside=3.0, bandwidth=7.0)


# ---- figures ---------------------------------------------------------------------------------------------------------

NORM, LINEAR, HEAD = (
    Line("rms_norm", None, "[8]", "", (0,), 64),
    Line("linear", 0, "8 → 8", "silu", (64,), 0),
    Line("linear", None, "8 → 99", "", (0,), None),
)


def figures() -> dict[str, Any]:
    # the second round has half the bandwidth, and takes twice as long
    rounds = [
        Round(9e-3, 1e-6, [1e-6, 1e-3, 2e-3, 1e-6, 5e-3], 9.5e-3, 1e-4, bandwidth=2e9),
        Round(18e-3, 3e-6, [1e-6, 2e-3, 4e-3, 1e-6, 10e-3], 19e-3, 3e-4, bandwidth=1e9),
    ]
    n_bytes = [16, 10**6, 2 * 10**6, 16, 5 * 10**6]
    return bench_profile.figures_of([NORM, LINEAR, LINEAR, NORM, HEAD], n_bytes, rounds)


def test_instructions_that_do_the_same_are_one_line() -> None:
    norm, linear, head = figures()["instructions"]
    assert [(one["name"], one["shapes"], one["number"]) for one in (norm, linear, head)] == [
        ("rms_norm", "[8]", 2),
        ("linear", "8 → 8", 2),
        ("linear", "8 → 99", 1),
    ]
    assert linear["bytes"] == 3 * 10**6
    assert linear["seconds"] == pytest.approx(4.5e-3)
    assert linear["share"] == pytest.approx(3 / 8, rel=1e-3)
    assert sum(one["share"] for one in (norm, linear, head)) == pytest.approx(1)


def test_shares_of_the_limit_are_those_of_each_round() -> None:
    told = figures()
    assert told["instructions"][1]["limit"] == pytest.approx(0.5)  # 1 of 2 GB/s, then 0.5 of 1
    assert told["instructions"][1]["rate"] == pytest.approx(0.75e9)
    assert told["whole"]["limit"] == pytest.approx(8 / 18, rel=1e-3)
    assert told["parts"]["seconds"] == pytest.approx(12.002e-3)
    assert told["instructions"][0]["rate"] is None


def test_the_table_has_the_sum_and_the_whole() -> None:
    norm, linear, _, parts, whole = bench_profile.lines_of(figures())
    assert norm == ["rms_norm", "[8]", "2", "1.0 µs", "0.0%", "", ""]
    assert linear == ["linear", "8 → 8, silu", "2", "2,250.0 µs", "37.5%", "0.8", "50%"]
    assert parts[:5] == ["one by one", "", "5", "12.002 ms", "100.0%"]
    assert whole == ["in one call", "", "1", "13.500 ms", "112.5%", "0.7", "44%"]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "profile.json"
    arguments = ["bench", "--profile", "--quick", "--shape", shape, "--rows"]
    arguments.append("decode-f32-b8,decode-1-layer,decode-int8")
    assert main([*arguments, "--json", str(target)]) == 0
    output = capsys.readouterr().out
    for text in ("outside kernels", "one by one", "in one call", "decode float32, batch 8", "64 → 96 + 96"):
        assert text in output
    report = json.loads(target.read_text())
    assert list(report["profiles"]) == ["decode-f32-b8", "decode-1-layer", "decode-int8"]
    assert [told["layers"] for told in report["profiles"].values()] == [2, 1, 2]
    shapes = [line["shapes"] for line in report["profiles"]["decode-int8"]["instructions"]]
    assert "64 → 96 + 96, 8 bits" in shapes
    for told in report["profiles"].values():
        assert 0 < told["outside_kernels"] < told["token"]
        assert told["whole"]["seconds"] > 0 and told["bandwidth"] > 0
        assert sum(one["share"] for one in told["instructions"]) == pytest.approx(1, abs=0.2)


def test_two_rows_by_default(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--profile", "--quick", "--shape", shape, "--small-shape", shape, "--layers", "1", "--json"]
    assert main(["bench", *arguments]) == 0
    profiles = json.loads(capsys.readouterr().out)["profiles"]
    assert list(profiles) == ["decode-bf16", "decode-small"]
    assert all(told["layers"] == 1 for told in profiles.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "prefill-bf16"], "must name some of decode-bf16, "),
        (["--rows", "beam-next"], "must name some of decode-bf16, "),
        (["--rows", "nothing"], "must name some of decode-bf16, "),
        (["--new-tokens", "2"], "--new-tokens=2 must be at least 3"),
        (["--rows", "decode-bf16-8k"], "has positions for fewer tokens"),
    ],
)
def test_wrong_arguments_get_one_line(
    arguments: list[str], message: str, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--profile", "--shape", shape, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_program_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "diffllama.json"
    file.write_text(json.dumps(SHAPE | {"model_type": "diffllama"}))
    arguments = ["--profile", "--quick", "--rows", "decode-bf16", "--shape", str(file)]
    assert main(["bench", *arguments]) == 2
    assert "go module by module: 0 is a DiffLlamaDecoderLayer" in capsys.readouterr().err
