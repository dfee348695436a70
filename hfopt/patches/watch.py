"""Watch: whether a model is still the one from which something was made."""

import weakref
from collections.abc import Callable
from itertools import chain, cycle
from operator import is_, itemgetter
from typing import Any

import torch
from torch import nn

_TRAINING = itemgetter("training")
# others may have no memory of their own
_WITH_ADDRESS = (torch.Tensor, nn.Parameter)
_PLAIN = (bool, int, float, str, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TENSORS = ("_parameters", "_buffers")
_PARTS = 64


class Watch:
    """Remembers what a forward pass of a model depends on, but for the numbers in its parameters.

    These are classes, children, hooks, modes, attributes, and which tensors are the parameters and buffers. To look at all
    of that takes longer than a small model's kernels, most of it waiting for memory: between the steps of a big model
    nothing of it stays in the caches. So it can be looked at in parts.
    """

    def __init__(self, model: nn.Module) -> None:
        # the model holds what holds the watch: it would not be freed
        self._model = weakref.ref(model)
        self._model_then = _look(model)
        modules = list(model.modules())[1:]
        self._states = [vars(module) for module in modules]
        size = max(-(-len(modules) // _PARTS), 1)
        self._parts = [_Part(modules[first : first + size]) for first in range(0, len(modules), size)]
        self._turns = cycle(self._parts)
        self._plain = [_plain_of(state) for state in (vars(model), *self._states)]
        self._rest = self._seldom(model)

    def _seldom(self, model: nn.Module) -> list[Any]:
        """What nobody changes in the middle of a request: attributes, layouts, and what is in the buffers."""
        states = [vars(model), *self._states]
        plain = list(chain.from_iterable(of(state) for of, state in zip(self._plain, states, strict=True)))
        owned = chain(_owned(_tensors([vars(model)])), *(part.owned for part in self._parts))
        layouts = [(each.dtype, each.shape, each.stride()) for each in owned]
        buffers = chain.from_iterable(state["_buffers"].values() for state in states)
        # inference tensors count no versions
        versions = [each._version for each in buffers if each is not None and not each.is_inference()]
        # values of other types may not even be comparable
        return [list(map(type, plain)), plain, layouts, versions]

    def _holds_itself(self) -> bool:
        model = self._model()  # None for the watch of a shallow copy, whose original is gone
        return model is not None and _look(model) == self._model_then

    def holds_in_part(self) -> bool:
        """Whether nothing has changed in a part of the model, another one each time: 64 calls have seen all of it."""
        return self._holds_itself() and next(self._turns).holds()

    def holds(self) -> bool:
        """Whether nothing has changed since; attributes and buffers are not looked into."""
        return self._holds_itself() and all(part.holds() for part in self._parts)

    def holds_wholly(self) -> bool:
        """Whether nothing of this has changed since."""
        model = self._model()
        if model is None or not self.holds():
            return False
        try:
            return self._seldom(model) == self._rest
        except KeyError:  # of an attribute that is no longer there
            return False


def _plain_of(state: dict[str, Any]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """What gives the values of the attributes that are numbers, strings and the like, at once."""
    names = (name for name, value in state.items() if type(value) in _PLAIN)
    return itemgetter("training", "training", *names)  # of one name alone it would give no tuple


def _tensors(states: list[dict[str, Any]]) -> list[torch.Tensor | None]:
    return [each for state in states for name in _TENSORS for each in state[name].values()]


def _owned(tensors: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """Those that have an address."""
    found = (each for each in tensors if each is not None and type(each) in _WITH_ADDRESS)
    return [each for each in found if each.layout is torch.strided]


def _look(module: nn.Module) -> list[Any]:
    """The same as a `_Part`, of one module that is not held."""
    state = vars(module)
    tensors = _tensors([state])
    return [
        type(module),
        len(state),
        state.get("forward"),
        state["training"],
        [len(state[name]) for name in _HOOKS],
        dict(state["_modules"]),
        [id(each) for each in tensors],
        [each.data_ptr() for each in _owned(tensors)],
    ]


class _Part:
    """Some modules. The lists that are compared are made once, and each comparison is one loop in C."""

    def __init__(self, modules: list[nn.Module]) -> None:
        states = [vars(module) for module in modules]
        hooks = [state[name] for state in states for name in _HOOKS]
        self._modules, self._states = modules, states
        self._unhooked = [each for each in hooks if not each]
        self._hooked = [each for each in hooks if each]
        self._children = [state["_modules"] for state in states if state["_modules"]]
        self._children_then = [dict(each) for each in self._children]
        self._tensors = [state[name] for state in states for name in _TENSORS if state[name]]
        self._tensors_then = self._held()
        self.owned = _owned(self._tensors_then)
        self._forwards = [(state, state["forward"]) for state in states if "forward" in state]
        self._then = self._now()

    def _held(self) -> list[torch.Tensor | None]:
        return list(chain.from_iterable(map(dict.values, self._tensors)))

    def _now(self) -> list[list[Any]]:
        return [
            list(map(type, self._modules)),
            list(map(len, self._states)),
            list(map(len, self._hooked)),
            list(map(_TRAINING, self._states)),
            list(map(torch.Tensor.data_ptr, self.owned)),
        ]

    def holds(self) -> bool:
        if any(self._unhooked) or self._children != self._children_then:
            return False
        held = self._held()
        # equal tensors are not enough
        if len(held) != len(self._tensors_then) or not all(map(is_, held, self._tensors_then)):
            return False
        return self._now() == self._then and all(state.get("forward") == own for state, own in self._forwards)
