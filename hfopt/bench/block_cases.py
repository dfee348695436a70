"""The cases of the public building blocks: each beside the sequence of torch's operations that it replaces."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfopt import functional, modules
from hfopt.words import DTYPES, dtype_name

from .kernel_case import Call, Case, Sizes, Target, again, each, random, rounds_up, stream

Way = Callable[..., object]

_EPS = 1e-6
_ROWS = (1, 128)  # a step, and a prompt
_EXPERTS, _CHOSEN = 8, 2


def _both(ours: Way, theirs: Way, make: Callable[[], tuple[Tensor, ...]], n_rows: int) -> dict[str, Call]:
    """Both ways on the same tensors; what is short many times."""
    given, count = make(), max(2, 2000 // n_rows)
    moved = sum(each.nbytes for each in given)
    calls = {"torch": again(lambda: theirs(*given), count), "hfopt": again(lambda: ours(*given), count)}
    return {name: call._replace(n_bytes=moved) for name, call in calls.items()} | stream(list(given))


# ---- without weights of a matrix -----------------------------------------------------------------------------------------


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    residual += x
    return F.rms_norm(residual, weight.shape, weight, _EPS)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    residual += x
    return F.layer_norm(residual, weight.shape, weight, weight, _EPS)


_PAIRS: dict[str, tuple[Way, Way]] = {
    "silu_mul": (functional.silu_mul, lambda x, y: F.silu(x) * y),
    "gelu_mul": (functional.gelu_mul, lambda x, y: F.gelu(x) * y),
    "gelu_mul, tanh": (
        partial(functional.gelu_mul, approximate="tanh"),
        lambda x, y: F.gelu(x, approximate="tanh") * y,
    ),
}
_NORMS: dict[str, tuple[Way, Way]] = {
    "add_rms_norm": (
        lambda x, residual, weight: functional.add_rms_norm(residual, x, weight, None, _EPS, True),
        _add_rms_norm,
    ),
    "add_layer_norm": (
        lambda x, residual, weight: functional.add_layer_norm(residual, x, weight, weight, _EPS, True),
        _add_layer_norm,
    ),
    "RMSNorm": (
        lambda x, residual, weight: modules.RMSNorm.apply_function(x, weight, _EPS),
        lambda x, residual, weight: F.rms_norm(x, weight.shape, weight, _EPS),
    ),
    "FastLayerNorm": (
        lambda x, residual, weight: functional.fast_layer_norm(x, weight.shape, weight, weight, _EPS),
        lambda x, residual, weight: F.layer_norm(x, weight.shape, weight, weight, _EPS),
    ),
}


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def _rotations(
    dtype: torch.dtype, heads: tuple[int, int, int], n_tokens: int, is_module: bool
) -> dict[str, Call]:
    n_heads, n_kv_heads, size = heads
    rope = modules.RotaryEmbedding(n_tokens, size)
    positions = torch.arange(n_tokens)
    table = torch.outer(positions.float(), 10000 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)
    sin, cos = table.sin(), table.cos()
    query, key = (random(dtype, 1, n_tokens, count, size) for count in (n_heads, n_kv_heads))
    heads_sin, heads_cos = sin.to(dtype)[:, None], cos.to(dtype)[:, None]

    def replaced() -> tuple[Tensor, Tensor]:
        return _rotated(query, heads_cos, heads_sin), _rotated(key, heads_cos, heads_sin)

    def run() -> tuple[Tensor, Tensor]:
        numbers = size, size // 2, size
        if not is_module:
            return functional.rotary_embedding(query, key, sin, cos, size, True)
        return rope(query, positions, n_heads, *numbers), rope(key, positions, n_kv_heads, *numbers)

    count, moved = max(2, 1000 // n_tokens), query.nbytes + key.nbytes
    calls = {"torch": again(replaced, count), "hfopt": again(run, count)}
    return {name: call._replace(n_bytes=moved) for name, call in calls.items()} | stream([query, key])


# ---- Linears -------------------------------------------------------------------------------------------------------------

_LINEARS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "LinearSilu": (0, F.silu),
    "LinearRelu": (0, F.relu),
    "LinearGelu": (0, F.gelu),
    "LinearNewGelu": (0, partial(F.gelu, approximate="tanh")),
    "LinearSiluMul": (1, lambda p, y: F.silu(p) * y),
    "LinearMul": (1, lambda p, y: p * y),
    "LinearAdd": (1, lambda p, y: p + y),
    "LinearAddAdd": (2, lambda p, y, z: p + y + z),
}


def _linear(dtype: torch.dtype, shape: tuple[int, int]) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(shape[1], shape[0], bias=False)
    linear.weight = nn.Parameter(random(dtype, *shape))
    return linear.eval()


def _linears(
    name: str, sizes: Sizes, dtype: torch.dtype, shape: tuple[int, int], n_rows: int
) -> dict[str, Call]:
    n_more, after = _LINEARS[name]
    count = rounds_up(sizes.streamed // 4, shape[0] * shape[1] * dtype.itemsize)
    linears = [_linear(dtype, shape) for _ in range(count)]
    blocks = [getattr(modules, name)(linear) for linear in linears]
    x, more = random(dtype, n_rows, shape[1]), [random(dtype, n_rows, shape[0]) for _ in range(n_more)]
    return _streamed(linears, lambda linear: after(linear(x), *more), blocks, lambda block: block(x, *more))


def _gates(sizes: Sizes, dtype: torch.dtype, shape: tuple[int, int], n_rows: int) -> dict[str, Call]:
    count = rounds_up(sizes.streamed // 4, 2 * shape[0] * shape[1] * dtype.itemsize)
    pairs = [(_linear(dtype, shape), _linear(dtype, shape)) for _ in range(count)]
    blocks, x = [modules.Linear2SiluMul(*pair) for pair in pairs], random(dtype, n_rows, shape[1])
    return _streamed(pairs, lambda pair: F.silu(pair[0](x)) * pair[1](x), blocks, lambda block: block(x))


def _streamed(theirs: Sequence[Any], replaced: Way, ours: Sequence[nn.Module], run: Way) -> dict[str, Call]:
    weights = [each for block in ours for each in block.parameters()]
    n_bytes = sum(weight.nbytes for weight in weights) / len(ours)
    return stream(weights) | {
        "torch": Call(each(replaced, theirs), len(theirs), n_bytes),
        "hfopt": Call(each(run, ours), len(ours), n_bytes),
    }


def _experts(dtype: torch.dtype, shape: tuple[int, int], n_rows: int) -> dict[str, Call]:
    size, hidden = shape[0] // 4, shape[1]
    w13, w2 = random(dtype, _EXPERTS, 2 * size, hidden), random(dtype, _EXPERTS, hidden, size)
    moe, x = modules.GatedMLPMOE(w13, w2), random(dtype, n_rows, hidden)
    logits = torch.randn(n_rows, _EXPERTS)

    def replaced() -> Tensor:
        # the loop of transformers' eager experts
        weights, experts = logits.softmax(-1).topk(_CHOSEN)
        weights = (weights / weights.sum(-1, keepdim=True)).to(dtype)
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            tokens, place = (experts == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[tokens], w13[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, w2[expert])
            out.index_add_(0, tokens, y * weights[tokens, place, None])
        return out

    calls = {"torch": replaced, "hfopt": lambda: moe(x, False, _CHOSEN, logits, True)}
    read = min(_EXPERTS, n_rows * _CHOSEN) * (w13[0].nbytes + w2[0].nbytes)
    return stream([w13, w2]) | {name: again(way, 4)._replace(n_bytes=read) for name, way in calls.items()}


# ---- all -----------------------------------------------------------------------------------------------------------------


def _title(name: str, n_rows: int) -> str:
    return f"{name}, {n_rows} row{'s' if n_rows > 1 else ''}"


def _faster(title: str) -> tuple[Target]:
    return (Target(title, "hfopt", "faster", 1.0, "torch", ("torch.sum", "own read")),)


def block_cases(sizes: Sizes) -> Iterator[Case]:
    """One row, as in a step, and a prompt."""
    for dtype in DTYPES:
        yield from _small(sizes, dtype)
        shape = sizes.features[::-1]
        text = f"{dtype_name(dtype)} {shape[0]}×{shape[1]}"
        for n_rows in _ROWS:
            for name in _LINEARS:
                make = partial(_linears, name, sizes, dtype, shape, n_rows)
                yield Case(text, make, _faster(_title(name, n_rows)))
            make = partial(_gates, sizes, dtype, shape, n_rows)
            yield Case(
                f"{dtype_name(dtype)} 2×{shape[0]}×{shape[1]}",
                make,
                _faster(_title("Linear2SiluMul", n_rows)),
            )
            make = partial(_experts, dtype, shape, n_rows)
            chosen = f"{dtype_name(dtype)} {_CHOSEN} of {_EXPERTS}×{shape[0] // 4}×{shape[1]}"
            yield Case(chosen, make, _faster(_title("GatedMLPMOE", n_rows)))


def _small(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    width, wide = sizes.features
    for n_rows in (1, sizes.norm_rows):
        for name, ways in _PAIRS.items():
            pair = partial(_pair, dtype, n_rows, wide)
            yield Case(
                f"{dtype_name(dtype)} {n_rows}×{wide}", partial(_both, *ways, pair, n_rows), _faster(name)
            )
        for name, ways in _NORMS.items():
            given = partial(_norm_inputs, dtype, n_rows, width)
            yield Case(
                f"{dtype_name(dtype)} {n_rows}×{width}", partial(_both, *ways, given, n_rows), _faster(name)
            )
    for n_tokens in (1, sizes.norm_rows):
        n_heads, n_kv_heads, size = heads = sizes.heads[0]
        text = f"{dtype_name(dtype)} {n_heads}/{n_kv_heads}×{size}, {n_tokens} tokens"
        for name in ("rotary_embedding", "RotaryEmbedding"):
            make = partial(_rotations, dtype, heads, n_tokens, name == "RotaryEmbedding")
            yield Case(text, make, _faster(name))


def _pair(dtype: torch.dtype, n_rows: int, width: int) -> tuple[Tensor, ...]:
    return random(dtype, n_rows, width), random(dtype, n_rows, width)


def _norm_inputs(dtype: torch.dtype, n_rows: int, width: int) -> tuple[Tensor, ...]:
    return random(dtype, n_rows, width), random(dtype, n_rows, width), random(dtype, width)
