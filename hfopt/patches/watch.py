"""Watch: whether a model is still the one from which something was made."""

from itertools import chain
from operator import is_, itemgetter, methodcaller
from typing import Any

import torch
from torch import nn

_TRAINING = itemgetter("training")
_ADDRESS = methodcaller("data_ptr")
_PLAIN = (bool, int, float, str, type(None))


class Watch:
    """Remembers what a forward pass of a model depends on, but for the numbers in its parameters.

    These are classes, children, hooks, modes, attributes, and which tensors are the parameters and buffers. It is asked
    before every step, so it goes through lists that are made once.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = self._modules = list(model.modules())
        states = self._states = [vars(module) for module in modules]
        self._hooks = [state[name] for state in states for name in ("_forward_hooks", "_forward_pre_hooks")]
        self._children = [state["_modules"] for state in states if state["_modules"]]
        self._tensors = [
            state[name] for state in states for name in ("_parameters", "_buffers") if state[name]
        ]
        self._owned = [tensor for tensor in self._held() if tensor is not None]
        self._tensors_then = self._held()
        self._then = self._now()
        self._rest = self._seldom()

    def _held(self) -> list[torch.Tensor | None]:
        return list(chain.from_iterable(map(dict.values, self._tensors)))

    def _now(self) -> list[list[Any]]:
        """What is compared by value."""
        return [
            list(map(type, self._modules)),
            list(map(len, self._states)),
            list(map(len, self._hooks)),
            list(map(_TRAINING, self._states)),
            list(chain.from_iterable(map(dict.values, self._children))),
            list(map(_ADDRESS, self._owned)),
        ]

    def _seldom(self) -> list[Any]:
        """What nobody changes in the middle of a request: attributes, and what is in the buffers."""
        plain = [
            (name, value) for state in self._states for name, value in state.items() if type(value) in _PLAIN
        ]
        buffers = chain.from_iterable(state["_buffers"].values() for state in self._states)
        # inference tensors count no versions
        versions = [each._version for each in buffers if each is not None and not each.is_inference()]
        return [plain, versions]

    def holds(self) -> bool:
        """Whether nothing of this has changed since; attributes and buffers are not looked into."""
        held = self._held()
        if len(held) != len(self._tensors_then) or not all(map(is_, held, self._tensors_then)):
            return False
        return self._now() == self._then

    def holds_wholly(self) -> bool:
        """Whether nothing of this has changed since."""
        return self.holds() and self._seldom() == self._rest
