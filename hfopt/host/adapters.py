"""LoRA layers of peft, the linear ones: what they are called, and what they hold.

peft is no dependency: nothing of it is imported. A layer is told by its class, and that this class computes what hfopt takes
it for by a small one of it. Whatever is not as it was known is left to the layer's own `forward`.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sized
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

NO_ADAPTER = "__base__"  # among the names of rows

_PACKAGE, _CLASS = "peft.", ("peft.tuners.lora.layer", "Linear")
_BASE, _A, _B, _DROPOUT = "base_layer", "lora_A", "lora_B", "lora_dropout"
_HOOK, _NAMES = "_adapter_names_pre_forward_hook", "adapter_names"
_DISABLED, _MERGED, _ACTIVE = "_disable_adapters", "merged_adapters", "_active_adapter"
_SCALING, _VARIANT, _DORA, _CASTS = "scaling", "lora_variant", "use_dora", "cast_input_dtype_enabled"
_KNOWN = {
    _DISABLED, _MERGED, _ACTIVE, _SCALING, _VARIANT, _DORA, _CASTS, _BASE, _A, _B, _DROPOUT, *vars(nn.Module()),
    "_caches", "adapter_layer_names", "ephemeral_gpu_offload", "fan_in_fan_out", "in_features", "is_target_conv_1d_layer",
    "kwargs", "lora_alpha", "lora_bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "out_features",
    "r", "use_rslora",
}  # fmt: skip
_TOLERANCE = 1e-5

Names: TypeAlias = tuple[str, ...]


class AdapterState(NamedTuple):
    """What a layer adds now, as its `forward` would.

    rows: the adapter of each row of the call, or None: `active` in all rows. Names that the layer has not add nothing.
    """

    rows: Names | None
    active: Names


class Adapter(NamedTuple):
    """One of a model's: the ranks of its matrices, and whether it is added where rows have none of their own."""

    name: str
    ranks: tuple[int, ...]
    is_active: bool

    def __str__(self) -> str:
        least, most = min(self.ranks), max(self.ranks)
        rank = f"rank {least}" if least == most else f"ranks {least} to {most}"
        return f"{self.name} ({rank}{', active' if self.is_active else ''})"


class AdapterModules(NamedTuple):
    """scaling B(A(dropout(x))), as modules."""

    a: Any
    b: Any
    dropout: Any
    scaling: Any


def is_adapted(module: Any) -> bool:
    """Whether this is a linear layer with LoRA adapters around another one, and nothing else."""
    kind = type(module)
    if (kind.__module__, kind.__qualname__) != _CLASS or _BASE not in module._modules:
        return False
    state, children = vars(module), module._modules
    own = kind, kind.forward, *state, *children
    if own not in _unknown:
        unknown = tuple(name for name in (*state, *children) if name not in _KNOWN)
        _unknown[own] = unknown if _adds_products(module) else None
    names = _unknown[own]
    # what is empty says that something is not there
    return names is not None and not any(_is_there(state.get(each, children.get(each))) for each in names)


_unknown: dict[
    tuple[Any, ...], Names | None
] = {}  # attributes of layers of a class; None if that computes something else


def _is_there(value: Any) -> bool:
    return len(value) > 0 if isinstance(value, Sized) else value is not None and value is not False


def _adds_products(module: Any) -> bool:
    """Whether a small layer of this class, of the same attributes, computes what hfopt takes it for."""
    generator = torch.Generator().manual_seed(1)

    def linear(n_inputs: int, n_outputs: int) -> nn.Linear:
        made = nn.utils.skip_init(nn.Linear, n_inputs, n_outputs, bias=False)
        nn.init.normal_(made.weight, generator=generator)
        return made

    def each_of(make: Callable[[], nn.Module]) -> nn.ModuleDict:
        return nn.ModuleDict({name: make() for name in ("one", "two")})

    kind: Any = type(module)
    try:
        twin = kind.__new__(kind)
        vars(twin).update(vars(module))
        made: dict[str, Any] = {
            _BASE: linear(5, 3),
            _A: each_of(lambda: linear(5, 2)),
            _B: each_of(lambda: linear(2, 3)),
        }
        made[_DROPOUT] = each_of(nn.Identity)
        others = {name: type(child)() for name, child in module._modules.items() if name not in made}
        vars(twin).update(_modules={**others, **made}, training=False)
        vars(twin).update({_SCALING: {"one": 0.5, "two": 3.0}, _VARIANT: {}, _DORA: {}, _CASTS: True})
        x = torch.randn(4, 2, 5, generator=generator)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            base = made[_BASE](x)
            one, two = (
                made[_B][name](made[_A][name](x)) * factor for name, factor in twin.__dict__[_SCALING].items()
            )
            for given, expected in _cases(base, one, two):
                vars(twin).update({_DISABLED: False, _MERGED: [], _ACTIVE: ["one", "two"], **given})
                rows = given.get(_NAMES)
                found = kind.forward(twin, x, **({} if rows is None else {_NAMES: rows}))
                if not torch.allclose(found, expected, atol=_TOLERANCE):
                    return False
    except Exception:  # noqa: BLE001  (whatever a foreign class raises)
        return False
    return True


def _cases(
    base: torch.Tensor, one: torch.Tensor, two: torch.Tensor
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Attributes of the layer, or names of the rows, and what it gives then."""
    yield {}, base + one + two
    yield {_ACTIVE: "two"}, base + two
    yield {_ACTIVE: ["another"]}, base
    yield {_DISABLED: True}, base
    yield {_MERGED: ["one"]}, base
    mixed = base.clone()
    mixed[0] += one[0]
    mixed[3] += two[3]
    yield {_NAMES: ["one", NO_ADAPTER, "another", "two"]}, mixed


def base_layer(module: Any) -> Any:
    """The layer that adapters are around; the module itself if that is none."""
    return module._modules[_BASE] if is_adapted(module) else module


def adapter_parts(module: Any) -> Iterator[nn.Module]:
    """All modules in an adapted layer but its base."""
    for name, child in module._modules.items():
        if name != _BASE and child is not None:
            yield from child.modules()


def adapter_names(module: Any) -> Names:
    """Of an adapted layer, in its order."""
    return tuple(module._modules[_A]._modules)


def adapters_in(model: Any) -> tuple[Adapter, ...]:
    """Those of all adapted layers of a model."""
    ranks: dict[str, set[int]] = {}
    active: set[str] = set()
    for layer in filter(is_adapted, model.modules()):
        for name, a in layer._modules[_A]._modules.items():
            ranks.setdefault(name, set()).add(a.out_features)
        state = layer.__dict__
        if not state[_DISABLED] and not state[_MERGED]:
            names = state[_ACTIVE]
            active |= {names} if isinstance(names, str) else set(names)
    return tuple(Adapter(name, tuple(sorted(each)), name in active) for name, each in ranks.items())


def named_rows(module: Any) -> Names | None:
    """The adapter of each row of the request that runs now, which peft hands to each layer by a hook; None without one.

    Raises ValueError for other hooks.
    """
    state, names = module.__dict__, None
    for key, hook in state["_forward_pre_hooks"].items():
        if not _names_rows(hook) or key not in state["_forward_pre_hooks_with_kwargs"]:
            raise ValueError("it has hooks")
        names = tuple(hook.keywords[_NAMES])  # the last one counts
    return names


def _names_rows(hook: Any) -> bool:
    is_theirs = isinstance(hook, functools.partial) and str(hook.func.__module__).startswith(_PACKAGE)
    return is_theirs and hook.func.__name__ == _HOOK and not hook.args and hook.keywords.keys() == {_NAMES}


def have_own_adapters(model: Any) -> bool:
    """Whether the rows of the request that runs now have adapters of their own."""
    return any(_names_rows(hook) for each in model.modules() for hook in each._forward_pre_hooks.values())


def adapter_state(module: Any) -> AdapterState:
    """What an adapted layer adds now. Raises ValueError, in words, where its own `forward` would do more."""
    state, rows = module.__dict__, named_rows(module)
    merged = bool(state[_MERGED])
    if state[_DISABLED]:
        if merged:
            raise ValueError("its adapters are merged and switched off, which its next call undoes")
        return AdapterState(None, ())
    if rows is not None and merged:
        raise ValueError("its adapters are merged, and rows are to have others")
    if merged:
        return AdapterState(None, ())
    active = state[_ACTIVE]
    return AdapterState(rows, (active,) if isinstance(active, str) else tuple(active))


def adapter_modules(module: Any, name: str) -> AdapterModules | None:
    """Those of an adapter of this name; None if the layer has none. Raises ValueError for one of another kind."""
    state, children = module.__dict__, module._modules
    if name not in children[_A]._modules:
        return None
    variant = state[_VARIANT].get(name)
    if variant is not None or state[_DORA].get(name):
        kind = "DoRA" if variant is None else type(variant).__name__
        raise ValueError(f"adapter {name!r} is a {kind}")
    return AdapterModules(
        children[_A]._modules[name],
        children[_B]._modules[name],
        children[_DROPOUT]._modules[name],
        state[_SCALING][name],
    )


def casts_inputs(module: Any) -> bool:
    """Whether inputs are brought into the dtype of the adapters."""
    return module.__dict__.get(_CASTS, True) is True


def switch_on(module: Any, names: Names) -> None:
    """Let a layer that nobody else uses add all of these, in every row."""
    module.__dict__.update({_DISABLED: False, _MERGED: [], _ACTIVE: list(names)})
    module.__dict__["_forward_pre_hooks"] = OrderedDict()
