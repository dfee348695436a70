"""Patterns: frozen records of how one kind of module is recognised, what replaces it, how that is proven."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from hfopt.patches.facts import HARMLESS
from hfopt.patches.guards import DTYPES, is_bare
from hfopt.patches.replacement import Replacement, original_class


class Spec(Protocol):
    """What was recognised in one module: a frozen, hashable, picklable dataclass of numbers and names."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Children whose weights the replacement reads itself ('' for the module's own)."""


@dataclass(frozen=True)
class Pattern:
    """One kind of module.

    recognise(module) tells by structure alone: the module's Spec, None if it is something else, or in words
    what keeps a module that resembles the kind from being one. trial(call, spec, scene) calls the module (or
    its replacement) on the inputs of a probe.Scene and returns what is to be compared. scale(module, spec, dtype)
    is the size of those inputs.
    """

    name: str
    kind: str
    replacement: type[Replacement]
    recognise: Callable[[Any], Spec | str | None]
    trial: Callable[[Callable[..., Any], Any, Any], list[torch.Tensor]]
    scale: Callable[[Any, Any, torch.dtype], float] = lambda module, spec, dtype: 1.0


def attributes(module: nn.Module) -> set[str]:
    """Names of public instance attributes (no children, parameters or buffers) that may mean something."""
    return {name for name in vars(module) if not name.startswith("_")} - HARMLESS


def has_children(module: nn.Module, required: Iterable[str], optional: Iterable[str] = ()) -> bool:
    """Whether the module's children are these, and none else."""
    names = {name for name, child in module._modules.items() if child is not None}
    return set(required) <= names <= {*required, *optional}


def owns_nothing(module: nn.Module) -> bool:
    """Whether the module has no parameter or buffer of its own."""
    return not any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values()))


def unknown_parts(module: nn.Module, function: Callable[..., Any], known: Iterable[str]) -> str | None:
    """In words, what attributes or arguments `function` does not know, which is to stand for `forward`."""
    unknown = attributes(module) - set(known)
    if unknown:
        return f"unknown attributes {', '.join(sorted(unknown))}"
    theirs = _arguments(original_class(module).forward)
    # what only ours has can be given by name alone
    ours = [name for name, kind in _arguments(function).items() if kind is not inspect.Parameter.KEYWORD_ONLY]
    further = set(theirs) - set(ours)
    # transformers 4 hands cache_position down, behind all others and by name; nothing in ours depends on it
    fits = list(theirs)[: len(ours)] == ours and further <= {"cache_position"}
    return None if fits else f"its forward takes other arguments ({', '.join(theirs)})"


def _arguments(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {each.name: each.kind for each in parameters if each.kind is not each.VAR_KEYWORD}


def takes_one_input(module: nn.Module) -> bool:
    """Whether `forward` has exactly one argument."""
    return len(_arguments(original_class(module).forward)) == 1


def obstacle(module: nn.Module, spec: Spec) -> str | None:
    """In words, why kernels cannot read the weights that `spec` needs; None if they can."""
    if "_hf_hook" in module.__dict__ or "forward" in module.__dict__:
        return "its forward is wrapped (accelerate, tensor parallelism)"
    tensors: list[torch.Tensor] = []
    for name in spec.reads:
        child = module.get_submodule(name)
        if name and not _is_bare_apart_from_training(child):
            return f"{name} has hooks or a forward of its own"
        tensors += [tensor for tensor in child._parameters.values() if tensor is not None]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        return f"its weights have several dtypes ({', '.join(sorted(map(_short, dtypes)))})"
    if dtypes and not dtypes <= set(DTYPES):
        return f"dtype {_short(dtypes.pop())} is not supported (float32, bfloat16)"
    if any(type(tensor) is not nn.Parameter for tensor in tensors):
        return "its weights are tensor subclasses"
    if any(not tensor.is_cpu for tensor in tensors):
        return "its weights are not in CPU memory"
    if any(not tensor.is_contiguous() for tensor in tensors):
        return "its weights are not contiguous"
    return None


def _is_bare_apart_from_training(module: nn.Module) -> bool:
    training = module.training
    module.__dict__["training"] = False
    try:
        return is_bare(module)
    finally:
        module.__dict__["training"] = training


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
