"""A request that our loop cannot go on with: begun again in transformers' own, as long as nothing has been given out."""

import contextlib
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.generation import BaseStreamer

from hfopt.errors import HostError
from hfopt.host import cached_length, installed


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
        length = cached_length(self._cache)
        if self._cache is None or (length is not None and length == self._length):
            return
        if length is not None and self._length is not None and length > self._length:
            with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):
                self._cache.crop(self._length - length)
                if cached_length(self._cache) == self._length:
                    return
        raise HostError(broken(str(reason))) from reason


def broken(what: Any) -> str:
    """The message of a HostError."""
    return (
        f"{what}. This is not what hfopt knows of transformers {installed()}: please report it. "
        "hfopt.restore(model) gives transformers' own generate back."
    )
