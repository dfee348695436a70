"""Processes of a group: each runs a function of a test, and hands back what it returns."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_SECONDS = 120  # after which a process is ended

_CODE = """
import pickle, signal, sys
signal.alarm({seconds})
import torch
import torch.distributed as dist
torch.set_num_threads(1)
rank, size, store, function = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=size)
import importlib
module, _, name = function.partition(":")
work = getattr(importlib.import_module(module), name)
try:
    found = work(*pickle.loads(bytes.fromhex(sys.argv[5])))
except BaseException as error:
    found = error
with open(store + "." + sys.argv[1], "wb") as file:
    pickle.dump(found, file)
import os
os._exit(0)  # gloo's threads may wait for a rank that is gone
"""


class Ranks:
    """`size` processes of a process group of gloo, which all call one function of a module of tests."""

    def __init__(self, function: str, size: int, *arguments: Any, **variables: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._store = Path(self._folder.name, "store")
        code, packed = _CODE.format(seconds=_SECONDS), pickle.dumps(arguments).hex()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank), str(size), str(self._store), function, packed],
                env=environment,
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def wait(self, killed: Sequence[int] = ()) -> list[Any]:
        """What each rank has returned, or the exception that it has raised; None of those that were killed."""
        with self._folder:
            said = [process.communicate(timeout=_SECONDS + 10)[1] for process in self.processes]
            found: list[Any] = []
            for rank, process in enumerate(self.processes):
                if rank in killed:
                    assert process.returncode == -signal.SIGKILL
                    found.append(None)
                    continue
                assert process.returncode == 0, said[rank]
                found.append(pickle.loads(Path(f"{self._store}.{rank}").read_bytes()))
        return found


def results(function: str, size: int, *arguments: Any, **variables: str) -> list[Any]:
    """What the function has returned on each rank; an exception of any of them is raised."""
    found = Ranks(function, size, *arguments, **variables).wait()
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
