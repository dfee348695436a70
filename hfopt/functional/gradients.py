"""Operations whose results carry no gradient, and that say so instead of returning what nothing can be learnt from."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from hfopt.errors import InvalidInput

P = ParamSpec("P")
R = TypeVar("R")


def without_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """Let an operation record nothing, and raise `InvalidInput` for tensors of which a gradient is recorded.

    Parameters are passed over: those of a model in inference say that they need one, too.
    """
    names = tuple(inspect.signature(function).parameters)

    def check(named: Iterable[tuple[str, object]]) -> None:
        for name, each in named:
            if isinstance(each, Tensor) and each.requires_grad and not isinstance(each, nn.Parameter):
                raise InvalidInput(
                    f"{name} needs a gradient, and results carry none: "
                    "call this under torch.no_grad() or torch.inference_mode()"
                )

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        check(zip(names, args, strict=False))
        if kwargs:
            check(kwargs.items())
        # what `torch.no_grad()` does, which takes longer than a call of one row
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    return call
