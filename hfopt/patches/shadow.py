"""Shadows of a model: its tensors and attributes in modules of their own, to be tried while other threads use the model."""

from dataclasses import replace
from typing import Any

from torch import nn

from hfopt import host
from hfopt.modules.guards import has_own_forward
from hfopt.modules.quantized import QuantizedLinear
from hfopt.modules.weights import original_class
from hfopt.patches.facts import Facts, layer_index
from hfopt.patches.replacement import Record, Replacement

_ENOUGH = 3  # layers, of which the others of their kind differ in numbers alone
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_TABLES = (*_HOOKS, "_parameters", "_buffers")  # which a forward may add to


def shadow(
    model: nn.Module, *, is_original: bool = False, is_short: bool = False, is_exact: bool = False
) -> Any:
    """A model with the same tensors, in evaluation mode and without hooks at its root, which has read no text yet.

    is_original: its modules are of their original classes; otherwise all of them take hfopt's kernels. is_short: it has no
    more than the first three of its layers, or as many as it takes to have one of each kind. is_exact: quantised ones
    round no inputs, which would hide differences in their noise.
    """
    twin = _twin(model, is_original, _depths(model) if is_short else None, {})
    if is_exact:
        for module in twin.modules():
            if isinstance(module, QuantizedLinear):
                vars(module)["format"] = replace(module.format, compute="float")
                if isinstance(module, Replacement):
                    module._hfopt.facts = Facts.of(module, type(module).live)
    for module in twin.modules():
        host.begin_anew(module)
    vars(twin).update(training=False, **{name: type(vars(model)[name])() for name in _HOOKS})
    return twin


def _depths(model: Any) -> tuple[int, int] | None:
    """How many layers a model has, and how many of them will do; None if that is not known."""
    config = getattr(model, "config", None)
    depth = (
        None if config is None else getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    )
    if not isinstance(depth, int):
        return None
    kinds = host.layer_kinds(config)[:depth]
    return depth, max([_ENOUGH, *(kinds.index(kind) + 1 for kind in kinds)])


def _twin(module: nn.Module, is_original: bool, depths: tuple[int, int] | None, known: dict[int, Any]) -> Any:
    if id(module) in known:
        return known[id(module)]
    kind: Any = original_class(module) if is_original else type(module)
    twin = known[id(module)] = kind.__new__(kind)
    state, children = dict(vars(module)), list(module._modules.items())
    state.update((name, state[name].copy()) for name in _TABLES)
    if (
        depths is not None
        and isinstance(module, nn.ModuleList)
        and len(children) == depths[0]
        and _are_layers(module)
    ):
        children = children[: depths[1]]
    state["_modules"] = {
        name: child if child is None else _twin(child, is_original, depths, known) for name, child in children
    }
    if "forward" in state and not has_own_forward(module):
        del state["forward"]  # accelerate leaves behind what is bound to the model's own module
    if is_original:
        state.pop("_hfopt", None)
    elif isinstance(module, Replacement):
        record = module._hfopt
        state["_hfopt"] = Record(record.spec, record.proof, "hfopt", record.form, record.facts)
    vars(twin).update(state)
    return twin


def _are_layers(modules: nn.ModuleList) -> bool:
    """Whether they store keys and values, which experts do not."""
    return all(any(layer_index(part) is not None for part in each.modules()) for each in modules)
