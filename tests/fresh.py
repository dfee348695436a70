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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_SECONDS = 1800  # after which a process is ended


def run(code: str, *arguments: str, **variables: str | None) -> str:
    """What the code prints. A failure is an AssertionError with its traceback."""
    finished = Process(code, *arguments, **variables).wait()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


class Process:
    """Runs Python code beside the tests.

    id: its number.
    Its global `n_threads_of_import` says how many threads importing hfopt has started.

    arguments: `sys.argv[1:]`.
    variables: of the environment, where it differs from this process's; None: not set. What libraries read while they are
        imported is known already.
    """

    def __init__(self, code: str, *arguments: str, **variables: str | None) -> None:
        self._arguments = arguments
        self._folder = tempfile.TemporaryDirectory()
        merged: dict[str, str | None] = {**os.environ, **variables}
        environment = {name: value for name, value in merged.items() if value is not None}
        self.id = _ask([code, arguments, environment, self._folder.name])

    def wait(self) -> subprocess.CompletedProcess[str]:
        """How it ended, and what it printed."""
        status = _ask(self.id)
        with self._folder:
            printed = [Path(self._folder.name, name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(self._arguments, status, *printed)


def _ask(request: Any) -> int:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.fresh"]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # it ends with its input
    return server


# ---- the server --------------------------------------------------------------------------------------------


def _serve() -> None:
    """Begins a process for a list, and answers with its id; for an id, waits for its status."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    n_before = _n_threads()
    import hfopt  # noqa: F401 (what all of the processes have in common; no Numba: see test_imports)

    known = {"__name__": "__main__", "n_threads_of_import": _n_threads() - n_before}
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, list):
            answer = _forked(known, *request)
            running.add(answer)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
            running.remove(request)
        print(answer, flush=True)
    for process in running:
        os.kill(process, signal.SIGKILL)


def _n_threads() -> int:
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0


def _forked(
    known: dict[str, Any], code: str, arguments: list[str], environment: dict[str, str], folder: str
) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.alarm(_SECONDS)
        os.environ.clear()
        os.environ.update(environment)
        files = os.devnull, os.path.join(folder, "stdout"), os.path.join(folder, "stderr")
        for descriptor, file in enumerate(files):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), descriptor)
        sys.argv[1:] = arguments
        exec(code, known)
        status = 0
    except BaseException:  # noqa: BLE001 (as an interpreter of its own would)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
