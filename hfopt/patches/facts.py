"""Facts: what the original `forward` of a module may read at each call, as it was when the module was recognised."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import is_, itemgetter
from types import FunctionType
from typing import Any

from torch import nn

from hfopt import host

PLAIN = (bool, int, float, str, type(None))
# attributes that any module may have and that its `forward` does not read in evaluation mode
INDICES = ("layer_idx", "layer_id")  # of an attention module, of its layer of the cache
HARMLESS = frozenset({"attention_dropout", "config", "gradient_checkpointing", "training", *INDICES})
_OF_EVERY_MODULE = frozenset(dir(nn.Module()))


class Facts:
    """Attributes of a module and fields of its config; `Facts()` are none, and hold for every module.

    Plain values are compared by value and type, all others by identity. Of the numbers that a replacement reads itself at
    each call (`live`) only the type has to stay.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        fields: Sequence[str] = (),
        live: Sequence[str] = (),
        then: tuple[Any, ...] = (),
    ) -> None:
        self._names, self._fields, self._live, self._then = names, fields, live, then
        self._get, self._get_fields, self._get_live = map(getter, (names, fields, live))

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return Facts, (self._names, self._fields, self._live, self._then)

    @classmethod
    def of(cls, module: nn.Module, live: Iterable[str] = ()) -> "Facts":
        """What a module of its own class may read. live: what its replacement reads too."""
        state, read = module.__dict__, names_read(module)
        names = [
            name
            for name in own_names(state)
            if name not in HARMLESS and name not in live and (not name.startswith("_") or name in read)
        ]
        config = state.get("config")
        renamed = getattr(config, "attribute_map", {})
        read |= helper_names_read(module)
        fields = {renamed.get(name, name) for name in read} & getattr(config, "__dict__", {}).keys()
        facts = cls(names, sorted(fields), [name for name in live if name in state])
        facts._then = facts._now(state)
        return facts

    def _now(self, state: dict[str, Any]) -> tuple[Any, ...]:
        now = self._get(state)
        if self._fields:
            # past the config's own way to its attributes, which takes longer than all the rest
            now += self._get_fields(object.__getattribute__(state["config"], "__dict__"))
        return (*now, *map(type, self._get_live(state))) if self._live else now

    def hold(self, module: nn.Module) -> bool:
        """Whether all of them are as they were."""
        try:
            now = self._now(module.__dict__)
        except (AttributeError, KeyError):
            return False
        if all(map(is_, now, self._then)):
            return True
        if not all(map(is_same, now, self._then)):
            return False
        self._then = now  # an unpickled module has equal numbers, which are other objects
        return True

    def change(self, module: nn.Module) -> str | None:
        """In words, one of them that is not as it was; None if all are."""
        state, then = module.__dict__, iter(self._then)
        settings = getattr(state.get("config"), "__dict__", {})
        for prefix, owner, names in (("", state, self._names), ("config.", settings, self._fields)):
            for name, value in zip(names, then, strict=False):
                if name not in owner:
                    return f"{prefix}{name} is gone"
                if not is_same(owner[name], value):
                    return f"{prefix}{name} is {_in_words(owner[name])} now, not {_in_words(value)}"
        for name, kind in zip(self._live, then, strict=True):
            if name not in state:
                return f"{name} is gone"
            if type(state[name]) is not kind:
                return f"{name} is a {type(state[name]).__name__} now, not a {kind.__name__}"
        return None


def getter(names: Sequence[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """What gives the values of these keys of a dictionary as a tuple, at once; raises KeyError."""
    if len(names) > 1:
        return itemgetter(*names)
    if not names:
        return lambda state: ()
    get = itemgetter(names[0])  # gives the value itself
    return lambda state: (get(state),)


def layer_index(module: nn.Module) -> int | None:
    """Which layer of the cache an attention module has; None if it tells none."""
    found = (module.__dict__.get(name) for name in INDICES)
    return next((each for each in found if isinstance(each, int)), None)


def own_names(state: Iterable[str]) -> Iterator[str]:
    """Of a module's attributes those that not every module has."""
    return (name for name in state if name not in _OF_EVERY_MODULE)


def is_same(one: Any, other: Any) -> bool:
    """Whether both are the same object, or the same plain value."""
    return one is other or (type(one) is type(other) and type(one) in PLAIN and bool(one == other))


def names_read(module: nn.Module) -> frozenset[str]:
    """Every name and string in the source of the original's `forward`, and of the methods that are named there, its bases'
    too: whatever it reads of itself or of a config is among them."""
    kind: Any = type(module)
    return class_names_read(getattr(kind, "_hfopt_original", kind))


def helper_names_read(module: nn.Module) -> frozenset[str]:
    """The same in the functions of its file that the original's `forward` calls, and in those that they call."""
    kind: Any = type(module)
    kind = getattr(kind, "_hfopt_original", kind)
    return _helper_names_read(kind, kind.forward)


@functools.cache
def _helper_names_read(kind: Any, forward: Any) -> frozenset[str]:
    files, function = [], forward
    while function is not None:
        files.append(getattr(function, "__globals__", {}))
        function = getattr(function, "__wrapped__", None)
    names, waiting = set[str](), set(_names_read(kind, forward))
    while waiting:
        helpers = {
            each
            for file in files
            for each in map(file.get, waiting)
            if isinstance(each, FunctionType) and each.__globals__ is file
        }
        waiting = {name for each in helpers for name in host.names_read(each)} - names
        names |= waiting
    return frozenset(names)


def class_names_read(kind: Any) -> frozenset[str]:
    """`names_read` for modules of a class that is not swapped."""
    return _names_read(kind, kind.forward)


@functools.cache
def _names_read(kind: Any, forward: Any) -> frozenset[str]:
    names, waiting = set[str](), ["forward"]
    while waiting:
        name = waiting.pop()
        found = (vars(base)[name] for base in kind.__mro__ if name in vars(base) and base is not nn.Module)
        methods = (each.fget if isinstance(each, property) else each for each in found)
        new = {read for each in methods if callable(each) for read in host.names_read(each)} - names
        names |= new
        waiting += new
    return frozenset(names)


def is_off(value: Any) -> bool:
    """Whether a setting says that something is not there."""
    return value is None or value is False


def _in_words(value: Any) -> str:
    return repr(value) if isinstance(value, PLAIN) else f"another {type(value).__name__}"
