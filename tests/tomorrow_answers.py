"""The answers of releases of transformers that do not exist yet, from processes that begin with the first test.

Each takes seconds, and beside the tests, which need hardly more than one core, they take none of their time.
"""

import atexit
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeAlias

from tests import tomorrow, tomorrow_requests

ROOT = Path(__file__).parents[1]
TODAY = ""  # the installed release
_SECONDS = 300  # after which the process of a release is ended

Answers: TypeAlias = dict[str, Any]


class Asked:
    """Answers by the name of the release, which come in any order."""

    def __init__(self, names: Iterable[str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name, "stderr")
        command = [sys.executable, "-m", __name__, self._folder.name, *dict.fromkeys(names)]
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
        self._outcomes: dict[str, Any] = {}
        atexit.register(self._end)

    def answers(self, name: str) -> Answers:
        """Raises tomorrow.Inapplicable."""
        assert self._process.stdout is not None
        while name not in self._outcomes:
            line = self._process.stdout.readline()
            assert line, self._errors.read_text()
            released, kind, outcome = json.loads(line)
            self._outcomes[released] = kind, outcome
        kind, outcome = self._outcomes[name]
        if kind == "inapplicable":
            raise tomorrow.Inapplicable(outcome)
        assert kind == "answers", outcome
        found: Answers = outcome
        return found

    def _end(self) -> None:
        with self._folder, self._process:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)


@functools.cache
def begun(session: Any) -> Asked:
    """Processes that ask today's release, and those that the tests of this session ask."""
    items = [item for item in session.items if "ask" in getattr(item, "fixturenames", ())]
    return Asked(item.callspec.params["name"] for item in items)


# ---- beside the tests --------------------------------------------------------------------------------------


def _ask_all(folder: Path, names: list[str]) -> None:
    """Prints a line for each release; two of them are asked at a time.

    They are forked from one process that has imported what all of them need, which takes longer than everything else.
    """
    os.nice(10)
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what releases print
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(tomorrow_requests.THIRD_PARTIES)
    with ThreadPoolExecutor(2) as pool:
        today = pool.submit(_answers, context, "", folder / "today")
        asked = {today: TODAY}
        for name in names:
            asked[pool.submit(_make_and_ask, context, name, folder / name, today)] = name
        for future in as_completed(asked):
            print(json.dumps([asked[future], *_outcome(future)]), file=lines, flush=True)


def _outcome(future: "Future[Answers]") -> tuple[str, Any]:
    try:
        return "answers", future.result()
    except tomorrow.Inapplicable as reason:
        return "inapplicable", str(reason)
    except Exception as error:  # noqa: BLE001  (what the tests raise)
        return "error", f"{type(error).__name__}: {error}"


def _make_and_ask(context: Any, name: str, folder: Path, today: "Future[Answers]") -> Answers:
    release = folder / "release"
    release.mkdir(parents=True)
    tomorrow.make(name, release)
    if tomorrow.VARIANTS[name].keeps_version:
        today.result()  # has left behind what it found out about a release of this version
    return _answers(context, str(release), folder)


def _answers(context: Any, release: str, folder: Path) -> Answers:
    folder.mkdir(exist_ok=True)
    path = folder / "answers.json"
    process = context.Process(target=tomorrow_requests.answer, args=(release, str(path)))
    process.start()
    process.join(_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, f"{folder.name}: the process ended with {process.exitcode}"
    answers: Answers = json.loads(path.read_text())
    return answers


if __name__ == "__main__":
    _ask_all(Path(sys.argv[1]), sys.argv[2:])
