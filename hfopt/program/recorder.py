"""Operations that are recorded: blocks written in verbs become instructions of a program."""

import sys
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from hfopt.errors import UnsupportedModel
from hfopt.functional import Epilogue, Norm, Weights
from hfopt.functional.epilogue import PLAIN
from hfopt.functional.linear import Rows
from hfopt.host import is_adapted
from hfopt.modules.guards import DO_NOTHING
from hfopt.patches.activation import XIELU, fused_activation, xielu_of
from hfopt.patches.ops import Ops
from hfopt.patches.replacement import Replacement, is_swapped
from hfopt.patches.weights import read_children
from hfopt.program.builder import Builder, Value
from hfopt.program.program import Table


class Past(NamedTuple):
    """Which layer of the cache, the own one or another, and the angles of the new tokens."""

    layer: int
    angles: tuple[Value, Value] | None


class Recorder:
    """The verbs of `ops.Ops` on values of a program; raises UnsupportedModel for a module that kernels cannot stand for.

    rotaries: of each layer, the module that computes its angles, or None. windows: of the layers of its cache, see
    `host.windows_of`. layer_inputs: what layers are given of their own, side by side.
    """

    def __init__(self, builder: Builder, rotaries: Sequence[Any], windows: Sequence[int | None]) -> None:
        self._builder, self._rotaries, self._windows = builder, rotaries, windows
        self._angles: dict[Hashable, tuple[Value, Value]] = {}
        self._stored: dict[str | None, int] = {}  # kind of layers -> the last one of them that stores
        self.layer_inputs: Value | None = None

    # ---- parts ------------------------------------------------------------------------------------------------------

    def part(self, module: Any, name: str, x: Value, residuals: Sequence[Value] = ()) -> Value:
        if type(module._modules[name]) in DO_NOTHING and not residuals:
            return x
        child: Any = swapped(module, name)
        output: Value = child.run(self, x, *([residuals] if residuals else []))
        return output

    def attention(self, module: Any, path: str, x: Value, residuals: Sequence[Value] = ()) -> Value:
        parent, _, name = path.rpartition(".")
        return self.part(module.get_submodule(parent), name, x, residuals)

    # ---- linear layers ----------------------------------------------------------------------------------------------

    def weights(self, module: Any, role: str, names: Sequence[str], rows: Rows = ()) -> Weights:
        found = read_children(module, role, names, rows)
        if found is None:
            raise UnsupportedModel(
                f"{', '.join(names) or 'its weights'} cannot be read by a kernel as they are"
            )
        return found

    def linear(self, x: Value, weights: Weights, epilogue: Epilogue[Value] = PLAIN) -> Value:
        return self._builder.linear(x, weights, epilogue)

    def activate(self, module: Any, name: str, x: Value, weights: Weights, *, gated: bool = False) -> Value:
        activation = module._modules[name]
        known = fused_activation(module._hfopt, activation)
        numbers = xielu_of(activation) if known == XIELU and not gated else None
        if numbers is not None:
            return self._builder.xielu(self._builder.linear(x, weights), numbers)
        if known is None or known == XIELU:
            raise UnsupportedModel(f"{type(activation).__name__} is no activation of the kernels")
        return self._builder.linear(x, weights, Epilogue(known, gated))

    def times_input(self, layer: Any, x: Value) -> Value:
        if self.layer_inputs is None or self._builder.layer is None:
            raise UnsupportedModel("the decoder gives its layers nothing but hidden states")
        self._builder.multiply(x, self.layer_inputs, self._builder.layer * x.size)
        return x

    # ---- norms and scales -------------------------------------------------------------------------------------------

    def norm(self, x: Value, norm: Norm) -> Value:
        return self._builder.norm(x, norm)

    def norm_heads(self, module: Any, qkv: Value, path: str, first: int, count: int, size: int) -> None:
        parent, _, name = path.rpartition(".")
        norm = swapped(module.get_submodule(parent), name).norm
        self._builder.norm_heads(qkv, norm, first, count, size)

    def clamp(self, x: Value, limit: float) -> Value:
        return self._builder.clamp(x, limit)

    def scale(self, x: Value, factor: float, residual: Value | None = None) -> Value:
        return self._builder.scale(x, factor, residual)

    # ---- attention --------------------------------------------------------------------------------------------------

    def past(self, attention: Any, x: Value) -> Past:
        spec = attention._hfopt.spec
        layer = attention.layer if spec.stores else self._stored.get(spec.given.layer_type)
        if layer is None:
            raise UnsupportedModel(f"no layer before {attention.layer} stores keys for it")
        return Past(layer, self.angles(attention))

    def rotate(self, attention: Any, qkv: Value, past: Past, n_heads: int) -> None:
        spec = attention._hfopt.spec
        if past.angles is not None:
            self._builder.rotate(qkv, n_heads, spec.head_dim, spec.rotation_kind, past.angles)

    def store(self, attention: Any, qkv: Value, past: Past, *, rotates: bool = True) -> Past:
        spec = attention._hfopt.spec
        rotation, angles = (spec.rotation_kind, past.angles) if rotates else ("none", None)
        self._builder.rotate_and_store(qkv, past.layer, spec.heads, rotation, angles)
        self._stored[spec.given.layer_type] = past.layer
        return past

    def attend(self, attention: Any, qkv: Value, past: Past) -> Value:
        window = self._windows[past.layer] if past.layer < len(self._windows) else None
        if window is None:
            raise UnsupportedModel(f"the cache has no layer {past.layer} of a known kind")
        self._builder.max_keys = min(self._builder.max_keys, attention.max_keys)
        scoring = attention.scoring
        window = min(window, scoring.window or sys.maxsize)
        scoring = replace(scoring, window=None if window == sys.maxsize else window)
        return self._builder.attend(qkv, past.layer, attention._hfopt.spec.heads, scoring)

    def angles(self, attention: Any) -> tuple[Value, Value] | None:
        """cos and sin of the new tokens, looked up once for all layers that share them."""
        rotary = self._rotaries[attention.layer]
        tables = attention.angle_tables(rotary, self._builder.dtype)
        if tables is None:
            return None
        key = rotary, tables.key
        known = self._angles.get(key)
        if known is None:
            cos, sin = (self._builder.look_up(table, "positions") for table in Table.pair_of(tables))
            known = self._angles[key] = cos, sin
        return known

    def take_last(self, x: Value) -> None:
        """Only the last token of each row goes on."""
        shared = [*chain.from_iterable(self._angles.values())]
        self._builder.take_last(x, *shared, *([] if self.layer_inputs is None else [self.layer_inputs]))


def swapped(module: Any, name: str) -> Any:
    """A child that runs in kernels; raises UnsupportedModel if it is something else."""
    child = module._modules[name]
    if is_adapted(child):
        raise UnsupportedModel(f"{name} has adapters, which programs know around Linears of layers alone")
    if not isinstance(child, Replacement) or not is_swapped(child):
        raise UnsupportedModel(f"{name} is a {type(child).__name__} that does not run in kernels")
    reason = child.idle_reason()
    if reason is not None:
        raise UnsupportedModel(f"{name} does not run in kernels: {reason}")
    return child


_: type[Ops[Value]] = Recorder
