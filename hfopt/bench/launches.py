"""The launches of kernels while something runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock


class Launched(NamedTuple):
    """A kernel, what it was given and returned, and when: seconds of `time.perf_counter`."""

    kernel: Any
    arguments: tuple[Any, ...]
    result: Any
    begin: float
    end: float


@contextmanager
def launches() -> Iterator[list[Launched]]:
    """Record the launches in the block, in a list that grows."""
    from hfopt.kernels.jit import (
        launch as jit,  # loads Numba, which what is to be measured may not have done yet
    )

    found: list[Launched] = []
    original = jit.Launch.__call__

    def noted(self: jit.Launch, *args: Any) -> Any:
        begin = time.perf_counter()
        result = original(self, *args)
        found.append(Launched(self, args, result, begin, time.perf_counter()))
        return result

    with mock.patch.object(jit.Launch, "__call__", noted):
        yield found
