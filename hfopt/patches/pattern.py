"""Patterns: frozen records of how one kind of module is recognised, what replaces it, how that is proven."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from hfopt.host import Arguments, Conv1D, base_layer
from hfopt.modules.guards import DO_NOTHING, is_bare
from hfopt.modules.weights import original_class
from hfopt.patches.facts import HARMLESS, helper_names_read, is_off, names_read
from hfopt.patches.replacement import Replacement
from hfopt.words import DTYPES, dtype_name

_OF_DROPOUT = ("dropout", "pdrop")  # in names of probabilities, which mean nothing in evaluation mode
# what transformers' attention functions, which are in files of their own, read of the module that they are called for
READ_BY_ATTENTION = frozenset({"is_causal", "num_key_value_groups", "sliding_window"})


class Spec(Protocol):
    """What was recognised in one module: a frozen, hashable, picklable dataclass of numbers and names."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Children whose weights the replacement reads itself ('' for the module's own)."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Children that it calls."""


@dataclass(frozen=True)
class Pattern:
    """One kind of module.

    recognise(module) tells by structure alone: the module's Spec, or several that the proof chooses from; None if it is
    something else, or in words what keeps a module that resembles the kind from being one. trial(call, spec, scene) calls
    the module (or its replacement), with arguments by role, on the inputs of a scene.Scene and returns what is compared.
    scale(module, spec, dtype) is the size of those inputs.
    """

    name: str
    kind: str
    replacement: type[Replacement]
    recognise: Callable[[Any], Spec | list[Any] | str | None]
    trial: Callable[[Callable[..., Any], Any, Any], list[torch.Tensor]]
    scale: Callable[[Any, Any, torch.dtype], float] = lambda module, spec, dtype: 1.0


def attributes(module: nn.Module) -> set[str]:
    """Names of public instance attributes (no children, parameters or buffers) that may mean something."""
    names = {name for name in vars(module) if not name.startswith("_")} - HARMLESS
    return {name for name in names if not any(part in name for part in _OF_DROPOUT)}


def has_children(module: nn.Module, required: Collection[str]) -> bool:
    """Whether the module's children are these, and none else but such that do nothing."""
    names = {name for name, child in module._modules.items() if child is not None}
    others = (module._modules[name] for name in names.difference(required))
    return names.issuperset(required) and all(type(child) in DO_NOTHING for child in others)


def owned(module: nn.Module) -> set[str]:
    """Names of parameters and buffers of its own."""
    tensors = (*module._parameters.items(), *module._buffers.items())
    return {name for name, tensor in tensors if tensor is not None}


def unknown_parts(
    module: nn.Module, replacement: type[Replacement], known: Iterable[str], *, needs: Iterable[str] = ()
) -> str | None:
    """In words, what attributes that its `forward` reads, or arguments of that, the replacement does not know.

    needs: roles that there has to be an argument for.
    """
    read = names_read(module) | helper_names_read(module) | READ_BY_ATTENTION
    # what is None or off says that something is not there
    there = {name for name in attributes(module) & read if not is_off(getattr(module, name))}
    unknown = there - set(known)
    if unknown:
        return f"unknown attributes {', '.join(sorted(unknown))}"
    arguments = Arguments.of(original_class(module).forward, replacement.takes)
    if arguments.needed:
        return f"its forward needs arguments of unknown role ({', '.join(arguments.needed)})"
    missing = set(needs) - arguments.names.keys()
    if missing:
        names = ", ".join(arguments.order)
        return f"its forward has no argument that is known as its {', '.join(sorted(missing))} ({names})"
    return None


def takes_only(module: nn.Module, roles: frozenset[str] = Replacement.takes) -> bool:
    """Whether `forward` has no arguments but of these roles."""
    arguments = Arguments.of(original_class(module).forward, roles)
    return len(arguments.order) == len(arguments.names) and not arguments.unknown


def obstacle(module: nn.Module, spec: Spec) -> str | None:
    """In words, why kernels cannot read the weights that `spec` needs; None if they can."""
    if "_hf_hook" in module.__dict__ or "forward" in module.__dict__:
        return "its forward is wrapped (accelerate, tensor parallelism)"
    tensors: list[torch.Tensor] = []
    is_laid_out = True
    for name in spec.reads:
        child = base_layer(module.get_submodule(name))
        if name and not _is_bare_apart_from_training(child):
            return f"{name} has hooks or a forward of its own"
        own = [tensor for tensor in child._parameters.values() if tensor is not None]
        is_laid_out &= isinstance(child, Conv1D) or all(tensor.is_contiguous() for tensor in own)
        tensors += own
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        return f"its weights have several dtypes ({', '.join(sorted(map(dtype_name, dtypes)))})"
    if dtypes and not dtypes <= set(DTYPES):
        return f"dtype {dtype_name(dtypes.pop())} is not supported ({', '.join(map(dtype_name, DTYPES))})"
    if any(type(tensor) is not nn.Parameter for tensor in tensors):
        return "its weights are tensor subclasses"
    if any(not tensor.is_cpu for tensor in tensors):
        return "its weights are not in CPU memory"
    if not is_laid_out:
        return "its weights are not contiguous"
    return None


def _is_bare_apart_from_training(module: nn.Module) -> bool:
    training = module.training
    module.__dict__["training"] = False
    try:
        return is_bare(module)
    finally:
        module.__dict__["training"] = training
