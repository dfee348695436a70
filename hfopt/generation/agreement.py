"""What processes that have a model together have to agree on in a request: what was asked, and what depends on time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from hfopt.errors import InvalidInput

from ._types import Model
from .state import installed

if TYPE_CHECKING:  # it loads Numba
    from hfopt.distributed.ranks import Ranks

_PLAIN = (bool, int, float, str, bytes, type(None))


def of_first(ranks: Ranks | None, seconds: float) -> float:
    """What has taken so long here: the seconds of the first process."""
    return seconds if ranks is None else ranks.first(int(seconds * 1e9)) / 1e9


def agreed(ranks: Ranks | None, hits: np.ndarray | None, n_rows: int) -> np.ndarray | None:
    """Which rows stop, bool [n_rows] or None: those of the first process."""
    if ranks is None:
        return hits
    told = ranks.first_flags(np.zeros(n_rows, np.bool_) if hits is None else hits)
    return told if told.any() else None


@contextmanager
def one_request(model: Model, arguments: Mapping[str, Any]) -> Iterator[None]:
    """In the block, a request that all processes that have the model together make at the same time; one at a time.

    Raises InvalidInput, in all of them, if they make different ones.
    """
    ranks = installed(model).ranks
    if ranks is None:
        yield
        return
    with ranks.lock:
        _check_same(ranks, model, arguments)
        yield


def _check_same(ranks: Ranks, model: Model, arguments: Mapping[str, Any]) -> None:
    settings = arguments.get("generation_config") or model.generation_config
    is_random = arguments.get("do_sample", getattr(settings, "do_sample", False))
    parts = {name: _digest(value) for name, value in arguments.items()}
    parts["generation_config"] = _digest(settings)
    if is_random:
        parts["the random state of torch"] = _digest(torch.get_rng_state())
    different = ranks.different(parts)
    if different is not None:
        rank, name = different
        raise InvalidInput(
            f"{name} of rank {rank} is another than that of rank 0: all ranks have to make the same request"
        )


def _digest(value: Any) -> str:
    """Equal for equal tensors, numbers and texts, and what consists of them; of all else the type alone."""
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy() if plain.numel() else b"")
    elif isinstance(value, GenerationConfig):
        _add(digest, value.to_dict())
    elif isinstance(value, Mapping):
        for name, each in value.items():
            digest.update(f"{name}:".encode())
            _add(digest, each)
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}[".encode())
        for each in value:
            _add(digest, each)
    elif isinstance(value, _PLAIN):
        digest.update(f"{value!r};".encode())
    else:
        digest.update(type(value).__qualname__.encode())
