"""transformers' own streamers, which hand tokens on and do nothing else between the steps of a request."""

from typing import Any

import transformers

_NAMES = ("TextStreamer", "TextIteratorStreamer", "AsyncTextIteratorStreamer")
_KINDS = frozenset(getattr(transformers, name) for name in _NAMES if hasattr(transformers, name))


def only_hands_on(streamer: Any) -> bool:
    """Whether it is one of them, with nothing in place of its methods."""
    return type(streamer) in _KINDS and vars(streamer).keys().isdisjoint(dir(type(streamer)))
