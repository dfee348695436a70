"""Watch: whether a model is still the one from which something was made."""

import weakref
from itertools import chain
from operator import is_, itemgetter, methodcaller
from typing import Any

import torch
from torch import nn

_TRAINING = itemgetter("training")
_ADDRESS = methodcaller("data_ptr")
# others may have no memory of their own
_WITH_ADDRESS = (torch.Tensor, nn.Parameter)
_PLAIN = (bool, int, float, str, type(None))


class Watch:
    """Remembers what a forward pass of a model depends on, but for the numbers in its parameters.

    These are classes, children, hooks, modes, attributes, and which tensors are the parameters and buffers. It is asked
    before every step, so it goes through lists that are made once.
    """

    def __init__(self, model: nn.Module) -> None:
        # the model holds what holds the watch: it would not be freed
        self._model = weakref.ref(model)
        modules = list(model.modules())
        self._parts = modules[1:]
        states = [vars(module) for module in modules]
        self._part_states = states[1:]
        self._hooks = [state[name] for state in states for name in ("_forward_hooks", "_forward_pre_hooks")]
        self._children = [state["_modules"] for state in states if state["_modules"]]
        self._tensors = [
            state[name] for state in states for name in ("_parameters", "_buffers") if state[name]
        ]
        self._owned: list[Any] = [
            each
            for each in self._held()
            if each is not None and type(each) in _WITH_ADDRESS and each.layout is torch.strided
        ]
        self._tensors_then = self._held()
        self._forwards = [(state, state["forward"]) for state in states[1:] if "forward" in state]
        self._then = self._now()
        self._rest = self._seldom()

    def _everything(self) -> tuple[list[nn.Module], list[dict[str, Any]]]:
        model = self._model()
        assert model is not None
        return [model, *self._parts], [vars(model), *self._part_states]

    def _held(self) -> list[torch.Tensor | None]:
        return list(chain.from_iterable(map(dict.values, self._tensors)))

    def _now(self) -> list[list[Any]]:
        """What is compared by value."""
        modules, states = self._everything()
        return [
            list(map(type, modules)),
            list(map(len, states)),
            [states[0].get("forward")],
            list(map(len, self._hooks)),
            list(map(_TRAINING, states)),
            list(chain.from_iterable(map(dict.values, self._children))),
            list(map(_ADDRESS, self._owned)),
        ]

    def _seldom(self) -> list[Any]:
        """What nobody changes in the middle of a request: attributes, layouts, and what is in the buffers."""
        _, states = self._everything()
        plain = [(name, value) for state in states for name, value in state.items() if type(value) in _PLAIN]
        layouts = [(each.dtype, each.shape, each.stride()) for each in self._owned]
        buffers = chain.from_iterable(state["_buffers"].values() for state in states)
        # inference tensors count no versions
        versions = [each._version for each in buffers if each is not None and not each.is_inference()]
        return [plain, layouts, versions]

    def holds(self) -> bool:
        """Whether nothing of this has changed since; attributes and buffers are not looked into."""
        if self._model() is None:  # of which a shallow copy has the watch
            return False
        held = self._held()
        if len(held) != len(self._tensors_then) or not all(map(is_, held, self._tensors_then)):
            return False
        return self._now() == self._then and all(state.get("forward") == own for state, own in self._forwards)

    def holds_wholly(self) -> bool:
        """Whether nothing of this has changed since."""
        return self.holds() and self._seldom() == self._rest
