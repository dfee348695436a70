"""Watch: whether a model is still the one from which something was made."""

import weakref
from collections.abc import Iterable, Sequence
from itertools import chain, cycle
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import nn

from hfopt.host import Config, adapter_parts, base_layer, is_adapted, registered_attention, rewritten
from hfopt.patches.facts import PLAIN, getter, is_same, own_names

_TRAINING = itemgetter("training")
_LAYOUT, _VERSION = (attrgetter("dtype"), attrgetter("shape"), torch.Tensor.stride), attrgetter("_version")
# others may have no memory of their own
_WITH_ADDRESS = (torch.Tensor, nn.Parameter)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TENSORS = ("_parameters", "_buffers")
_PARTS = 64

State = dict[str, Any]


class Watch:
    """Remembers what a forward pass of a model depends on, but for the numbers in its parameters.

    These are classes, children, hooks, modes, and which tensors are the parameters and buffers; and then their layouts, what
    is in the buffers, all other attributes, the fields of the configs, and the attention functions of these names. To look
    at all of that takes longer than a small model's kernels, most of it waiting for memory: between the steps of a big
    model nothing of it stays in the caches. So the first of it can be looked at in parts.
    """

    def __init__(self, model: nn.Module) -> None:
        # the model holds what holds the watch: it would not be freed
        self._model = weakref.ref(model)
        self._model_then = _look(model)
        modules = list(model.modules())[1:]
        # what adapters add is read in each request
        adapted = [_AdaptedLayer(each) for each in modules if is_adapted(each)]
        left_out = {id(part) for each in adapted for part in (each.layer, *adapter_parts(each.layer))}
        modules = [each for each in modules if id(each) not in left_out]
        moving = [_Moving(each, rewritten(each)) for each in modules if rewritten(each)]
        self._alone: list[_Moving | _AdaptedLayer] = [*moving, *adapted]
        modules = [each for each in modules if not rewritten(each)]
        size = max(-(-len(modules) // _PARTS), 1)
        self._parts = [_Part(modules[first : first + size]) for first in range(0, len(modules), size)]
        self._turns = cycle(self._parts)
        self._all = _Part(modules)
        own, self._states = vars(model), [vars(module) for module in modules]
        self._own_attributes = _Attributes(own, [own])
        self._attributes = _alike(self._states)
        values = [value for each, _ in self._attributes for value in each.then] + self._own_attributes.then
        self._contents = _Contents(values)
        others = [value for value in values if isinstance(value, torch.Tensor)]
        buffers = chain.from_iterable(state["_buffers"].values() for state in (own, *self._states))
        self._tensors, self._others = self._all.owned + _owned(_tensors([own])), _owned(others)
        # inference tensors count no versions
        written = (each for each in (*buffers, *others) if each is not None and not each.is_inference())
        self._written = list(written)
        self._then = self._now()

    def _now(self) -> list[list[Any]]:
        layouts = [list(map(of, self._tensors)) for of in _LAYOUT]
        return [*layouts, list(map(_VERSION, self._written)), list(map(torch.Tensor.data_ptr, self._others))]

    def holds_in_part(self) -> bool:
        """Whether nothing has changed in a part of the model, another one each time: 64 calls have seen all of it, but for
        what nobody changes in the middle of a request that runs no code of its user."""
        model = self._model()  # None for the watch of a shallow copy, whose original is gone
        if model is None or _look(model) != self._model_then:
            return False
        return next(self._turns).holds() and all(each.holds() for each in self._alone)

    def holds(self) -> bool:
        """Whether nothing of this has changed since."""
        model = self._model()
        return (
            model is not None
            and _look(model) == self._model_then
            and self._all.holds()
            and all(each.holds() for each in self._alone)
            and self._own_attributes.hold([vars(model)])
            and all(attributes.hold(states) for attributes, states in self._attributes)
            and self._contents.hold()
            and self._now() == self._then
        )


def _tensors(states: Iterable[State]) -> list[torch.Tensor | None]:
    return [each for state in states for name in _TENSORS for each in state[name].values()]


def _owned(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    """Those that have an address."""
    found = (each for each in tensors if each is not None and type(each) in _WITH_ADDRESS)
    return [each for each in found if each.layout is torch.strided]


def _look(module: nn.Module) -> list[Any]:
    """The same as a `_Part`, of one module that is not held."""
    state = vars(module)
    tensors = _tensors([state])
    return [
        type(module),
        len(state) - ("hfopt" in state),  # the report
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


class _Moving:
    """A module whose forward writes some of its own attributes, which are left out."""

    def __init__(self, module: nn.Module, rewritten: frozenset[str]) -> None:
        self._module, self._rewritten = module, rewritten
        self._then = self._now()

    def _now(self) -> list[Any]:
        state = vars(self._module)
        tensors = {name: each for name, each in state["_buffers"].items() if name not in self._rewritten}
        values = {
            name: each for name, each in state.items() if type(each) in PLAIN and name not in self._rewritten
        }
        return [
            type(self._module),
            state.get("forward"),
            [len(state[name]) for name in _HOOKS],
            {name: None if each is None else (id(each), each._version) for name, each in tensors.items()},
            [(name, type(each), each) for name, each in values.items()],
        ]

    def holds(self) -> bool:
        return self._now() == self._then


class _AdaptedLayer:
    """A layer that is adapters around another one."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._then = type(layer), base_layer(layer)

    def holds(self) -> bool:
        kind, base = self._then
        return type(self.layer) is kind and base_layer(self.layer) is base


class _Attributes:
    """The attributes, by the names in `state`, of modules that all have the same; but for what every module has."""

    def __init__(self, state: State, states: Sequence[State]) -> None:
        # what hfopt leaves on a model holds the watch
        names = [name for name in own_names(state) if not type(state[name]).__module__.startswith("hfopt.")]
        self._get = getter(names)
        self.then = self._now(states)

    def _now(self, states: Sequence[State]) -> list[Any]:
        return list(chain.from_iterable(map(self._get, states)))

    def hold(self, states: Sequence[State]) -> bool:
        try:
            now = self._now(states)
        except KeyError:
            return False
        if all(map(is_, now, self.then)):
            return True
        if not all(map(is_same, now, self.then)):
            return False
        self.then = now
        return True


def _alike(states: Iterable[State]) -> list[tuple[_Attributes, list[State]]]:
    groups: dict[tuple[str, ...], list[State]] = {}
    for state in states:
        groups.setdefault(tuple(own_names(state)), []).append(state)
    return [(_Attributes(each[0], each), each) for names, each in groups.items() if names]


class _Contents:
    """What is in lists, dictionaries, sets and configs, and in those inside them; and what attention the configs name."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._live: list[Any] = []
        self._configs: list[Any] = []
        waiting, seen = list(values), set()
        while waiting:
            value = waiting.pop()
            if id(value) in seen:
                continue
            if isinstance(value, Config):
                self._configs.append(value)
                waiting.append(vars(value))
            elif isinstance(value, list | dict | set):
                self._live.append(value)
                waiting += value.values() if isinstance(value, dict) else value
            elif isinstance(value, tuple):
                waiting += value
            seen.add(id(value))
        # each is compared for itself: what is inside stays the same object
        self._then = [_copied(each) for each in self._live]
        self._settings = self._set()

    def _set(self) -> list[Any]:
        # a flag and a number may be equal
        types = [list(map(type, vars(each).values())) for each in self._configs]
        return [*types, *map(registered_attention, self._configs)]

    def hold(self) -> bool:
        try:
            return bool(self._live == self._then) and self._set() == self._settings
        except Exception:  # noqa: BLE001  (of values that are not what they were, and cannot be compared)
            return False


def _copied(value: Any) -> Any:
    kind = next(kind for kind in (list, dict, set) if isinstance(value, kind))
    return kind(value)
