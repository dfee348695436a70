"""New processes in a tenth of a second: forked off one that has imported hfopt, without Numba and without a kernel.

A process of its own takes seconds to import torch and transformers, and most tests that need one ask what a process does
from its first kernel on.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_SECONDS = 600  # after which a process is ended


@dataclass(frozen=True)
class Process:
    """Python code, `sys.argv[1:]`, and the variables that differ from this process's environment (None: unset)."""

    code: str
    arguments: tuple[str, ...] = ()
    environment: dict[str, str | None] = field(default_factory=dict)


def run(code: str, *arguments: str, **environment: str | None) -> str:
    """What the code prints. A failure is an AssertionError with its traceback."""
    (finished,) = run_all([Process(code, arguments, environment)])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def run_all(processes: Sequence[Process]) -> list[subprocess.CompletedProcess[str]]:
    """How processes that run at the same time ended, and what they printed."""
    with tempfile.TemporaryDirectory() as folder:
        request = []
        for index, process in enumerate(processes):
            merged: dict[str, str | None] = {**os.environ, **process.environment}
            variables = {name: value for name, value in merged.items() if value is not None}
            request.append([process.code, process.arguments, variables, os.path.join(folder, str(index))])
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        return [
            subprocess.CompletedProcess(
                process.arguments, code, *(Path(f"{path}.{kind}").read_text() for kind in ("out", "err"))
            )
            for process, code, (*_, path) in zip(processes, codes, request, strict=True)
        ]


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.fresh"]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # it ends with its input
    return server


def _serve() -> None:
    import hfopt  # noqa: F401 (what all of the processes have in common)

    assert "numba" not in sys.modules
    for line in sys.stdin:
        children = [_forked(*each) for each in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


def _forked(code: str, arguments: list[str], environment: dict[str, str], path: str) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.alarm(_SECONDS)
        os.environ.clear()
        os.environ.update(environment)
        for descriptor, name in enumerate((os.devnull, f"{path}.out", f"{path}.err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), descriptor)
        sys.argv[1:] = arguments
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(code, names)
        status = 0
    except BaseException:  # noqa: BLE001 (as an interpreter of its own would)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
