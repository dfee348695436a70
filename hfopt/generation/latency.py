"""How long the first token of a request took, and each later one."""

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ._types import Model

_lock = threading.Lock()


@dataclass
class Latency:
    """Seconds per token (per step of all rows together), over all calls of `generate` while it was recorded.

    `first`: from the call to the first new token, one entry a call. `next`: from token to token; tokens that
    were accepted together share their time equally.
    """

    first: list[float] = field(default_factory=list)
    next: list[float] = field(default_factory=list)


@contextmanager
def record_latency(model: Model) -> Iterator[Latency]:
    """Records the latency of every `generate` of `model` in the block, from any thread; optimised or not.

    Example:
        >>> import hfopt, torch
        >>> model = hfopt.load(hfopt.embedded_model())
        >>> with hfopt.record_latency(model) as timings:
        ...     tokens = model.generate(torch.tensor([[1, 2, 3]]), min_new_tokens=8, max_new_tokens=8)
        >>> len(timings.first), len(timings.next)
        (1, 7)
    """
    latency = Latency()
    with _lock:
        bound: Any = model.__dict__.get("generate")
        if not _is_timed(bound):
            bound = functools.partial(_timed_generate, model, bound, [])
            model.generate = bound
        recordings = bound.args[2]
        recordings.append(latency)
    try:
        yield latency
    finally:
        with _lock:
            # by identity: two empty recordings are equal
            recordings[:] = [recording for recording in recordings if recording is not latency]
            if not recordings and model.__dict__.get("generate") is bound:
                del model.generate
                if bound.args[1] is not None:
                    model.generate = bound.args[1]


class TokenClock(StoppingCriteria):
    """Stops nothing. Every loop, transformers' or ours, asks its criteria once when tokens were chosen."""

    def __init__(self, recordings: list[Latency]):
        self._recordings = recordings
        self._length: int | None = None
        self._last = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        length = input_ids.shape[1]
        for recording in self._recordings:
            if self._length is None:
                recording.first.append(seconds)
            else:
                n_tokens = length - self._length
                recording.next.extend([seconds / n_tokens] * n_tokens)
        self._length = length
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _is_timed(bound: Any) -> bool:
    return isinstance(bound, functools.partial) and bound.func is _timed_generate


def _timed_generate(model: Model, bound: Any, recordings: list[Latency], *args: Any, **kwargs: Any) -> Any:
    generate = bound if bound is not None else functools.partial(type(model).generate, model)
    if kwargs.get("cache_implementation") == "paged":  # continuous batching refuses criteria
        return generate(*args, **kwargs)
    names = ("inputs", "generation_config", "logits_processor", "stopping_criteria")
    kwargs.update(zip(names, args[: len(names)], strict=False))
    given = kwargs.get("stopping_criteria") or []
    with _lock:
        clock = TokenClock(list(recordings))
    kwargs["stopping_criteria"] = StoppingCriteriaList([*given, clock])
    return generate(*args[len(names) :], **kwargs)
