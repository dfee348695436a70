"""Bars for what takes seconds: compiling kernels, once on a machine, and quantising weights."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils.logging import tqdm

_lock = threading.Lock()
_depth = 0


@contextmanager
def compile_progress() -> Iterator[None]:
    """Shows a bar on standard error if kernels are compiled in the block, and nothing otherwise.

    It is transformers' own kind of bar: `transformers.utils.logging.disable_progress_bar()` hides it.
    """
    global _depth
    from hfopt.kernels.jit import launch as jit  # here, because `import hfopt` must not load Numba

    with _lock:
        outermost, _depth = _depth == 0, _depth + 1
    bars: list[Any] = []

    def count(kernel: str) -> None:
        if not bars:
            bars.append(tqdm(desc="hfopt compiles its kernels, once on this machine", unit=" kernels"))
        bars[0].update()

    if outermost:
        jit.compile_listeners.append(count)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
        if outermost:
            jit.compile_listeners.remove(count)
        for bar in bars:
            bar.close()


@contextmanager
def progress(description: str, total: int, unit: str = "weights") -> Iterator[Callable[[], None]]:
    """Shows such a bar if the block takes longer than a moment; yields what advances it."""
    with tqdm(desc=description, total=total, unit=f" {unit}", delay=0.5) as bar:
        yield bar.update
