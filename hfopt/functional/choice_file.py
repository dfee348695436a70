"""The file beside the compiled kernels that keeps what `choice` has measured on this machine."""

import functools
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from hfopt import env
from hfopt.kernels import _jit

logger = logging.getLogger(__name__)

_LARGEST = 1e6  # ratio that a file may hold


@functools.lru_cache
def _identity(n_threads: int) -> dict[str, Any]:
    """What the ratios hold for. The kernels' own sources and their CPU target are in the folder's name."""
    sources = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(source.name.encode() + source.read_bytes())
    return {
        "cpu": env.cpu_model(),
        "threads": n_threads,
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "float32 precision": torch.get_float32_matmul_precision(),
        "sources": sources.hexdigest()[:20],
    }


def path(n_threads: int) -> Path | None:
    """The file for this machine and number of threads; None without a kernel cache, whose folder is private."""
    folder, _ = _jit.cache_folder()
    if folder is None:
        return None
    digest = hashlib.sha256(json.dumps(_identity(n_threads)).encode()).hexdigest()
    return folder / f"choices-{digest[:20]}.json"


def read(n_threads: int) -> dict[str, float]:
    """torch's time / ours by label, as far as there is a file with sound entries."""
    file = path(n_threads)
    if file is None or not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
        if content["identity"] != _identity(n_threads):
            raise ValueError("it is another machine's")
        entries = dict(content["ratios"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s is damaged (%s): what it held is measured again.", file, error)
        return {}
    return {
        label: float(ratio)
        for label, ratio in entries.items()
        if type(ratio) in (int, float) and 0 < ratio < _LARGEST
    }


def add(n_threads: int, label: str, ratio: float) -> None:
    """Keep a ratio. Of two processes that do so at once, one entry may be lost: it is measured again."""
    file = path(n_threads)
    if file is None:
        return
    content = {"identity": _identity(n_threads), "ratios": {**read(n_threads), label: ratio}}
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix="choices-", suffix=".tmp")
        try:
            with open(handle, "w") as target:
                json.dump(content, target, indent=2)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        logger.warning("The choice of kernels could not be kept: %s", error)
