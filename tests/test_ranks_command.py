"""Commands that run in several processes, which they start themselves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hfopt
from hfopt.cli import main, ranks
from hfopt.console import models

ROOT = Path(__file__).parents[1]
PROMPT = "Return a list of the"
RUN = ["run", "--tp", "2", "--greedy", "--dtype", "float32", "--prompt", PROMPT]


def begin(*arguments: str) -> subprocess.Popen[str]:
    # as a user would: how many threads there are is not said
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "hfopt", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=variables,
    )


def test_tokens_are_those_of_one_process_and_printed_once() -> None:
    process = begin(*RUN, "--max-new-tokens", "12", "--num-iter", "2", "--json")
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    found = json.loads(printed)["optimized"]["sequences"]  # of one process, or it would not be JSON
    folder = hfopt.embedded_model()
    model: Any = models.load(folder, torch.float32)
    inputs = models.load_tokenizer(folder)(PROMPT, return_tensors="pt")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert found == model.generate(**inputs, **options).tolist()


def test_what_is_wrong_is_said_once() -> None:
    process = begin("run", "--tp", "2", "--random-weights", "llama")
    printed, errors = process.communicate(timeout=200)
    assert (process.returncode, printed) == (2, "")
    assert errors.count("hfopt: rank") == 1 and "--random-weights" in errors and "Traceback" not in errors


def test_doctor_shows_places_and_measures_sums() -> None:
    process = begin("doctor", "--distributed")
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "2 ranks on 1 machine" in printed and "Traceback" not in errors
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    of_ranks = [row for row in rows if row[0].strip() in ("0", "1")]
    assert len(of_ranks) == 2
    allowed = os.sched_getaffinity(0)
    if len(allowed) == 2:
        assert {row[2].strip() for row in of_ranks} == {str(cpu) for cpu in allowed}
    for label in ("8 KB", "1 MB"):
        (row,) = (row for row in rows if row[0].strip() == label)
        assert all(float(cell.split()[0]) > 0 for cell in row[1:])


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_without_a_word(how: signal.Signals) -> None:
    process = begin(*RUN, "--max-new-tokens", "400", "--num-iter", "100000", "--streaming")
    assert process.stdout is not None
    assert process.stdout.readline()
    ranks_of = _children(process.pid)
    assert len(ranks_of) == 2
    process.send_signal(how)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + how and "Traceback" not in errors
    assert time.monotonic() - begun < 30 and not any(Path(f"/proc/{rank}").exists() for rank in ranks_of)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all_with_a_message() -> None:
    process = begin(*RUN, "--max-new-tokens", "400", "--num-iter", "100000", "--streaming")
    assert process.stdout is not None
    assert process.stdout.readline()
    os.kill(_children(process.pid)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.splitlines()[-1] == "hfopt: rank 1: it has been ended by SIGKILL"


@pytest.mark.slow
def test_torchrun_starts_the_command_too() -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hfopt"]
    rest = ["run", *RUN[3:], "--max-new-tokens", "4", "--num-iter", "2", "--sample"]
    done = subprocess.run(
        [sys.executable, *command, *rest], capture_output=True, text=True, cwd=ROOT, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Inference latency") == 1


def _children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text()
    names = {int(each): Path(f"/proc/{each}/cmdline").read_text() for each in listed.split()}
    return [each for each, name in names.items() if "hfopt.cli" in name]


def failure(message: Any, exitcode: int = 2) -> Any:
    said = {"message": message} if isinstance(message, str) else ""
    signal_name = signal.Signals(-exitcode).name if exitcode < 0 else "<N/A>"
    return SimpleNamespace(message=said, exitcode=exitcode, signal_name=lambda: signal_name)


@pytest.mark.parametrize(
    ("failures", "said", "code"),
    [
        ({0: failure("RankError: rank 1 is gone"), 1: failure("CacheFull: no room: 3")}, "1: no room: 3", 2),
        ({0: failure("RankError: rank 1 is gone")}, "0: rank 1 is gone", 2),
        ({0: failure(None, -15), 1: failure(None, -9)}, "1: it has been ended by SIGKILL", 1),
        ({1: failure(None, 7)}, "1: it has ended with 7", 7),
    ],
)
def test_the_cause_is_told(
    failures: dict[int, Any], said: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranks._tell(failures) == code
    assert capsys.readouterr().err == f"hfopt: rank {said}\n"


def test_one_process_needs_no_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--tp", "2"]) == 2
    assert "--tp needs --distributed" in capsys.readouterr().err
    assert main(["doctor", "--distributed", "--tp", "1"]) == 2
    assert "at least 2 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "n"),
    [({}, 1), ({"RANK": "0", "WORLD_SIZE": "4"}, 4), ({"WORLD_SIZE": "4"}, 1), ({"RANK": "0"}, 1)],
)
def test_torchrun_is_recognised(variables: dict[str, str], n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ranks.n_ranks() == n
