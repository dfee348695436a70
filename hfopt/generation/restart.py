"""A request that our loop cannot go on with: begun again in transformers' own, as long as nothing has been given out."""

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.generation import BaseStreamer

from ..errors import HostError
from ..host import cached_length, installed


class Unfit(Exception):
    """Raised behind a prompt, before a token is chosen: the host does not do what our loop is built on."""


class Resumed(BaseStreamer):
    """A streamer that has been given the prompt already."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
        else:
            self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


class Rollback:
    """The length of the cache that a user has given to a request, to which it can be brought back."""

    def __init__(self, cache: Cache | None) -> None:
        self._cache = cache
        self._length = cached_length(cache)

    def undo(self, reason: Unfit) -> None:
        """Takes the prompt off the cache again; raises HostError if that cannot be done."""
        n_new = cached_length(self._cache) - self._length
        if self._cache is None or n_new == 0:
            return
        try:
            self._cache.crop(-n_new)
        except (ValueError, NotImplementedError, RuntimeError):
            n_new = -1
        if n_new < 0 or cached_length(self._cache) != self._length:
            raise HostError(broken(str(reason))) from reason


def broken(what: Any) -> str:
    """The message of a HostError."""
    return (
        f"{what}. This is not what hfopt knows of transformers {installed()}: please report it. "
        "hfopt.restore(model) gives transformers' own generate back."
    )
