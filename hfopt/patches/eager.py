"""Operations that run at once, on tensors, over the cache of a call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfopt import functional
from hfopt.cache import IndirectCache, ShardedLayer
from hfopt.functional import Epilogue, Mask, Norm, Weights
from hfopt.functional.epilogue import PLAIN
from hfopt.functional.linear import Rows
from hfopt.host import Arguments
from hfopt.modules.guards import are_readable, is_bare
from hfopt.modules.weights import original_class
from hfopt.patches.activation import XIELU, fused_activation, xielu_of
from hfopt.patches.adapters import AdaptedWeights, Unreadable
from hfopt.patches.angles import are_angles, remembered
from hfopt.patches.guards import attention_kind, is_causal, wants_attentions
from hfopt.patches.ops import Declined
from hfopt.patches.replacement import Replacement, are_others_bare, is_usable
from hfopt.patches.stored import Stored
from hfopt.patches.weights import read_children


class Past(NamedTuple):
    """The cache of a call, which keys each token sees, and the angles of the new ones."""

    cache: IndirectCache
    layer: int
    shape: torch.Size  # of x
    mask: Mask
    cos: Tensor | None
    sin: Tensor | None
    appended: Any = None  # the layer with room for the new tokens


class Eager:
    """The verbs of `ops.Ops` on tensors of one call of a module.

    roles: arguments of the call by role, x apart; see `host.Arguments`.
    """

    def __init__(self, module: Replacement, x: Any, roles: Mapping[str, Any]) -> None:
        """Raises Declined for an x that is no float tensor in CPU memory."""
        if not isinstance(x, Tensor) or not are_readable((x,), x.dtype):
            raise Declined
        self._dtype, self._roles, self._by = x.dtype, roles, module._hfopt.kernels
        self._n_rows = len(x) if x.dim() else 1

    def check(self, x: Tensor, residual: Any) -> None:
        """Raises Declined for a residual that kernels do not add to what the module makes of x."""
        if not are_readable((residual,), self._dtype) or residual.shape != x.shape:
            raise Declined

    # ---- parts ------------------------------------------------------------------------------------------------------

    def part(self, module: Any, name: str, x: Tensor, residuals: Sequence[Tensor] = ()) -> Tensor:
        child = module._modules[name]
        if isinstance(child, Replacement) and self._can_run(child, x, residuals):
            try:
                output: Tensor = child.run(self, x, *([residuals] if residuals else []))
                return output
            except Declined:
                pass
        residual = Arguments.of(original_class(child).forward).names.get("residual")
        if residual is not None:  # the module itself adds it, and no other
            if len(residuals) != 1:
                raise Declined
            given: Tensor = child(x, **{residual: residuals[0]})
            return given
        output = child(x)
        for each in residuals:
            output = output + each
        return output

    def attention(self, module: Any, path: str, x: Tensor, residuals: Sequence[Tensor] = ()) -> Tensor:
        *around, name = path.split(".")
        for each in around:
            module = module._modules[each]
            if not is_bare(module):
                raise Declined
        child = module._modules[name]
        # as a module it would need arguments that nobody has looked at
        if not isinstance(child, Replacement) or not self._can_run(child, x, residuals):
            raise Declined
        output: Tensor = child.run(self, x, residuals)  # type: ignore[call-arg]
        return output

    def _can_run(self, child: Replacement, x: Tensor, residuals: Sequence[Tensor]) -> bool:
        return is_usable(child) and are_readable((x, *residuals), self._dtype) and are_others_bare(child)

    # ---- linear layers ----------------------------------------------------------------------------------------------

    def weights(self, module: Any, role: str, names: Sequence[str], rows: Rows = ()) -> Weights:
        found = read_children(module, role, names, rows)
        if found is None or found.dtype not in (None, self._dtype):
            raise Declined
        if isinstance(found, AdaptedWeights):
            try:
                return found.for_rows(self._n_rows, self._dtype)
            except Unreadable:
                raise Declined from None
        return found

    def linear(self, x: Tensor, weights: Weights, epilogue: Epilogue[Tensor] = PLAIN) -> Tensor:
        return functional.linear(
            x.contiguous(),
            weights,
            activation=epilogue.activation,
            gated=epilogue.gated,
            residuals=[each.contiguous() for each in epilogue.residuals] if epilogue.residuals else (),
            by=self._by,
        )

    def activate(self, module: Any, name: str, x: Tensor, weights: Weights, *, gated: bool = False) -> Tensor:
        activation: Callable[[Tensor], Tensor] = module._modules[name]
        known = fused_activation(module._hfopt, activation)  # type: ignore[arg-type]
        if known is not None and known != XIELU:
            return self.linear(x, weights, Epilogue(known, gated))
        y = self.linear(x, weights)
        numbers = xielu_of(activation) if known == XIELU and not gated else None  # type: ignore[arg-type]
        if numbers is not None and all(each.dtype is self._dtype for each in numbers):
            return functional.xielu(y, numbers)
        if not gated:
            return activation(y)
        gate, up = y.chunk(2, dim=-1)
        return activation(gate) * up

    def times_input(self, layer: Any, x: Tensor) -> Tensor:
        factor = self._roles.get("layer_input")
        if type(factor) is not Tensor or factor.shape != x.shape or factor.dtype is not x.dtype:
            raise Declined
        return x * factor

    # ---- norms and scales -------------------------------------------------------------------------------------------

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        self._check_vectors(norm)
        return functional.norm(x.contiguous(), norm)

    def _check_vectors(self, norm: Norm) -> None:
        vectors = norm.weight, norm.bias
        if not all(
            each is None or (isinstance(each, torch.nn.Parameter) and each.dtype is self._dtype)
            for each in vectors
        ):
            raise Declined

    def norm_heads(self, module: Any, qkv: Tensor, path: str, first: int, count: int, size: int) -> None:
        functional.norm_heads(qkv, module.get_submodule(path).norm, first, count, size)

    def clamp(self, x: Tensor, limit: float) -> Tensor:
        return functional.clamp(x, limit)

    def scale(self, x: Tensor, factor: float, residual: Tensor | None = None) -> Tensor:
        return functional.scale(x, factor, residual=residual)

    # ---- attention --------------------------------------------------------------------------------------------------

    def past(self, attention: Any, x: Tensor) -> Past:
        given, stored = self._roles, self._stored(attention)
        cache = given.get("cache")
        layer = 0 if cache is None else attention.layer
        cache = IndirectCache() if cache is None else cache
        if not _takes_appends(cache, layer) or wants_attentions(attention) or x.dim() != 3:
            raise Declined
        if not all(is_bare(attention._modules[name]) for name in attention._hfopt.spec.parts):
            raise Declined
        for path, *_ in attention._hfopt.spec.norms:
            block: Any = attention.get_submodule(path)
            if not is_usable(block):
                raise Declined
            self._check_vectors(block.norm)
        self._check_sinks(attention.sinks, attention._hfopt.spec.n_heads)
        rotary = attention.rotary(given.get("position_embeddings"), given.get("position_ids"))
        if rotary is None:
            raise Declined
        n_rows, n_new, _ = x.shape
        if stored is None:
            n_past, n_keys = cache.get_seq_length(layer), cache.n_keys(layer, n_new)
            is_windowed = layer < len(cache.layers) and cache.layers[layer].is_sliding
            appended = None
        else:
            appended, is_windowed = stored.appended._replace(n_new=n_new), stored.layer.is_sliding
            n_past, n_keys = appended.n_keys - n_new, appended.n_keys
        sizes = (n_rows, n_new, n_keys)
        kind, hides = attention_kind(attention), attention._hfopt.spec.given.hides
        if n_keys > attention.max_keys:
            raise Declined
        if not is_causal(attention) and given.get("attention_mask") is None and n_new > 1:
            raise Declined
        bias = given.get("position_bias")
        shown = attention.without_bias(given.get("attention_mask"), bias, cache, sizes)
        mask = _mask(cache, shown, kind, sizes, is_windowed=is_windowed, hides=hides)
        if not attention.takes_bias(bias, cache, mask, sizes):
            raise Declined
        if cache.is_sharded and not _is_whole_view(attention, mask, n_new):
            raise Declined
        cos, sin = rotary(cache, n_past, self._dtype)
        if cos is not None and not are_angles(cos, n_rows, n_new):
            raise Declined
        return Past(cache, layer, x.shape, mask, cos, sin, appended)

    def _check_sinks(self, sinks: Tensor | None, n_heads: int) -> None:
        if sinks is None:
            return
        is_plain = type(sinks) is torch.nn.Parameter and sinks.is_cpu and sinks.dtype is self._dtype
        is_read = is_plain and sinks.shape == (n_heads,) and sinks.is_contiguous()
        if not is_read or not bool((sinks < torch.inf).all()):
            raise Declined

    def _stored(self, attention: Any) -> Stored | None:
        """What another layer has stored for this one; None if that stores its own."""
        spec = attention._hfopt.spec
        if spec.stores:
            return None
        stored = (self._roles.get("shared") or {}).get(spec.given.layer_type)
        if not isinstance(stored, Stored):
            raise Declined
        return stored

    def rotate(self, attention: Any, qkv: Tensor, past: Past, n_heads: int) -> None:
        spec = attention._hfopt.spec
        if past.cos is not None:
            functional.rotate(qkv, past.cos, past.sin, n_heads, spec.head_dim, spec.rotation_kind)

    def store(self, attention: Any, qkv: Tensor, past: Past, *, rotates: bool = True) -> Past:
        spec = attention._hfopt.spec
        n_rows, n_new, _ = past.shape
        appended = past.cache.append(past.layer, n_rows, n_new, spec.n_kv_heads, spec.head_dim, self._dtype)
        n_heads, n_kv_heads, head_dim = spec.heads
        angles, rotation = ((past.cos, past.sin), spec.rotation_kind) if rotates else ((None, None), "none")
        functional.rotate_and_store(qkv, *angles, appended, n_heads, n_kv_heads, head_dim, rotation)
        shared = self._roles.get("shared")
        if shared is not None:  # later layers read the last one of their kind
            shared[spec.given.layer_type] = Stored(past.cache.layers[past.layer], appended)
        return past._replace(appended=appended)

    def attend(self, attention: Any, qkv: Tensor, past: Past) -> Tensor:
        heads, layers = attention._hfopt.spec.heads, past.cache.layers
        layer = layers[past.layer] if past.layer < len(layers) else None
        if isinstance(layer, ShardedLayer):
            return layer.attend(qkv, past.appended, attention.scoring, heads, self._by)
        return functional.attend(qkv, past.appended, past.mask, attention.scoring, *heads, by=self._by)


def _is_whole_view(attention: Any, mask: Mask, n_new: int) -> bool:
    """Whether new tokens see all those before them, wherever these are."""
    scoring = attention.scoring
    sees_all = mask.kind == ("causal" if n_new > 1 else "none") and scoring.window is None
    return sees_all and scoring.slopes is None and attention._hfopt.spec.stores


def _takes_appends(cache: Any, layer: int) -> bool:
    """Whether the cache is ours, and so is this layer of it."""
    if not isinstance(cache, IndirectCache):
        return False
    return layer >= len(cache.layers) or hasattr(cache.layers[layer], "append")


def _mask(
    cache: IndirectCache,
    attention_mask: Any,
    kind: str | None,
    sizes: tuple[int, int, int],
    *,
    is_windowed: bool,
    hides: bool,
) -> Mask:
    """The mask of a call as kernels read it, with its sizes; raises Declined if they cannot.

    hides: whether it says by True what is hidden.
    """
    _, n_new, n_keys = sizes
    if attention_mask is None:
        # without a mask, only torch's own attention takes several tokens as causal, and only the first ones
        if kind is None or (n_new > 1 and not (kind == "sdpa" and n_keys == n_new)):
            raise Declined
        return functional.prepare_mask(None, *sizes)
    # one that is shorter stands for all keys, or is wrong; one that is longer has columns behind the keys, if they are all
    if kind is None or type(attention_mask) is not Tensor or attention_mask.shape[-1] < n_keys:
        raise Declined
    if is_windowed and attention_mask.shape[-1] != n_keys:
        raise Declined
    # by eager attention it is added, whatever it is, or stands for numbers that are
    if (
        (attention_mask.dtype is not torch.bool)
        if hides
        else (kind == "eager" and not attention_mask.is_floating_point())
    ):
        raise Declined

    def prepared() -> Mask:
        shown = attention_mask
        if hides:
            shown = torch.zeros(shown.shape, device="cpu").masked_fill_(shown, torch.finfo(torch.float32).min)
        return functional.prepare_mask(shown, *sizes)

    tag = "window mask" if is_windowed else "mask"  # a model may have both
    mask: Mask = remembered(cache, tag, attention_mask, sizes, prepared)
    if mask.kind == "unsupported":
        raise Declined
    return mask
