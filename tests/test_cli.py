"""The command line: results against transformers, the figures it derives, and one-line errors."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import hfopt
from hfopt.cache import IndirectCache
from hfopt.cli import doctor, main, run
from hfopt.console import models
from hfopt.console.shapes import SHAPES
from hfopt.machine.cores import cores_of_process
from hfopt.modules.quantized import QuantizedLinear
from hfopt.quantization import NF4, Int8
from hfopt.words import DTYPES

pytestmark = pytest.mark.usefixtures("quick_limits")

ROOT = Path(__file__).parents[1]
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
SUMMARY = (
    "Inference latency",
    "First token average latency",
    "Average 2... latency",
    "P90 2... latency",
    "P99 2... latency",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama and a tokenizer of the words w0 ... w119."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(7)
    fields = {key: value for key, value in TINY.items() if key != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**fields, bos_token_id=None, eos_token_id=None, pad_token_id=0))
    # larger than the default, so that the most likely token is not a matter of rounding
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(120)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    return str(file)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["run", *arguments, "--num-iter", "2", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def expected(checkpoint: Path, ids: list[list[int]], **options: Any) -> list[list[int]]:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    inputs = torch.tensor(ids)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    return model.generate(inputs, attention_mask=torch.ones_like(inputs), **options).tolist()


# ---- run ---------------------------------------------------------------------------------------------------


def test_run_makes_the_text_that_transformers_makes(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-m", str(checkpoint), "--dtype", "float32", "--prompt", "w5 w9 w77"]
    assert main(["run", *arguments, "--max-new-tokens", "6", "--greedy", "--num-iter", "2"]) == 0
    output = capsys.readouterr().out
    (ids,) = expected(checkpoint, [[5, 9, 77]])
    assert " ".join(f"w{index}" for index in ids) in output.splitlines()
    assert "Prompt size: 3" in output
    values = [re.search(rf"^{re.escape(line)}: (\d+\.\d+) sec\.$", output, re.MULTILINE) for line in SUMMARY]
    assert all(values)
    assert sorted(value.start() for value in values if value) == [value.start() for value in values if value]
    for line in ("tokens/s", "Peak memory", "Memory bandwidth"):
        assert line in output


def test_run_uses_four_beams_by_default(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("-m", str(checkpoint), "--dtype", "float32", "--prompt", "w8 w3", "--max-new-tokens", "6")
    figures = run_json(capsys, *arguments)
    assert figures["optimized"]["sequences"] == expected(checkpoint, [[8, 3]], num_beams=4)


@pytest.mark.parametrize("mode", [["--greedy"], ["--num-beams", "2"], ["--sample"], ["--greedy", "--sample"]])
def test_compare_finds_the_same_tokens(
    mode: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = run_json(
        capsys, "-m", str(checkpoint), "--dtype", "float32", "--compare", "--max-new-tokens", "6", *mode
    )
    assert figures["ratio"]["same_tokens"] is True
    assert figures["stock"]["sequences"] == figures["optimized"]["sequences"]
    assert figures["ratio"]["first"] > 0
    assert figures["ratio"]["next"] > 0


def test_compare_prints_both_summaries(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--random-weights", config_file, "--compare", "--max-new-tokens", "3", "--num-iter", "2"]
    assert main(["run", *arguments]) == 0
    output = capsys.readouterr().out
    for line in SUMMARY:
        assert output.count(f"{line}:") == 2
    assert re.search(r"2\.\.\. tokens: \d+\.\d+ times as fast", output)
    assert "time of the stock model over that of the optimised one" in output


def test_a_format_is_run_beside_the_stock_model(
    checkpoint: Path, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--dtype", "float32", "--quantization", "int8", "--greedy", "--max-new-tokens", "6")
    figures = run_json(capsys, "-m", str(checkpoint), "--prompt", "w5 w9", "--compare", *arguments)
    assert figures["stock"]["sequences"] == expected(checkpoint, [[5, 9]])
    packed: Any = hfopt.load(checkpoint, dtype=torch.float32, quantization="int8")
    inputs = torch.tensor([[5, 9]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert figures["optimized"]["sequences"] == packed.generate(inputs, **options).tolist()
    reads = {
        name: figures[name]["bandwidth_used"] * figures[name]["next_mean"] for name in ("stock", "optimized")
    }
    assert reads["optimized"] < 0.4 * reads["stock"]
    alone = run_json(capsys, "-m", str(checkpoint), "--prompt", "w5 w9", *arguments)
    assert alone["optimized"]["sequences"] == figures["optimized"]["sequences"]
    assert "stock" not in alone
    for more in ([], ["--compare"]):
        random = run_json(capsys, "--random-weights", config_file, *arguments, *more)
        assert ("ratio" in random) == bool(more)


def test_other_tokens_of_a_format_are_explained(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_ratios", lambda samples: {"first": 1.0, "same_tokens": False})
    arguments = ["-m", str(checkpoint), "--quantization", "int8", "--max-new-tokens", "2", "--num-iter", "2"]
    assert main(["run", *arguments, "--compare"]) == 0
    assert "Same tokens: no (weights in int8" in capsys.readouterr().out


def test_a_cache_of_codes(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("--input-tokens", "9", "--max-new-tokens", "5", "--greedy")
    arguments = ("--random-weights", config_file, "--dtype", "float32", "--kv-cache", "int8", *lengths)
    figures = run_json(capsys, *arguments, "--compare")
    reads = {
        name: figures[name]["bandwidth_used"] * figures[name]["next_mean"] for name in ("stock", "optimized")
    }
    assert reads["optimized"] < reads["stock"]


@pytest.mark.parametrize(
    "quantization", [(), pytest.param(("--quantization", "int8"), marks=pytest.mark.slow)]
)
def test_the_cache_is_of_the_kind_that_is_asked_for(
    quantization: tuple[str, ...], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    original = IndirectCache.__init__

    def note(self: IndirectCache, *args: Any, **options: Any) -> None:
        found.append(options.get("kv_cache"))
        original(self, *args, **options)

    monkeypatch.setattr(IndirectCache, "__init__", note)
    arguments = ["-m", str(checkpoint), "--max-new-tokens", "2", "--num-iter", "2", *quantization]
    for kind in ([], ["--kv-cache", "int8"]):
        found.clear()
        assert main(["run", *arguments, *kind]) == 0
        assert ("int8" in found) == bool(kind)


def test_json_holds_every_sample(
    config_file: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "figures.json"
    arguments = ["--random-weights", config_file, "--batch-size", "3", "--input-tokens", "7", "--greedy"]
    counts = ["--max-new-tokens", "4", "--num-iter", "5", "--num-warmup", "2"]
    assert main(["run", *arguments, *counts, "--json", str(target)]) == 0
    assert "Inference latency" in capsys.readouterr().out
    figures = json.loads(target.read_text())["optimized"]
    assert len(figures["samples"]) == 3
    assert all(len(sample["next"]) == 3 for sample in figures["samples"])
    rows = figures["sequences"]
    assert [len(row) for row in rows] == [11, 11, 11]
    assert len({tuple(row[:7]) for row in rows}) == 3


def test_token_latency_names_every_token(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--random-weights", config_file, "--max-new-tokens", "5", "--num-iter", "2"]
    assert main(["run", *arguments, "--token-latency"]) == 0
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("Latency of each token")
    ]
    assert len(re.findall(r"\d+\.\d+", line)) == 5


def test_streaming_prints_the_text_while_it_is_made(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-m", str(checkpoint), "--dtype", "float32", "--prompt", "w5 w9", "--max-new-tokens", "6"]
    assert main(["run", *arguments, "--greedy", "--streaming", "--num-iter", "3"]) == 0
    (ids,) = expected(checkpoint, [[5, 9]])
    # once a run, and the text at the end
    assert capsys.readouterr().out.count(" ".join(f"w{index}" for index in ids)) == 4


def test_streaming_is_ignored_with_beams(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["run", "-m", str(checkpoint), "--streaming", "--max-new-tokens", "2", "--num-iter", "2"]) == 0
    )
    assert "--streaming is ignored" in capsys.readouterr().err


def test_profile_prints_where_the_time_went(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--random-weights", config_file, "--max-new-tokens", "2", "--num-iter", "2", "--greedy"]
    assert main(["run", *arguments, "--profile"]) == 0
    assert "Self CPU" in capsys.readouterr().out


def test_the_script_runs_the_embedded_model() -> None:
    prompt = "Return a list of the"
    arguments = [
        "--greedy",
        "--dtype",
        "float32",
        "--prompt",
        prompt,
        "--max-new-tokens",
        "12",
        "--num-iter",
        "2",
    ]
    script = ROOT / "scripts" / "run.py"
    finished = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, cwd="/", check=False
    )
    assert finished.returncode == 0, finished.stderr
    model, tokenizer = (
        models.load(hfopt.embedded_model(), torch.float32),
        models.load_tokenizer(hfopt.embedded_model()),
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    generating: Any = model
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    text = tokenizer.decode(
        generating.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)[0],
        skip_special_tokens=True,
    )
    assert str(text).startswith(prompt)
    assert str(text) in finished.stdout
    assert "P99 2... latency" in finished.stdout


# ---- errors ------------------------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command prints before it ends with exit code 2."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("hfopt: ")
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def lose_a_weight(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def resize(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))


DAMAGES = {
    "truncated weights": truncate,
    "garbage for weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 3000),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a layer without weights": lose_a_weight,
    "weights of another size": resize,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "half a config": lambda folder: (folder / "config.json").write_text('{"model_type": "lla'),
    "a config of nothing known": lambda folder: (folder / "config.json").write_text('{"model_type": "x"}'),
    "a broken tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_folder_is_named_in_one_line(
    damage: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    DAMAGES[damage](folder)
    with pytest.raises(hfopt.CorruptCheckpoint):
        models.load(str(folder), torch.float32)
        models.load_tokenizer(str(folder))
    capsys.readouterr()
    assert str(folder) in fails(capsys, "run", "-m", str(folder))


def test_weights_that_are_pickles_are_not_read(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").unlink()
    torch.save(LlamaForCausalLM.from_pretrained(checkpoint).state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in fails(capsys, "run", "-m", str(folder))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "-m", "no/such-model"], "no/such-model"),
        (["run", "--random-weights", "llama-9t"], "llama-3.2-1b"),
        (["run", "--random-weights", "llama-160m", "-m", "x"], "exclude each other"),
        (["run", "--random-weights", "CONFIG", "--prompt", "x"], "--input-tokens"),
        (["run", "--random-weights", "CONFIG", "--prompt", "x", "--input-tokens", "3"], "exclude each other"),
        (["run", "--random-weights", "CONFIG", "--num-iter", "3", "--num-warmup", "3"], "--num-warmup=3"),
        (["run", "--random-weights", "CONFIG", "--num-warmup", "-1"], "--num-warmup=-1"),
        (["bench", "--rows", "decode-bf16,speed"], "speed"),
        (["bench", "--new-tokens", "1"], "--new-tokens=1"),
        (["bench", "--kernels", "linear,speed"], "--kernels=linear,speed"),
    ],
)
def test_wrong_arguments_get_one_line(
    arguments: list[str], words: str, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [config_file if argument == "CONFIG" else argument for argument in arguments]
    assert words in fails(capsys, *chosen)


def test_a_folder_without_a_tokenizer_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "weights alone"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    assert f"{folder} has no tokenizer" in fails(capsys, "run", "-m", str(folder))


def test_a_folder_is_no_file_of_figures(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "name the model first" in fails(capsys, "explain", "--json", str(checkpoint))


def test_an_empty_prompt_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prompt" in fails(capsys, "run", "-m", str(checkpoint), "--prompt", "")


def test_a_json_file_that_cannot_be_written_is_named(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "missing" / "x.json")
    arguments = ["--random-weights", config_file, "--max-new-tokens", "2", "--num-iter", "2"]
    assert target in fails(capsys, "run", *arguments, "--json", target)


@pytest.mark.parametrize("text", ['{"model_type": "llama"', '{"model_type": "nothing"}', "{}"])
def test_a_broken_config_file_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    assert str(file) in fails(capsys, "run", "--random-weights", str(file))


@pytest.mark.parametrize("command", ["run", "explain", "warmup"])
def test_formats_that_are_not_known_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--quantization", "int5"])
    assert stopped.value.code == 2
    assert "int4, int8, nf4" in capsys.readouterr().err.replace("'", "")


@pytest.mark.parametrize("flag", ["--num-beams", "--batch-size", "--max-new-tokens", "--num-iter"])
def test_counts_below_one_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", flag, "0"])
    assert stopped.value.code == 2
    assert flag in capsys.readouterr().err


# ---- random weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_are_usable_and_the_same_every_time(tied: bool) -> None:
    config = AutoConfig.for_model(**TINY, tie_word_embeddings=tied)
    model, again = (models.random_model(config, torch.float32) for _ in range(2))
    state = model.state_dict()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, state[name])
    head = model.get_output_embeddings()
    assert head is not None
    assert (head.weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(state["model.norm.weight"], torch.ones(64))
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    for matrix in matrices:
        assert 0.018 < matrix.std() < 0.022
        assert len(torch.unique(matrix, dim=0)) == len(matrix)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(matrices) if a.shape == b.shape)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        logits = model(ids).logits
        reference: Any = AutoModelForCausalLM.from_config(config)
        reference.load_state_dict(state)
        # buffers too are those of an ordinary model
        assert torch.equal(reference.eval()(ids).logits, logits)


def test_rows_of_a_matrix_larger_than_the_random_block_differ() -> None:
    config = AutoConfig.for_model(**TINY | {"vocab_size": 40_000})
    weight = models.random_model(config, torch.bfloat16).get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    assert weight.numel() > 2 * models._BLOCK
    assert len(torch.unique(weight, dim=0)) == len(weight)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("llama-3.2-1b", 1236),
        ("llama-160m", 162),
        ("llama-2-7b", 6738),
        ("tinyllama-1.1b", 1100),
        ("gpt-j-6b", 6051),
        ("opt-125m", 125),
        ("opt-1.3b", 1316),
        ("qwen3-0.6b", 596),
        ("phi-4-mini", 3836),
        ("granite-3.3-2b", 2534),
        ("qwen2.5-0.5b", 494),
        ("qwen2.5-1.5b", 1544),
    ],
)
def test_named_shapes_have_the_size_in_their_name(name: str, millions: int) -> None:
    assert set(SHAPES) >= {name}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.named_config(name))
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6) == millions


def test_layers_can_be_taken_away() -> None:
    assert models.named_config("gpt-j-6b", 2).num_hidden_layers == 2


# ---- the other commands ------------------------------------------------------------------------------------


def test_explain_prints_the_report(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--random-weights", config_file]) == 0
    assert "LlamaRMSNorm" in capsys.readouterr().out
    for options, dtype in (([], "bfloat16"), (["--dtype", "float16"], "float16")):
        assert main(["explain", "--random-weights", config_file, "--json", *options]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["dtype"] == dtype and report["counts"]["linear"] == 1


def test_explain_counts_one_thread_in_the_singular(
    config_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfopt.machine.env.threads", lambda: 1)
    assert main(["explain", "--random-weights", config_file]) == 0
    output = capsys.readouterr().out
    assert "; 1 thread, " in output and "1 threads" not in output


def test_explain_needs_no_tokenizer(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "weights alone"
    shutil.copytree(checkpoint, folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert main(["explain", str(folder)]) == 0
    assert "a decode step is one call" in capsys.readouterr().out


def test_explain_tells_what_a_format_does(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", "--random-weights", config_file, "--quantization", "int8"]
    assert main(arguments) == 0
    assert "Int8(" in capsys.readouterr().out
    assert main([*arguments, "--program"]) == 0
    assert "64 → 96 + 96, 8 bits" in capsys.readouterr().out


def test_explain_prints_the_program_of_a_step(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", "--random-weights", config_file, "--program"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "layer 1 as layer 0" in lines and "layer 1" not in lines
    assert main([*arguments, "--all-layers"]) == 0
    all_lines = capsys.readouterr().out.splitlines()
    assert "layer 0" in all_lines and "layer 1" in all_lines
    assert [line.split()[0] for line in all_lines[2:-2] if "layer " not in line] == [
        str(n) for n in range(22)
    ]
    assert "64 → 96 + 96" in all_lines[12] and "silu, gate × up" in all_lines[12]
    assert all_lines[-2].startswith("22 instructions, ")
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [line["layer"] for line in report["program"]["instructions"]] == [None] * 3 + [0] * 8 + [1] * 8 + [
        None
    ] * 3


def test_explain_says_why_there_is_no_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY | {"model_type": "diffllama"}))
    assert main(["explain", "--random-weights", str(file), "--program"]) == 0
    output = capsys.readouterr().out
    assert "has no program" in output and "does not run in kernels" in output
    assert main(["explain", "--random-weights", str(file), "--all-layers"]) == 2
    assert "--all-layers needs --program" in capsys.readouterr().err


def test_doctor_tests_the_kernels_and_names_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for line in (
        "CPU path",
        "Cores",
        "Threads",
        "OpenMP runtimes",
        "Kernel cache",
        "Thread pool",
        "Versions",
        "rms_norm",
    ):
        assert line in output
    layer = re.search(r"^Threading layer +(.+)$", output, re.MULTILINE)
    assert layer and layer.group(1).strip() in ("torch's OpenMP", "omp", "tbb", "workqueue")


def test_doctor_advises_against_other_work() -> None:
    cores = cores_of_process().usable
    assert any(f"keeps {cores:.1f} cores busy" in line for line in doctor._advice(cores))
    assert not any("busy" in line for line in doctor._advice(0.4 * cores))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "OMP_WAIT_POLICY and GOMP_SPINCOUNT are not set"),
        ({"GOMP_SPINCOUNT": "100"}, "as GOMP_SPINCOUNT=100 says"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "as OMP_WAIT_POLICY=PASSIVE says"),
    ],
)
def test_doctor_says_what_a_launch_costs_and_how_threads_wait(
    settings: dict[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    rows = dict(doctor._kernels(bandwidth=5e10, launch=1.44e-6, rested_launch=84.4e-6))
    line = rows["Thread pool"]
    assert "1.4 µs" in line
    assert "after a rest 84 µs" in line
    assert words in line


def test_warmup_names_the_cache_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup"]) == 0
    assert "compiled kernels" in capsys.readouterr().out


@pytest.mark.parametrize("quantization", [Int8(group=256), "int4", NF4(compute="float")])
def test_warmup_makes_models_of_a_format_too(quantization: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    module = sys.modules["hfopt.warmup"]

    def optimize(model: Any, **options: Any) -> Any:
        hfopt.optimize(model, **options)
        linears = [each for each in model.modules() if isinstance(each, torch.nn.Linear)]
        packed = [each for each in linears if isinstance(each, QuantizedLinear)]
        made.append((type(model).__name__, model.dtype, len(packed) / len(linears)))
        return model

    monkeypatch.setattr(module, "optimize", optimize)
    hfopt.warmup(quantization=quantization)
    assert made == [
        (name, dtype, share)
        for name in ("LlamaForCausalLM", "OPTForCausalLM")
        for dtype in DTYPES
        for share in (0, 1)
    ]


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
