"""Every causal language model type of transformers says the same after `optimize`, and those that are programs stay so."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import model_types as table
from tests import model_types

ROOT = Path(__file__).parents[1]
BY_PROGRAM = 71  # types whose decoder is one call a step, for texts of any length


@pytest.mark.slow
def test_no_type_says_anything_else_and_as_many_as_ever_are_programs(tmp_path: Path) -> None:
    file = tmp_path / "types.json"
    command = [sys.executable, "scripts/model_types.py", "--json", str(file)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    rows = json.loads(file.read_text())
    assert [row["type"] for row in rows] == list(model_types.TYPES)
    assert finished.returncode == 0, finished.stdout
    assert Counter(row["runs"] for row in rows)["program"] >= BY_PROGRAM


def test_a_row_says_how_a_type_runs() -> None:
    llama, mamba, gemma3 = map(table.row_of, ("llama", "mamba", "gemma3"))
    assert (llama.runs, llama.tokens, llama.why) == ("program", "same", "") and llama.error < 1e-5
    assert mamba.runs == "modules" and mamba.tokens == "same" and "no decoder whose parts" in mamba.reason
    assert gemma3.runs == "skipped" and "gemma3_text" in gemma3.reason


def test_a_wrong_model_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def optimize(model: Any, **options: Any) -> Any:
        with torch.no_grad():
            model.lm_head.weight[7] *= -3
        return optimized(model, **options)

    optimized = table.hfopt.optimize
    monkeypatch.setattr(table.hfopt, "optimize", optimize)
    row = table.row_of("llama")
    assert row.tokens not in table.GOOD and row.error > 0.1
    monkeypatch.setattr(table.hfopt, "optimize", None)
    assert table.row_of("llama").tokens.startswith("raises TypeError")


def test_a_process_that_crashes_does_not_end_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends at its second type, as a kernel that crashes would."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys\n"
        "for name in sys.argv[2].split(','):\n"
        "    os.abort() if name == 'opt' else print(json.dumps({'type': name, 'runs': 'program'}), flush=True)\n"
    )
    monkeypatch.setattr(table, "__file__", str(worker))
    rows = list(table.rows(["llama", "opt", "gptj"]))
    assert [row.runs for row in rows] == ["program", "nothing", "program"]
    assert rows[1].type == "opt" and "status -6" in rows[1].tokens
