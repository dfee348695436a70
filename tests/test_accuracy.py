"""`hfopt accuracy`: its figures against plain numpy, its table, its exit code, its errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import hfopt
from hfopt.bench import accuracy
from hfopt.bench.accuracy_sums import Sums
from hfopt.cli import main
from tests.generation_cases import CACHE

Array = NDArray[np.float64]
TEXT = "Return the number of items in the list.\n\nRaise an exception if the file is not found; remove it then.\n"


def plain(logits: Array, reference: Array, targets: NDArray[np.int64]) -> dict[str, float]:
    """Perplexity of both, mean KL divergence, agreement and rms error, from logits [tokens, vocabulary]."""

    def log_softmax(x: Array) -> Array:
        shifted = x - x.max(-1, keepdims=True)
        result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return result

    log_q, log_p = log_softmax(logits), log_softmax(reference)
    each = np.arange(len(targets))
    perplexity = float(np.exp(-log_q[each, targets].mean()))
    exact = float(np.exp(-log_p[each, targets].mean()))
    return {
        "perplexity": perplexity,
        "reference_perplexity": exact,
        "change": perplexity / exact - 1,
        "divergence": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        "agreement": float((logits.argmax(-1) == reference.argmax(-1)).mean()),
        "error": float(np.sqrt(((logits - reference) ** 2).mean())),
    }


@pytest.mark.parametrize("n_tokens", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_those_of_numpy(n_tokens: int, dtype: torch.dtype) -> None:
    reference = 4 * torch.randn(n_tokens, 57)
    logits = (reference + 0.3 * torch.randn(n_tokens, 57)).to(dtype)
    targets = torch.randint(57, (n_tokens,))
    whole, parts = Sums(), Sums()
    whole.add(logits, reference, targets)
    for part in range(0, n_tokens, 7):
        parts.add(*(tensor[part : part + 7] for tensor in (logits, reference, targets)))
    expected = plain(logits.double().numpy(), reference.double().numpy(), targets.numpy())
    assert whole.figures()._asdict() == pytest.approx(expected, rel=1e-9)
    assert parts.figures()._asdict() == pytest.approx(expected, rel=1e-9)


def test_of_equal_logits_nothing_is_lost() -> None:
    logits = torch.randn(40, 9)
    sums = Sums()
    sums.add(logits, logits, torch.randint(9, (40,)))
    figures = sums.figures()
    assert (figures.change, figures.divergence, figures.agreement, figures.error) == (0, 0, 1, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama of 64 positions and the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(hfopt.embedded_model())
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def accuracy_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    """The forms in the JSON that the command prints."""
    assert main(["accuracy", *map(str, arguments), "--json"]) == 0
    forms: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["forms"]
    return forms


@torch.no_grad()
def logits_of(model: Any, windows: list[torch.Tensor], cache: type = DynamicCache) -> Array:
    """Of all windows, in float64."""
    parts = [model(each[None], **{CACHE: cache(config=model.config)}).logits[0] for each in windows]
    logits: Array = torch.cat(parts).double().numpy()
    return logits


@pytest.mark.parametrize("window", [None, 10])
def test_figures_are_those_of_numpy(
    window: int | None, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [] if window is None else ["--window", window]
    fields = {"format": "int4", "group": 32, "compute": "float"}
    names = ["none", "int8", json.dumps(fields)]
    chosen = [argument for name in names for argument in ("--quantization", name)]
    forms = accuracy_json(capsys, checkpoint, "--text", text, *options, "--by-token", 20, *chosen)

    ids = torch.tensor(AutoTokenizer.from_pretrained(checkpoint)(TEXT)["input_ids"])
    windows = list(ids[:-1].split(window or 64))
    assert len(windows) == (1 if window is None else 3)
    reference = logits_of(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), windows)
    quantizations: list[Any] = ["stock", None, "int8", fields]
    assert [form["by_token"] for form in forms] == [False] * 4 + [True] * 4
    for form, by_token, quantization in zip(forms[:4], forms[4:], quantizations, strict=True):
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        if quantization != "stock":
            hfopt.optimize(model, quantization=quantization)
        cache = DynamicCache if quantization == "stock" else hfopt.IndirectCache
        logits = logits_of(model, windows, cache)
        assert form["tokens"] == len(ids) - 1
        expected = plain(logits, reference, ids[1:].numpy())
        assert {name: form[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)
        # with a cache and one token at a time, bfloat16 rounds at other places
        assert by_token["tokens"] == 20
        expected = plain(logits[:20], reference[:20], ids[1:21].numpy())
        assert by_token["reference_perplexity"] == pytest.approx(expected["reference_perplexity"], rel=1e-6)
        assert by_token["error"] == pytest.approx(expected["error"], rel=0.3)
        assert by_token["perplexity"] == pytest.approx(expected["perplexity"], rel=0.1)


def test_the_table_has_a_line_for_every_form(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "figures.json"
    arguments = ["accuracy", str(checkpoint), "--text", str(text), "--by-token", "9", "--tokens", "25"]
    formats = ["--quantization", "none", "--quantization", "int8"]
    assert main([*arguments, *formats, "--json", str(target)]) == 0
    head, _, *lines, _, verdict = capsys.readouterr().out.splitlines()
    for column in ("perplexity", "change", "KL", "same best token", "rms error"):
        assert column in head
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = ["stock float32", "stock bfloat16", "optimized bfloat16", "int8"]
    assert [row[0] for row in cells] == [
        f"{reading}: {name}" for reading in ("24 tokens by windows", "9 tokens by token") for name in names
    ]
    assert "allowed 1.5" in verdict
    figures = json.loads(target.read_text())
    written = [figures["forms"][index] for index in (0, 1, 2, 3, 4, 5)]
    for form, row in zip(written, cells[1:4] + cells[5:8], strict=True):
        assert row[1] == f"{form['perplexity']:.3f}"
        assert row[3] == f"{form['divergence']:.2e}"
    assert f"{figures['optimized_to_stock_error']:.2f}" in verdict


def test_float32_has_no_stock_to_be_compared_with(
    checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [checkpoint, "--text", text, "--dtype", "float32", "--quantization", "none"]
    whole, by_token = accuracy_json(capsys, *arguments)
    assert whole["form"] == by_token["form"] == "optimized float32"
    assert 0 < whole["error"] < 1e-4 and 0 < by_token["error"] < 1e-4
    assert whole["agreement"] == by_token["agreement"] == 1


def test_random_weights_read_random_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    shape = {"model_type": "llama", "vocab_size": 120, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4}
    config.write_text(json.dumps({**shape, **heads}))
    forms = accuracy_json(capsys, "--random-weights", config, "--tokens", 30, "--quantization", "none")
    assert [form["tokens"] for form in forms] == [29] * 4


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.5, 1), (float("nan"), 1)])
def test_an_optimised_model_that_is_too_far_away_is_an_error(
    factor: float,
    code: int,
    checkpoint: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @torch.no_grad()
    def damage(model: Any, **kwargs: Any) -> Any:
        model.model.layers[1].mlp.down_proj.weight.mul_(factor)
        return model

    monkeypatch.setattr(hfopt, "optimize", damage)
    arguments = ["accuracy", str(checkpoint), "--text", str(text), "--by-token", "0"]
    assert main([*arguments, "--quantization", "none"]) == code
    assert "allowed" in capsys.readouterr().out
    # what is quantised may be as far away as it likes
    assert main([*arguments, "--quantization", "int8"]) == 0
    assert "allowed" not in capsys.readouterr().out


def test_calibrated_forms_stand_beside_the_others(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Return a list of the files in the folder. Raise an exception if there are none.\n" * 5)
    arguments = ["--text", text, "--by-token", 0, "--quantization", "int4", "--calibration", other]
    _, plain, calibrated = accuracy_json(capsys, *arguments)
    assert (plain["form"], calibrated["form"]) == ("int4", "int4, calibrated")
    assert calibrated["divergence"] != plain["divergence"]
    assert calibrated["is_calibrated"] and not plain["is_calibrated"]


def test_caches_of_codes_stand_beside_the_others(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--text", text, "--by-token", 0, "--quantization", "none", "--quantization", "int8"]
    stock, *forms = accuracy_json(capsys, *arguments, "--kv-cache", "int8")
    assert stock["kv_cache"] is None
    assert [(form["quantization"], form["kv_cache"]) for form in forms] == [
        (None, None),
        ("int8", None),
        (None, "int8"),
        ("int8", "int8"),
    ]
    plain, cached = forms[0], forms[2]
    assert plain["divergence"] < cached["divergence"] < 0.01


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"caf\xe9", "UTF-8"),
    ],
)
def test_a_text_that_is_none_is_named(
    content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    for flag in ("--text", "--calibration"):
        assert main(["accuracy", flag, str(file)]) == 2
        error = capsys.readouterr().err
        assert f"{flag}={file}" in error.replace("\n", "") and words in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantization", "int3"], "int3"),
        (["--quantization", "{int4"], "is not JSON"),
        (["--quantization", '{"format": "int4", "group": 33}'], "group=33"),
        (["--tokens", "1"], "--tokens=1"),
        (["--window", "0"], "--window=0"),
        (["--window", "65"], "--window=65"),
        (["--by-token", "-1"], "--by-token=-1"),
        (["--random-weights", "llama-160m"], "exclude each other"),
    ],
)
def test_wrong_arguments_get_one_line(
    arguments: list[str], words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["accuracy", str(checkpoint), *arguments]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_random_weights_read_no_text(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--text", "--calibration"):
        assert main(["accuracy", "--random-weights", "llama-160m", flag, str(text)]) == 2
        assert "need a tokenizer" in capsys.readouterr().err


def test_the_default_text_is_held_out() -> None:
    assert accuracy.read_text("--text", accuracy.heldout()).startswith("Read 'size' bytes")
