"""The tokenizer of a request: `generate` drops it beside `custom_generate`, and these methods of the model are given it all
the same.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from hfopt import host

from ._types import Model
from .binding import Bound

# of the request that runs in this thread
_tokenizer: ContextVar[Any] = ContextVar("hfopt_tokenizer", default=None)


@contextmanager
def tokenizer_of(request: dict[str, Any]) -> Iterator[None]:
    """In the block, methods of a model are given the tokenizer of this request, or none: requests may contain others."""
    token = _tokenizer.set(request.get(host.TOKENIZER))
    try:
        yield
    finally:
        _tokenizer.reset(token)


def stopping_criteria(model: Model, *args: Any, **kwargs: Any) -> Any:
    """The method of GenerationMixin that makes a request's criteria, of its stop strings too."""
    return _with_tokenizer(model, host.CRITERIA, args, kwargs)


def heal(model: Model, *args: Any, **kwargs: Any) -> Any:
    """The method of GenerationMixin that chooses the last token of each prompt anew."""
    return _with_tokenizer(model, host.HEAL, args, kwargs)


def is_given_tokenizer(model: Model, method: str) -> bool:
    """Whether this method of a model is one of ours, and that of transformers takes what it adds."""
    if not isinstance(vars(model).get(method), Bound):
        return False
    return host.TOKENIZER in inspect.signature(getattr(type(model), method)).parameters


def _with_tokenizer(model: Model, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    theirs = getattr(type(model), method)
    given = inspect.signature(theirs).bind(model, *args, **kwargs)
    if given.arguments.get(host.TOKENIZER) is None:
        given.arguments[host.TOKENIZER] = _tokenizer.get()
    return theirs(*given.args, **given.kwargs)
