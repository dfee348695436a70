"""The proof of a match: original and replacement run on small random inputs and have to agree."""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from hfopt.cache import IndirectCache
from hfopt.errors import ForkedProcess, KernelError
from hfopt.host import Arguments
from hfopt.modules.quantized import QuantizedLinear
from hfopt.modules.weights import original_class
from hfopt.patches.adapters import call_reason
from hfopt.patches.facts import layer_index
from hfopt.patches.guards import is_sdpa
from hfopt.patches.pattern import Pattern
from hfopt.patches.replacement import Form, Record, Replacement, replacement_class
from hfopt.patches.scene import Scene, shaken

# Largest difference allowed, as a share of the largest value.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
# More is allowed, up to a limit, where the original itself answers a last-bit change of its input with more.
_NOISE_FACTOR, _NOISE_LIMIT = 2.0, 0.1

# Inputs of float16 are made smaller where outputs would be infinite.
_SMALLER = (1.0, 1 / 8, 1 / 64)


def allowed(noise: float) -> float:
    """The difference that may come of rounding, where shaken inputs change the original's own answer by `noise`."""
    return _NOISE_FACTOR * min(noise, _NOISE_LIMIT)


@contextlib.contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Within, the modules are in evaluation mode, no hook fires, and quantised ones round no inputs, which would hide
    differences in their noise; after, they are exactly as before."""
    everything = [part for module in modules for part in module.modules()]
    before = [(part, type(part), part.__dict__.copy(), part._buffers.copy()) for part in everything]
    try:
        for part in everything:
            part.__dict__.update(training=False, _forward_hooks={}, _forward_pre_hooks={})
            if isinstance(part, QuantizedLinear):
                part.__dict__["format"] = replace(part.format, compute="float")
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for part, kind, state, buffers in before:
            part.__class__ = kind
            part.__dict__.clear()
            part.__dict__.update(state)
            part._buffers.clear()
            part._buffers.update(buffers)


@dataclass(frozen=True)
class Proof:
    """Largest difference of each output as a share of its largest value; or in words, why there is no proof.

    form: of the original's output. `is_general` tells whether that holds for other modules of the same class and
    configuration.
    """

    figures: Mapping[Any, float] = field(default_factory=dict)
    flaw: str | None = None
    is_general: bool = True
    form: Form = None

    @property
    def figure(self) -> float:
        """The largest."""
        return max(self.figures.values(), default=math.nan)


def prove(
    pattern: Pattern, module: nn.Module, spec: Any, dtype: torch.dtype, rotary: nn.Module | None
) -> Proof:
    """Run the module as it is and as its replacement, without a trace in the module or the random state.

    Raises KernelError and ForkedProcess, which say nothing about the module.
    """
    original = type(module)
    # swapped parts are proven already, and run in kernels only over our cache: the rest is left to prove
    has_swapped_parts = any(isinstance(part, Replacement) for part in module.modules())
    new_cache = IndirectCache if has_swapped_parts else DynamicCache
    with undisturbed(module, *([] if rotary is None else [rotary])):
        scale, plain = pattern.scale(module, spec, dtype), _Original(module, pattern)
        for smaller in _SMALLER:
            scene = functools.partial(
                Scene, dtype, scale * smaller, rotary=rotary, takes_flags=_takes_flags(module)
            )
            try:
                expected = _outcome(pattern, plain, spec, scene(new_cache()))
            except Exception as error:  # noqa: BLE001  (whatever a foreign forward raises)
                return Proof(flaw=f"it cannot be probed ({_in_words(error)})")
            if all(output.isfinite().all() for output in expected.values()):
                break
        for name in spec.reads:
            reason = call_reason(module.get_submodule(name), dtype)
            if reason is not None:
                return Proof(flaw=f"{name} is called itself: {reason}", is_general=False)
        module.__class__ = replacement_class(pattern.replacement, original)
        module.__dict__["_hfopt"] = Record(spec)
        try:
            found = _outcome(pattern, _Computed(module), spec, scene(IndirectCache()))
        except (KernelError, ForkedProcess):
            raise
        except Exception as error:  # noqa: BLE001  (a failure here is a reason to keep the module)
            return Proof(flaw=f"the replacement failed ({_in_words(error)})")
        proof = _compare(expected, found)
        tolerance = _TOLERANCES[dtype]
        if proof.figure > tolerance:
            module.__class__ = original
            with _shaken_biases(module):
                again = _outcome(pattern, plain, spec, scene(new_cache(), shaken=True))
            noise = _compare(expected, again).figures
            if any(
                figure > max(tolerance, allowed(noise.get(name, 0.0)))
                for name, figure in proof.figures.items()
            ):
                figure = f"{proof.figure:.2g}"
                return Proof(
                    flaw=f"the probe differs by {figure} of the largest value: it computes something else"
                )
    return replace(proof, form=plain.form)


@contextlib.contextmanager
def _shaken_biases(module: nn.Module) -> Iterator[None]:
    """Within, biases are changed in the last bit too: large ones hide what is changed in inputs, but not their rounding."""
    biases = [bias for name, bias in module.named_parameters() if name.endswith("bias")]
    before = [bias.data for bias in biases]
    try:
        for bias in biases:
            bias.data = shaken(bias.data)
        yield
    finally:
        for bias, data in zip(biases, before, strict=True):
            bias.data = data


def _takes_flags(module: Any) -> bool:
    """Whether it is attention to which the model gives masks of True and False."""
    return layer_index(module) is not None and hasattr(module, "config") and is_sdpa(module)


def _outcome(pattern: Pattern, call: Any, spec: Any, scene: Scene) -> dict[Any, torch.Tensor]:
    """What a trial gives, and what it leaves in the cache."""
    outputs: dict[Any, torch.Tensor] = dict(enumerate(pattern.trial(call, spec, scene)))
    for index, keys, values in scene.cached():
        outputs |= {("keys", index): keys, ("values", index): values}
    return outputs


class _Original:
    """Calls the original, and notes what form it gives its outputs."""

    form: Form = None

    def __init__(self, module: nn.Module, pattern: Pattern) -> None:
        self._module = module
        self._arguments = Arguments.of(original_class(module).forward, pattern.replacement.takes)

    def __call__(self, **roles: Any) -> Any:
        output = self._module.forward(**self._arguments.named(**roles))
        if isinstance(output, torch.Tensor):
            return output
        if (
            not isinstance(output, tuple)
            or not output
            or not all(_can_be_left_out(each) for each in output[1:])
        ):
            raise TypeError(f"its output has another form ({type(output).__name__})")
        self.form = len(output)
        return output[0]


def _can_be_left_out(part: Any) -> bool:
    """Whether it is attention weights, which nobody reads who has not asked for them, or nothing."""
    if part is None:
        return True
    if not isinstance(part, torch.Tensor) or part.dim() != 4 or not part.is_floating_point():
        return False
    # with a sink they sum up to less than 1
    return bool((part >= 0).all()) and bool((part.float().sum(-1) <= 1.05).all())


class _Computed:
    """Calls the replacement without its way out to the original, which would prove nothing."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, **roles: Any) -> Any:
        names = self._module._hfopt_arguments.names
        output = self._module.compute(**{role: each for role, each in roles.items() if role in names})
        if output is None:
            raise NotImplementedError("its kernels do not take this module")
        return output


def _compare(expected: dict[Any, torch.Tensor], found: dict[Any, torch.Tensor]) -> Proof:
    figures: dict[Any, float] = {}
    if expected.keys() != found.keys():
        return Proof(flaw="the replacement caches in other layers")
    for name, theirs in expected.items():
        ours = found[name]
        if (
            not isinstance(theirs, torch.Tensor)
            or theirs.shape != ours.shape
            or theirs.dtype is not ours.dtype
        ):
            return Proof(flaw="the replacement gives another kind of output")
        theirs, ours = theirs.double(), ours.double()
        if not theirs.isfinite().all():
            return Proof(flaw="its output is not finite (NaN or infinite weights?)", is_general=False)
        largest = float(theirs.abs().max())
        if largest == 0:
            return Proof(flaw="its output is all zeros, which proves nothing", is_general=False)
        figure = float((theirs - ours).abs().max()) / largest
        figures[name] = figure if math.isfinite(figure) else math.inf
    return Proof(figures)


def _in_words(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
