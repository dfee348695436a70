"""Recognition by role: what the arguments of a module's `forward` are for, under whatever name and in whatever order."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hfopt.host.cache_names import CACHE_NAMES, cache_argument

# role -> names that releases of transformers have for it. Roles are the names of our own arguments.
_NAMES = {
    "attention_mask": ("attention_mask",),
    "position_ids": ("position_ids",),
    "position_embeddings": ("position_embeddings",),
    "cache": CACHE_NAMES,
    "use_cache": ("use_cache",),
    "position_bias": ("alibi", "position_bias"),
    "shared": ("shared_kv_states",),  # by kind of layer, for layers that read the keys and values of another
    "layer_input": ("per_layer_input",),
    "residual": ("residual",),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
ROLES = frozenset({"hidden_states", *_NAMES})

# Arguments that models hand down to every module and that change nothing in what a module computes.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    }
)
# Those that change nothing with this value.
_NEUTRAL: Mapping[str, Any] = {"is_causal": True, "output_attentions": False}
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Arguments:
    """The arguments of a `forward`. The first is what a module transforms, its `hidden_states`.

    takes: the roles that count; arguments of the others are as unknown as those of none. order: names of those that may be
    given by position. names: role -> name. unknown: those of no known role, with the value that leaves them without
    effect. needed: those of them that have to be given.
    """

    takes: frozenset[str]
    order: tuple[str, ...]
    names: Mapping[str, str]
    unknown: Mapping[str, Any]
    needed: tuple[str, ...]

    @functools.cached_property
    def _roles(self) -> dict[str, str]:
        # an old name that the host still takes has its role too
        roles = {**_ROLES, **{name: role for role, name in self.names.items()}}
        return {name: role for name, role in roles.items() if role in self.takes and name not in self.unknown}

    @staticmethod
    @functools.cache
    def of(forward: Callable[..., Any], takes: frozenset[str] = ROLES) -> "Arguments":
        """Read the arguments of an unbound `forward`."""
        return _arguments_of(forward, takes)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The values of a call by role; None if an argument of no known role may have an effect."""
        if len(args) > len(self.order):
            return None
        roles = self._roles
        given: dict[str, Any] = {}
        for name, value in (
            (*zip(self.order, args, strict=False), *kwargs.items()) if args else kwargs.items()
        ):
            role = roles.get(name)
            if role is not None:
                if given.get(role) is None:
                    given[role] = value
                elif value is not None:  # under two names
                    return None
            elif value is None or name in _WITHOUT_EFFECT:
                continue
            elif value is not self.unknown.get(name, _NEUTRAL.get(name)):
                return None
        return given

    def named(self, **values: Any) -> dict[str, Any]:
        """Keyword arguments for `forward` from values by role; roles that it has no argument for are left out."""
        return {self.names[role]: value for role, value in values.items() if role in self.names}


def takes_positions(forward: Callable[..., Any]) -> bool:
    """Whether a model with this unbound `forward` is told the positions of tokens; others take their columns."""
    return "position_ids" in Arguments.of(forward).names


def _arguments_of(forward: Callable[..., Any], takes: frozenset[str]) -> Arguments:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    declared = [each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    cache = cache_argument(forward)
    names: dict[str, str] = {}
    unknown: dict[str, Any] = {}
    needed = []
    for index, each in enumerate(declared):
        role = _ROLES.get(each.name)
        if role == "cache" or each.name == cache:
            role = "cache" if each.name == cache else None
        if index == 0 and role is None:
            role = "hidden_states"
        if role in takes:
            names[role] = each.name
        elif each.name not in _WITHOUT_EFFECT and each.name not in _NEUTRAL:
            unknown[each.name] = None if each.default is each.empty else each.default
            if each.default is each.empty:
                needed.append(each.name)
    order = tuple(each.name for each in declared if each.kind is not each.KEYWORD_ONLY)
    return Arguments(takes, order, MappingProxyType(names), MappingProxyType(unknown), tuple(needed))
