"""The change of class: a module stays the same object with all it holds, and gets a subclass of its class."""

import contextlib
import inspect
import sys
from collections.abc import Mapping
from types import MethodType
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn

from hfopt.functional import Kernels
from hfopt.host import Arguments
from hfopt.modules.guards import DO_NOTHING, is_bare, is_plain_inference
from hfopt.modules.records import Records
from hfopt.modules.weights import original_class
from hfopt.patches.facts import Facts
from hfopt.streaming import turn_of

# of an output: None for a tensor, else the length of a tuple that begins with it, and where the rest is None
Form: TypeAlias = int | None

_CLASSES: dict[Any, Any] = {}
_AT_ONCE = contextlib.nullcontext()


class Record(Records):
    """What a swapped module carries: what was recognised, the proof's figure, whose kernels it takes where
    torch has one too, what form its output has (see `Form`), the facts that the proof is about, what follows from
    its weights.

    Only the first five are pickled or copied; the rest follows from the module itself.
    """

    __slots__ = ("activation", "facts", "form", "kernels", "proof", "spec", "table")

    def __init__(
        self,
        spec: Any,
        proof: float | None = None,
        kernels: Kernels = "hfopt",
        form: Form = None,
        facts: Facts | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.proof = proof
        self.kernels = kernels
        self.form = form
        self.facts = facts or Facts()
        self.activation: tuple[nn.Module, Facts, str | None] | None = None
        self.table: tuple[torch.Tensor, tuple[int, int], int | None] | None = None

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return Record, (self.spec, self.proof, self.kernels, self.form, self.facts)


class Replacement(nn.Module):
    """What every replacement class is: `compute` where our kernels can do the call, else the original.

    takes: the roles of the arguments that `compute` takes; see `host.Arguments`. live: numbers among the attributes that it
    reads at each call.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"hidden_states"})
    _hfopt: Record
    _hfopt_original: type[nn.Module]
    live: ClassVar[tuple[str, ...]] = ()
    _hfopt_arguments: Arguments

    def run(self, ops: Any, x: Any) -> Any:
        """What the original's `forward` computes, in verbs (see `ops.Ops`) on a tensor or the place of one."""
        raise NotImplementedError

    def compute(self, hidden_states: Any, **roles: Any) -> torch.Tensor | None:
        """What the original's `forward` computes, by our kernels; None, nothing touched, if they cannot do this call."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with turn_of(self) or _AT_ONCE:
            if (
                not torch.compiler.is_compiling()
                and is_swapped(self)
                and is_plain_inference(self, args, kwargs)
            ):
                given = self._hfopt_arguments.read(args, kwargs) if self._hfopt.facts.hold(self) else None
                output = None if given is None else self.compute(**given)
                if output is not None:
                    form = self._hfopt.form
                    return output if form is None else (output, *[None] * (form - 1))
            return super().forward(*args, **kwargs)

    def idle_reason(self) -> str | None:
        """In words, why kernels cannot do any call of this module as it is now; None if they can."""
        return self._hfopt.facts.change(self) or _bypass_obstacle(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A fresh process does not know classes made at run time: pickle what they are made from.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        kind = next(base for base in type(self).__mro__ if "_hfopt_original" in base.__dict__)
        return _rebuild, (kind.__bases__[0], kind.__bases__[1]), *reduced[2:]


def _rebuild(replacement: type[Replacement], original: type[nn.Module]) -> nn.Module:
    kind = replacement_class(replacement, original)
    return kind.__new__(kind)


def replacement_class(replacement: type[Replacement], original: type[nn.Module]) -> type[Replacement]:
    """The subclass of both that instances of `original` are swapped to.

    It keeps the original's name, which device maps and sharding policies look for; `hfopt.explain` tells the
    two apart.
    """
    known = _CLASSES.get((replacement, original))
    if known is not None:
        return known
    parents = f"{original.__module__}.{original.__qualname__}".replace(".", "_")
    qualname = f"{replacement.__name__}_{parents}"
    content: Mapping[str, Any] = {
        "__module__": replacement.__module__,
        "__qualname__": qualname,
        "__doc__": original.__doc__,
        "_hfopt_original": original,
        "_hfopt_arguments": Arguments.of(original.forward, replacement.takes),
    }
    kind = type(original.__name__, (replacement, original), dict(content))
    setattr(sys.modules[replacement.__module__], qualname, kind)
    _CLASSES[replacement, original] = kind
    return kind


def is_swapped(module: nn.Module) -> bool:
    """Whether the module's class is one of ours, not another library's (a parametrization's) on top of it."""
    return "_hfopt_original" in type(module).__dict__


def is_usable(module: Any) -> bool:
    """Whether kernels may stand for a call of this module from the one above it."""
    return is_swapped(module) and is_bare(module) and module._hfopt.facts.hold(module)


def are_others_bare(module: Replacement) -> bool:
    """Whether the children that the replacement neither reads nor calls (activations, dropouts) may be bypassed."""
    return all(_may_be_bypassed(module, *each) and is_bare(each[1]) for each in _others(module))


def _bypass_obstacle(module: Replacement) -> str | None:
    """In words, which child has become something that cannot be bypassed; None if there is none."""
    for name, child in _others(module):
        if not _may_be_bypassed(module, name, child):
            return f"{name} is a {type(child).__name__} now"
    return None


def _others(module: Replacement) -> list[tuple[str, Any]]:
    children: dict[str, Any] = module._modules
    if not children:
        return []
    reads, parts = module._hfopt.spec.reads, module._hfopt.spec.parts
    return [each for each in children.items() if each[0] not in reads and each[0] not in parts]


def _may_be_bypassed(module: Replacement, name: str, child: Any) -> bool:
    if name == getattr(module._hfopt.spec, "activation", None):
        return child is not None
    return type(child) in DO_NOTHING


def swap(module: nn.Module, replacement: type[Replacement], record: Record) -> None:
    """Give the module its replacement class."""
    record.facts = Facts.of(module, replacement.live)
    module.__class__ = replacement_class(replacement, type(module))
    module.__dict__["_hfopt"] = record


def unswap(module: nn.Module) -> None:
    """Give the module its original class back, and leave nothing behind."""
    ours = type(module)
    module.__class__ = original_class(module)
    module.__dict__.pop("_hfopt", None)
    # accelerate keeps the bound `forward` of the class that it found
    for name, value in module.__dict__.items():
        if inspect.ismethod(value) and value.__self__ is module and value.__func__ is ours.forward:
            module.__dict__[name] = MethodType(type(module).forward, module)
