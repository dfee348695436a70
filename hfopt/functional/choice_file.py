"""The file beside the compiled kernels that keeps what `choice` has measured on this machine."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

from hfopt.machine import env, private_file

_ENTRIES = "ratios"
_LARGEST = 1e6  # ratio that a file may hold


@functools.lru_cache
def _identity(n_threads: int) -> dict[str, Any]:
    """What the ratios hold for. The kernels' own sources and their CPU target are in the folder's name."""
    sources, package = hashlib.sha256(), Path(__file__).parent
    for source in sorted(package.rglob("*.py")):
        sources.update(source.relative_to(package).as_posix().encode() + source.read_bytes())
    return {
        "cpu": env.cpu_model(),
        "threads": n_threads,
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "float32 precision": torch.get_float32_matmul_precision(),
        "sources": sources.hexdigest()[:20],
    }


def path(n_threads: int) -> Path | None:
    """The file for this machine and number of threads; None without a kernel cache."""
    return private_file.path("choices", _identity(n_threads))


def read(n_threads: int) -> dict[str, float]:
    """torch's time / ours by label, as far as there is a file with sound entries."""
    entries = private_file.read(path(n_threads), _identity(n_threads), _ENTRIES) or {}
    return {
        label: float(ratio)
        for label, ratio in entries.items()
        if type(ratio) in (int, float) and 0 < ratio < _LARGEST
    }


def add(n_threads: int, label: str, ratio: float) -> None:
    """Keep a ratio. Of two processes that do so at once, one entry may be lost: it is measured again."""
    entries = {**read(n_threads), label: ratio}
    private_file.write(path(n_threads), _identity(n_threads), _ENTRIES, entries)
