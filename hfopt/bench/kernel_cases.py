"""The cases of `hfopt bench --kernels` but attention's: shapes, what a kernel is compared with, what is wanted of it."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from hfopt.bench import roofline
from hfopt.functional import (
    LinearWeights,
    Scoring,
    attend,
    layer_norm,
    linear,
    log_softmax_top_k,
    prepare_mask,
    rms_norm,
    rotate_and_store,
)
from hfopt.words import DTYPES, dtype_name

from .attention_cases import attention_cases, filled
from .block_cases import block_cases
from .kernel_case import (
    PEAK,
    STREAM,
    Call,
    Case,
    Sizes,
    Target,
    again,
    each,
    launched,
    peak,
    random,
    rounds_up,
    stream,
)
from .lora_cases import lora_cases
from .mamba_cases import mamba_cases
from .quantized_cases import quantized_cases

_EPS = 1e-6

# ---- linear ----------------------------------------------------------------------------------------------------------

# times the time of one row, at most
_FEW_ROWS: dict[torch.dtype, dict[int, float | None]] = {
    torch.float32: {4: 1.10, 8: 1.10, 16: None, 32: None},
    torch.bfloat16: {4: 1.10, 8: 1.10, 16: 1.35, 32: 2.0},
    torch.float16: {4: 1.15, 8: None, 16: None, 32: None},
}
# torch's time by ours, at least
_MANY_ROWS = {torch.float32: 1.8, torch.bfloat16: 1.0, torch.float16: 3.0}


def _weights(total: int, dtype: torch.dtype, shape: tuple[int, int]) -> list[Tensor]:
    """So many matrices that they have `total` bytes."""
    return [random(dtype, *shape) for _ in range(rounds_up(total, shape[0] * shape[1] * dtype.itemsize))]


def _title(n_rows: int) -> str:
    return "linear, 1 row" if n_rows == 1 else f"linear, {n_rows} rows"


def _few_rows(sizes: Sizes, dtype: torch.dtype, shape: tuple[int, int]) -> dict[str, Call]:
    weights = _weights(sizes.streamed, dtype, shape)
    records = [LinearWeights.of([weight], [None]) for weight in weights]
    calls = stream(weights)
    for n_rows in (1, *_FEW_ROWS[dtype]):
        run = each(partial(linear, random(dtype, n_rows, shape[1])), records)
        operations = 2 * n_rows * weights[0].numel()
        calls[_title(n_rows)] = Call(run, len(records), weights[0].nbytes, operations)
    return calls | peak(dtype)


def _many_rows(dtype: torch.dtype, shape: tuple[int, int], n_rows: int) -> dict[str, Call]:
    x, weight = random(dtype, n_rows, shape[1]), random(dtype, *shape)
    record = LinearWeights.of([weight], [None])
    operations = 2 * n_rows * weight.numel()
    return {
        "torch": Call(lambda: F.linear(x, weight), n_operations=operations),
        "hfopt": Call(lambda: linear(x, record), n_operations=operations),
    } | peak(dtype)


def linear_cases(sizes: Sizes) -> Iterator[Case]:
    """A few rows, bound by the weights that stream by; many rows, bound by arithmetic."""
    for dtype in DTYPES:
        for shape in (sizes.features[::-1], sizes.features):
            text = f"{dtype_name(dtype)} {shape[0]}×{shape[1]}"
            few = [Target(_title(1), _title(1), "share", 0.92, limits=STREAM)]
            few += [
                Target(_title(n_rows), _title(n_rows), "slower", wanted, _title(1), STREAM + PEAK)
                for n_rows, wanted in _FEW_ROWS[dtype].items()
            ]
            yield Case(text, partial(_few_rows, sizes, dtype, shape), tuple(few))
            for n_rows in sizes.many_rows:
                many = Target(_title(n_rows), "hfopt", "faster", _MANY_ROWS[dtype], "torch", PEAK)
                yield Case(text, partial(_many_rows, dtype, shape, n_rows), (many,))


# ---- norms, rotation, activation -------------------------------------------------------------------------------------


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, _EPS)


def _layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return layer_norm(x, weight, weight, _EPS)


def _norm(sizes: Sizes, dtype: torch.dtype, function: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Call]:
    x, weight = random(dtype, sizes.norm_rows, sizes.features[0]), random(dtype, sizes.features[0])
    target = torch.empty_like(x)
    # without the result's allocation: the system takes longer to hand out new pages than a kernel to fill them
    run = launched(lambda: function(x, weight))
    return {
        name: Call(way, n_bytes=2 * x.nbytes)
        for name, way in (("copy_", lambda: target.copy_(x)), ("hfopt", run))
    }


def _rotary(sizes: Sizes, dtype: torch.dtype, heads: tuple[int, int, int]) -> dict[str, Call]:
    n_heads, n_kv_heads, head_dim = heads
    n_tokens = sizes.norm_rows
    qkv = random(dtype, 1, n_tokens, (n_heads + 2 * n_kv_heads) * head_dim)
    angles = torch.rand(1, n_tokens, head_dim)
    cos, sin = angles.cos(), angles.sin()
    appended, target = filled(dtype, n_tokens, n_kv_heads, head_dim), torch.empty_like(qkv)
    n_bytes = 2 * qkv.nbytes
    run = partial(rotate_and_store, qkv, cos, sin, appended, *heads, "half")
    return {
        "copy_": Call(lambda: target.copy_(qkv), n_bytes=n_bytes),
        "hfopt": Call(run, n_bytes=n_bytes + cos.nbytes + sin.nbytes),
    }


def _gated(sizes: Sizes, dtype: torch.dtype, shape: tuple[int, int]) -> dict[str, Call]:
    gates, ups = (_weights(sizes.streamed // 2, dtype, shape) for _ in range(2))
    pairs = [LinearWeights.of(pair, [None, None]) for pair in zip(gates, ups, strict=True)]
    x = random(dtype, 1, shape[1])
    run = each(lambda pair: linear(x, pair, activation="silu", gated=True), pairs)
    return stream(gates + ups) | {"hfopt": Call(run, len(pairs), 2 * gates[0].nbytes)}


def small_cases(sizes: Sizes) -> Iterator[Case]:
    """Cases whose copying costs as much as computing, on inputs larger than the caches."""
    for dtype in DTYPES:
        width = sizes.features[0]
        for name, function in (("rms_norm", _rms_norm), ("layer_norm", _layer_norm)):
            yield Case(
                f"{dtype_name(dtype)} {sizes.norm_rows}×{width}",
                partial(_norm, sizes, dtype, function),
                (Target(name, "hfopt", "share", 0.8, limits=("copy_",)),),
            )
        n_heads, n_kv_heads, head_dim = heads = sizes.heads[0]
        yield Case(
            f"{dtype_name(dtype)} {n_heads}/{n_kv_heads}×{head_dim}, {sizes.norm_rows} tokens",
            partial(_rotary, sizes, dtype, heads),
            (Target("rotary + cache write", "hfopt", "share", 0.8, limits=("copy_",)),),
        )
        shape = sizes.features[::-1]
        yield Case(
            f"{dtype_name(dtype)} 2×{shape[0]}×{shape[1]}",
            partial(_gated, sizes, dtype, shape),
            (Target("silu(gate) × up, 1 row", "hfopt", "share", 0.8, limits=STREAM),),
        )


# ---- sampling --------------------------------------------------------------------------------------------------------


def _beam_step(sizes: Sizes, n_beams: int) -> dict[str, Call]:
    logits, running = torch.randn(n_beams, sizes.vocabulary), torch.randn(n_beams)

    def replaced() -> tuple[Tensor, Tensor]:
        # transformers' _beam_search and _get_top_k_continuations
        scores = F.log_softmax(logits, dim=-1) + running[:, None]
        return torch.topk(scores.view(1, -1), 2 * n_beams)

    ours = again(lambda: log_softmax_top_k(logits, running, 2 * n_beams, n_beams), 10)
    calls = stream([logits]) | {"torch": again(replaced, 10), "hfopt": ours}
    return {name: call._replace(n_bytes=logits.nbytes) for name, call in calls.items()}


def sampling_cases(sizes: Sizes) -> Iterator[Case]:
    """The choice of the next tokens of beam search."""
    yield Case(
        f"float32 4×{sizes.vocabulary}",
        partial(_beam_step, sizes, 4),
        (Target("log-softmax + top-k, 4 beams", "hfopt", "faster", 5.0, "torch", STREAM),),
    )


# ---- launches --------------------------------------------------------------------------------------------------------


def _overhead(sizes: Sizes, function: Callable[[], object]) -> dict[str, Call]:
    runs = {
        "empty launch": roofline.empty_launch(parallel=False),
        "from tensors": function,
        "launch alone": launched(function),
    }
    return {name: again(run, sizes.launches) for name, run in runs.items()}


def _tiny_calls(dtype: torch.dtype) -> dict[str, tuple[str, Callable[[], object]]]:
    """One row or token of each kernel: (shape, call)."""
    size, n_keys, (n_heads, n_kv_heads, head_dim) = 64, 16, (4, 2, 16)
    heads = n_heads, n_kv_heads, head_dim
    x, weight = random(dtype, 1, size), random(dtype, size)
    record = LinearWeights.of([random(dtype, size, size)], [None])
    appended = filled(dtype, n_keys, n_kv_heads, head_dim)._replace(n_new=1)
    qkv = random(dtype, 1, 1, (n_heads + 2 * n_kv_heads) * head_dim)
    cos = sin = torch.ones(1, 1, head_dim)
    mask = prepare_mask(None, 1, 1, n_keys)
    return {
        "rms_norm": ("1×64", lambda: rms_norm(x, weight, _EPS)),
        "rotate_and_store": ("4/2×16", lambda: rotate_and_store(qkv, cos, sin, appended, *heads, "half")),
        "linear": ("1×64 by 64×64", lambda: linear(x, record)),
        "attend": ("4/2×16, 16 keys", lambda: attend(qkv, appended, mask, Scoring(0.25), *heads)),
    }


def launch_cases(sizes: Sizes) -> Iterator[Case]:
    """Cases of the cost of a call beside its work: from tensors to a tensor, and of the launch alone."""
    for name, (shape, function) in _tiny_calls(torch.bfloat16).items():
        yield Case(
            f"bfloat16 {shape}",
            partial(_overhead, sizes, function),
            tuple(
                Target(f"{name}, {what}", what, "seconds", 8e-6, limits=("empty launch",))
                for what in ("from tensors", "launch alone")
            ),
        )


GROUPS: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "linear": linear_cases,
    "quantized": quantized_cases,
    "attention": attention_cases,
    "small": small_cases,
    "blocks": block_cases,
    "sampling": sampling_cases,
    "mamba": mamba_cases,
    "lora": lora_cases,
    "launch": launch_cases,
}
