"""Find, prove, swap, undo: from a model to a list of what was swapped and what was kept."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfopt.errors import UnsupportedModel
from hfopt.functional import Kernels
from hfopt.host import Conv1D, base_layer
from hfopt.modules.guards import is_bare
from hfopt.modules.weights import original_class
from hfopt.patches.adapters import call_reason
from hfopt.patches.facts import INDICES
from hfopt.patches.pattern import Pattern, Spec, obstacle
from hfopt.patches.patterns import PATTERNS
from hfopt.patches.probe import Proof, prove
from hfopt.patches.replacement import Record, Replacement, is_swapped, swap, unswap
from hfopt.patches.scene import TABLE
from hfopt.patches.weights import is_read_as_linear, lay_by_inputs, lay_by_outputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Swapped:
    """A module that runs in our kernels: its pattern, its classes, and the proof's figure (see `Proof`)."""

    path: str
    pattern: str
    kind: str
    old_class: str
    new_class: str
    proof: float | None


@dataclass(frozen=True)
class Kept:
    """A module that stays as it was, and why."""

    path: str
    old_class: str
    reason: str


class Walk:
    """One pass over a model. `swapped_now` are the modules whose class this pass has changed.

    agree: what makes of a flaw that this process has found, or of None, what all processes of the model go by.
    """

    def __init__(
        self, model: nn.Module, agree: Callable[[str | None], str | None] = lambda flaw: flaw
    ) -> None:
        self.model, self.agree = model, agree
        self.swapped_now: list[nn.Module] = []
        self._laid: list[nn.Module] = []  # whose weights this pass has laid otherwise
        self._modules = dict(model.named_modules())
        self._dtype = next(
            (weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32
        )
        self._proofs: dict[Any, Proof] = {}
        self._tried: set[tuple[str, str, Any]] = set()
        self._reasons: dict[str, str] = {}
        self._readers = {
            path + "." + name if path else name: path
            for path, module in self._modules.items()
            if isinstance(module, Replacement)
            for name in module._hfopt.spec.reads
            if name
        }

    def apply(self) -> None:
        """Swap every module that matches a pattern and passes its proof; all or, if an error occurs, none."""
        try:
            for module in self._modules.values():
                if type(module) is Conv1D and lay_by_outputs(module):
                    self._laid.append(module)
            for pattern in PATTERNS:
                for path, module in self._modules.items():
                    if not isinstance(module, (Replacement, PreTrainedModel)) and path not in self._readers:
                        self._apply(pattern, path, module)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Give the modules that this pass has swapped their classes back."""
        while self.swapped_now:
            unswap(self.swapped_now.pop())
        while self._laid:
            lay_by_inputs(self._laid.pop())

    def refuse(self, reason: str) -> None:
        """`undo`, for a reason that the report gives for all of them."""
        now = {id(module) for module in self.swapped_now}
        self._reasons.update({path: reason for path, module in self._modules.items() if id(module) in now})
        self._readers = {
            path: reader for path, reader in self._readers.items() if id(self._modules[reader]) not in now
        }
        self.undo()

    def use(self, kernels: Kernels) -> None:
        """Let every swapped module take these kernels. Until then new ones take hfopt's, which the proofs are about."""
        for module in self._modules.values():
            if isinstance(module, Replacement):
                module._hfopt.kernels = kernels

    def _apply(self, pattern: Pattern, path: str, module: nn.Module) -> None:
        recognised = pattern.recognise(module)
        if recognised is None:
            return
        if isinstance(recognised, str):
            self._reasons.setdefault(path, recognised)
            return
        for spec in recognised if isinstance(recognised, list) else [recognised]:
            # records have readings in common, and a proof may be about this module alone
            if (path, pattern.name, spec) in self._tried:
                continue
            self._tried.add((path, pattern.name, spec))
            reason = self._try(pattern, path, module, spec)
            if reason is None:
                return
            self._reasons.setdefault(path, reason)

    def _try(self, pattern: Pattern, path: str, module: nn.Module, spec: Spec) -> str | None:
        """Swap the module if it is what the spec says; in words, why not."""
        reason = obstacle(module, spec)
        if reason is not None:
            return reason
        proof = self._proof(pattern, path, module, spec)
        if proof.flaw is not None:
            logger.debug("%s (%s) is kept: %s", path, type(module).__name__, proof.flaw)
            return proof.flaw
        swap(module, pattern.replacement, Record(spec, proof.figure, form=proof.form))
        self.swapped_now.append(module)
        self._readers.update({f"{path}.{name}" if path else name: path for name in spec.reads if name})
        return None

    def _proof(self, pattern: Pattern, path: str, module: nn.Module, spec: Any) -> Proof:
        weights = [weight for weight in module.parameters() if weight.is_floating_point()]
        dtype = weights[0].dtype if weights else self._dtype
        key = (pattern.name, type(module), spec, dtype, _configuration(module))
        proof = self._proofs.get(key)
        if proof is None:
            rotary = next(self._rotaries_above(path), None)
            proof = prove(pattern, module, spec, dtype, rotary)
            proof = replace(proof, flaw=self.agree(proof.flaw))
            if proof.is_general:
                self._proofs[key] = proof
        return proof

    def _rotaries_above(self, path: str) -> Iterator[nn.Module]:
        """Modules that hold rotary frequencies, the nearest first."""
        while path:
            path = path.rpartition(".")[0]
            for child in self._modules[path].children():
                if any(name.endswith(("inv_freq", TABLE)) for name in child._buffers):
                    yield child

    # ---- what came of it -----------------------------------------------------------------------------------

    def swapped(self) -> list[Swapped]:
        """Every swapped module of the model, in its order."""
        kinds = {pattern.replacement: pattern for pattern in PATTERNS}
        found = []
        for path, module in self._modules.items():
            if isinstance(module, Replacement):
                replacement = next(base for base in type(module).__mro__ if base in kinds)
                pattern = kinds[replacement]
                original = original_class(module)
                new_class = f"{replacement.__module__}.{replacement.__name__}"
                record = module._hfopt
                found.append(
                    Swapped(path, pattern.name, pattern.kind, _class_name(original), new_class, record.proof)
                )
        return found

    def kept(self) -> list[Kept]:
        """Every other module that has a forward of its own, with its reason."""
        return [
            Kept(path, _class_name(type(module)), self._reason(path, module))
            for path, module in self._modules.items()
            if not isinstance(module, Replacement) and type(module).forward is not nn.Module.forward
        ]

    def kernels(self) -> str:
        """Whose kernels the swapped modules take; several, if parts of the model were optimized each for itself."""
        found = {
            module._hfopt.kernels for module in self._modules.values() if isinstance(module, Replacement)
        }
        return ", ".join(sorted(found))

    def refused(self) -> dict[str, str]:
        """Modules that resemble something known and have not been swapped, and why."""
        return {
            path: reason
            for path, reason in self._reasons.items()
            if not isinstance(self._modules[path], Replacement)
        }

    def idle(self) -> dict[str, str]:
        """Swapped modules that cannot run in kernels as they are now, and why."""
        reasons = {
            path: _idle_reason(module, self._dtype)
            for path, module in self._modules.items()
            if isinstance(module, Replacement)
        }
        return {path: reason for path, reason in reasons.items() if reason is not None}

    def _reason(self, path: str, module: nn.Module) -> str:
        if path in self._reasons:
            return self._reasons[path]
        parent = self._modules[path.rpartition(".")[0]]
        if path in self._readers:
            return f"{type(parent).__name__} reads its weights"
        if isinstance(parent, Replacement):
            return f"part of {type(parent).__name__}"
        if isinstance(module, PreTrainedModel):
            return "a PreTrainedModel keeps its class"
        return "it matches no pattern"


def _configuration(module: nn.Module) -> tuple[Any, ...]:
    """The plain values among a module's attributes, by which instances of one class may differ."""
    state = vars(module)
    plain = (
        (name, value)
        for name, value in state.items()
        if name not in (*INDICES, "training") and isinstance(value, (bool, int, float, str, type(None)))
    )
    return (id(state.get("config")), *sorted(plain, key=lambda item: item[0]))


def _class_name(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def restore_classes(model: nn.Module) -> None:
    """Give every swapped module its class back.

    Raises UnsupportedModel if another library has put a class of its own on top of one of ours.
    """
    swapped = {path: module for path, module in model.named_modules() if isinstance(module, Replacement)}
    for path, module in swapped.items():
        if not is_swapped(module):
            raise UnsupportedModel(
                f"{path} has become a {type(module).__qualname__} since optimize(): undo that change first"
                " (a parametrization, say, is undone with torch.nn.utils.parametrize.remove_parametrizations)"
            )
    for module in swapped.values():
        unswap(module)
    for each in model.modules():
        if type(each) is Conv1D:
            lay_by_inputs(each)


def _idle_reason(module: Replacement, dtype: torch.dtype) -> str | None:
    """In words, why a swapped module cannot run in kernels as it is now; None if it can."""
    reason = module.idle_reason()
    if reason is not None:
        return reason
    for name in module._hfopt.spec.reads:
        if not name:
            continue
        child = module._modules[name]
        if child is None or not is_read_as_linear(child):
            return f"{name} is a {type(child).__name__} now"
        base = base_layer(child)
        if not is_bare(base) and not base.training:
            return f"{name} has hooks or a forward of its own"
        reason = None if child.training else call_reason(child, dtype)
        if reason is not None:
            return f"{name} is called itself: {reason}"
    return None
