"""Processes of a group: each calls functions of a test, and hands back what they return."""

import pickle
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import fresh

_CODE = """
import importlib, os, pickle, signal, sys, traceback
signal.alarm(300)
import torch
import torch.distributed as dist
torch.set_num_threads(1)
rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=size)
open(store + "-" + sys.argv[1], "w").close()
found = []
for name, arguments in pickle.loads(bytes.fromhex(sys.argv[4])):
    module, _, function = name.partition(":")
    found.append(getattr(importlib.import_module(module), function)(*arguments))
print(pickle.dumps(found).hex(), flush=True)
os._exit(0)  # gloo's threads may wait for a rank that is gone
"""


class Ranks:
    """`size` processes of a process group of gloo, which all call the same functions, as "module:name" with arguments."""

    def __init__(self, size: int, *calls: tuple[str, Sequence[Any]]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._store = str(Path(self._folder.name, "store"))
        self.processes = [
            fresh.Process(_CODE, str(rank), str(size), self._store, pickle.dumps(calls).hex())
            for rank in range(size)
        ]

    def begin(self) -> None:
        """Wait until all of them have found each other."""
        for rank in range(len(self.processes)):
            while not Path(f"{self._store}-{rank}").exists():
                time.sleep(0.01)

    def wait(self, killed: Sequence[int] = ()) -> list[list[Any]]:
        """What the functions have returned on each rank; nothing on those that were killed. A failure is an
        AssertionError with its traceback."""
        with self._folder:
            ended = [process.wait() for process in self.processes]
        wrong = [
            (rank, process.stderr)
            for rank, process in enumerate(ended)
            if process.returncode != (-signal.SIGKILL if rank in killed else 0)
        ]
        assert not wrong, "\n".join(f"rank {rank}: {said}" for rank, said in wrong)
        return [
            [] if rank in killed else pickle.loads(bytes.fromhex(process.stdout.splitlines()[-1]))
            for rank, process in enumerate(ended)
        ]


def results(size: int, *calls: tuple[str, Sequence[Any]]) -> list[list[Any]]:
    """What each function has returned on each of the ranks."""
    return [list(found) for found in zip(*Ranks(size, *calls).wait(), strict=True)]
