"""A quick check of every kernel on this machine against plain numpy, for `hfopt doctor`."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfopt.kernels import elementwise, norm, rope, sampling
from hfopt.kernels.attention import cache_record
from hfopt.kernels.attention import decode as attention
from hfopt.kernels.attention import prefill as attention_prefill
from hfopt.kernels.attention.seen import CAUSAL
from hfopt.kernels.linear import activation, quantized
from hfopt.kernels.linear import rows as linear
from hfopt.kernels.linear import tiles as linear_tiles

Array = NDArray[Any]
Case = Callable[[type], float]

# of values of about 1; uint16 stands for the bits of bfloat16, int16 for those of float16
_TOLERANCE = {np.float32: 1e-5, np.uint16: 2e-2, np.int16: 2.5e-3}
_NO_MASK = np.zeros((0, 0, 0), np.uint8)
_NAMES = {np.float32: "float32", np.uint16: "bfloat16", np.int16: "float16"}


def _random(dtype: type, *shape: int) -> Array:
    """Normal random numbers, always the same for a shape."""
    values = np.random.default_rng(shape).standard_normal(shape).astype(np.float32)
    if dtype is np.int16:
        return values.astype(np.float16).view(np.int16)
    return values if dtype is np.float32 else (values.view(np.uint32) >> 16).astype(np.uint16)


def _exact(array: Array) -> NDArray[np.float64]:
    """The values of float32, or of the bits of bfloat16 or float16."""
    if array.dtype == np.int16:
        array = array.view(np.float16)
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def _error(given: Array, expected: Array) -> float:
    """Largest difference; inf where a value is missing or not finite."""
    difference = np.abs(_exact(given) - expected).max()
    return float(difference) if np.isfinite(difference) else float("inf")


def _address(array: Array) -> int:
    return array.ctypes.data


def _rms_norm(dtype: type) -> float:
    x, w = _random(dtype, 3, 41), _random(dtype, 41)
    out = np.zeros_like(x)
    norm.norm(np.empty(0, dtype), False, _address(x), 3, 41, _address(w), 0, 0, 1e-6, _address(out))
    s = _exact(x)
    return _error(out, _exact(w) * s / np.sqrt((s**2).mean(-1, keepdims=True) + 1e-6))


def _norm_heads(dtype: type) -> float:
    x, w = _random(dtype, 3, 4, 41), _random(dtype, 2, 41)
    s = _exact(x)
    s[:, 1:3] *= (1 + _exact(w)) / np.sqrt((s[:, 1:3] ** 2).mean(-1, keepdims=True) + 1e-6)
    heads = (3, 4 * 41, 41, 2, 41, 41)
    norm.norm_heads(np.empty(0, dtype), False, _address(x), *heads, _address(w), 0, 1, 1e-6)
    return _error(x, s)


def _layer_norm(dtype: type) -> float:
    x, w, b = _random(dtype, 3, 41), _random(dtype, 41), _random(dtype, 1, 41)
    out = np.zeros_like(x)
    norm.norm(np.empty(0, dtype), True, _address(x), 3, 41, _address(w), _address(b), 0, 1e-6, _address(out))
    s = _exact(x)
    s = (s - s.mean(-1, keepdims=True)) / np.sqrt(s.var(-1, keepdims=True) + 1e-6)
    return _error(out, _exact(w) * s + _exact(b))


def _scale(dtype: type) -> float:
    x, residual = _random(dtype, 3, 41), _random(dtype, 3, 41)
    out = np.zeros_like(x)
    elementwise.scale(np.empty(0, dtype), _address(x), x.size, 3.0, True, _address(residual), _address(out))
    return _error(out, _exact(residual) + _exact(x) / 3.0)


def _linear(dtype: type, n_rows: int) -> float:
    x, w, bias = _random(dtype, n_rows, 41), _random(dtype, 35, 41), _random(dtype, 35)
    out: Array = np.zeros((n_rows, 35), dtype)
    table = np.array([[_address(w), _address(bias), 35, 0]], np.int64)
    nothing = np.zeros(0, np.int64)
    kernel = linear.linear_rows if n_rows <= linear.ROW_LIMIT else linear_tiles.linear_tiles
    like: Array = np.empty(0, dtype)
    kernel(like, _address(x), n_rows, 41, table, False, activation.NONE, nothing, _address(out), 35)
    expected = _exact(x) @ _exact(w).T + _exact(bias)
    return _error(out, expected) / float(np.abs(expected).max())


def _aligned(array: Array) -> Array:
    """A copy that starts at a multiple of 64 bytes."""
    room: Array = np.zeros(array.nbytes + 64, np.uint8)
    start = -_address(room) % 64
    copy: Array = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _quantized(dtype: type, whole: bool, bits: int, n_rows: int) -> float:
    """Three blocks of codes with zero points, in groups of 32 inputs; `kernels.quantized` says how they lie."""
    n_columns, size, group, per_unit = 48, 96, 32, 32 // bits
    rng = np.random.default_rng(bits)
    x = _random(dtype, n_rows, size)
    codes = rng.integers(0, 1 << bits, (n_columns, size)).astype(np.uint8)
    zeros = rng.integers(0, 1 << bits, (n_columns, size // group)).astype(np.uint8)
    scales = rng.uniform(0.5, 1, zeros.shape).astype(np.float16)
    rows = rng.uniform(0.5, 1, n_columns).astype(np.float32)
    units: Array = codes.reshape(-1, 16, size // per_unit, per_unit).transpose(0, 2, 1, 3)
    if bits == 4:
        units = units[..., :4] | units[..., 4:] << 4
    blocks = [_aligned(each.reshape(-1, 16, size // group).transpose(0, 2, 1)) for each in (scales, zeros)]
    parts = [_aligned(units), *blocks, _aligned(rows)]
    table = np.array([[_address(parts[0]), 0, n_columns, 0]], np.int64)
    scaling = np.array([[_address(part) for part in parts[1:]]], np.int64)
    out: Array = np.zeros((n_rows, n_columns), dtype)
    terms = quantized.MAX_TERMS[x.dtype.name] if whole else 1
    meaning = (table, scaling, bits, group, 0, terms)
    rest = (False, activation.NONE, np.zeros(0, np.int64), _address(out), n_columns)
    quantized.quantized_linear(np.empty(0, dtype), _address(x), n_rows, size, *meaning, *rest)
    exact = _exact(x)
    if not whole:
        groups = exact.reshape(n_rows, -1, group)
        step = np.abs(groups).max(-1, keepdims=True) / 127
        exact = (np.rint(groups / step) * step).reshape(n_rows, size)
    centred = codes.astype(np.float64) - zeros.repeat(group, -1)
    expected = exact @ (centred * scales.astype(np.float64).repeat(group, -1) * rows[:, None]).T
    return _error(out, expected) / float(np.abs(expected).max())


def _codes(values: Array) -> tuple[Array, Array]:
    """int8 codes and their scales of vectors along the last dimension."""
    scales = np.abs(values).max(-1) / 127
    return np.rint(values / scales[..., None]).astype(np.int8), scales.astype(np.float32)


def _values(codes: Array, scales: Array) -> Array:
    return codes * scales[..., None].astype(np.float64)


def _rotate_and_store(dtype: type, is_coded: bool) -> float:
    qkv, cos, sin = _random(dtype, 4, 4 * 24), _random(np.float32, 1, 4, 24), _random(np.float32, 1, 4, 24)
    cache: Array = np.zeros((2, 1, 1, 6, 24), np.int8 if is_coded else dtype)
    scales: Array = np.zeros((2, 1, 1, 6), np.float32)
    x = _exact(qkv).reshape(4, 4, 24)
    turned = np.concatenate((-x[..., 12:], x[..., :12]), -1)
    expected = x * cos[0, :, None] + turned * sin[0, :, None]
    angles = (_address(cos), _address(sin), 1, 24)
    record = cache_record.record_of(cache, cache, *(scales, scales) if is_coded else ())
    rope.rotate_and_store(
        np.empty(0, dtype),
        np.empty(0, cache.dtype),
        _address(qkv),
        1,
        4,
        *angles,
        rope.HALF,
        2,
        record,
        cache_record.PREFIX,
        2,
    )
    found, stored = cache[:, 0, 0, 2:], np.stack((expected[:, 2], x[:, 3]))
    rotated = _error(qkv[:, :48], expected[:, :2].reshape(4, 48))
    if not is_coded:
        return max(rotated, _error(found[0], stored[0]), _error(found[1], stored[1]))
    # half a step off is right
    steps = np.abs(stored).max(-1) / 127
    off = np.abs(_values(found, scales[:, 0, 0, 2:]) - stored) - steps[..., None] / 2
    return max(rotated, _error(scales[:, 0, 0, 2:], steps), float(np.maximum(off, 0).max()))


def _scoring(dtype: type, n_heads: int, is_bent: bool) -> tuple[tuple[Any, ...], tuple[Array, Array]]:
    """(what kernels are told of scores, slopes and sinks of the heads, which have to live)."""
    slopes, sinks = _random(np.float32, n_heads) / np.float32(16), _random(dtype, n_heads)
    bent = (2.0, _address(slopes), _address(sinks), 41, 0) if is_bent else (0.0, 0, 0, 0, 0)
    return (0.2, *bent), (slopes, sinks)


def _attended(q: Array, k: Array, v: Array, place: Array, kept: tuple[Array, Array], is_bent: bool) -> Array:
    """Attention of queries whose tokens are at these places, one for each head or all of one head."""
    distance = np.arange(len(k)) - place
    scores, sink = q @ k.T * 0.2, np.full((1, 1), -np.inf)
    seen = distance <= 0
    if is_bent:
        slope, sink = (_exact(each)[:, None] for each in kept)
        scores, seen = 2 * np.tanh(scores / 2) + slope * distance, seen & (distance > -41)
    scores = np.where(seen, scores, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), sink)
    weights = np.exp(scores - top)
    return weights / (weights.sum(-1, keepdims=True) + np.exp(sink - top)) @ v


def _cache(
    dtype: type, is_coded: bool, *shapes: tuple[int, ...]
) -> tuple[list[Array], list[Array], list[Array]]:
    """Random buffers [2, rows, 1, columns, 24], their scales if they are codes, and what they mean."""
    buffers = [_random(dtype, *shape) for shape in shapes]
    if not is_coded:
        return buffers, [], [_exact(buffer) for buffer in buffers]
    coded = [_codes(_exact(buffer)) for buffer in buffers]
    return [codes for codes, _ in coded], [scales for _, scales in coded], [_values(*each) for each in coded]


def _attend_decode(dtype: type, is_coded: bool, is_bent: bool) -> float:
    qkv = _random(dtype, 2, 4 * 24)
    buffers, scales, (prefix, suffix) = _cache(dtype, is_coded, (2, 1, 1, 300, 24), (2, 2, 1, 5, 24))
    table = np.array([[1, 0, 1, 0, 1], [0, 0, 1, 1, 1]], np.int32)
    out: Array = np.zeros((2, 48), dtype)
    record = cache_record.record_of(*buffers, *scales)
    cache = (record, 290, 4, np.zeros(2, np.int32), table, 0, _NO_MASK)
    likes: tuple[Array, Array] = np.empty(0, dtype), np.empty(0, buffers[0].dtype)
    scoring, kept = _scoring(dtype, 2, is_bent)
    attention.attend_decode(*likes, _address(qkv), 4 * 24, 2, *cache, *scoring, 2, _address(out), False)
    worst = 0.0
    for row in range(2):
        tokens = [suffix[:, table[row, t], 0, t] for t in range(4)]
        k, v = np.concatenate((prefix[:, 0, 0, :290], np.stack(tokens, 1)), 1)
        q = _exact(qkv[row, :48]).reshape(2, 24)
        expected = _attended(q, k, v, np.array([[293]]), kept, is_bent)
        worst = max(worst, _error(out[row].reshape(2, 24), expected))
    return worst


def _attend_prefill(dtype: type, is_coded: bool, is_bent: bool) -> float:
    qkv = _random(dtype, 70, 3 * 24)
    buffers, scales, (prefix, _) = _cache(dtype, is_coded, (2, 1, 1, 80, 24), (2, 1, 1, 0, 24))
    out: Array = np.zeros((70, 24), dtype)
    record = cache_record.record_of(*buffers, *scales)
    cache = (record, 75, 0, np.zeros(1, np.int32), np.zeros((1, 0), np.int32), 0)
    mask = (CAUSAL, 0, _NO_MASK)
    scoring, kept = _scoring(dtype, 1, is_bent)
    likes: tuple[Array, Array] = np.empty(0, dtype), np.empty(0, buffers[0].dtype)
    attention_prefill.attend_prefill(
        *likes, _address(qkv), 3 * 24, 1, 70, *cache, *mask, *scoring, 1, _address(out)
    )
    k, v = prefix[:, 0, 0, :75]
    return _error(out, _attended(_exact(qkv[:, :24]), k, v, np.arange(5, 75)[:, None], kept, is_bent))


def _argmax(dtype: type) -> float:
    x, out = _random(dtype, 3, 5000), np.zeros(3, np.int64)
    sampling.argmax(np.empty(0, dtype), _address(x), 3, 5000, _address(out))
    return float(np.abs(out - _exact(x).argmax(-1)).max())


def _log_softmax_top_k(dtype: type) -> float:
    x, running = _random(dtype, 4, 5000), _random(np.float32, 4)
    scores, places = np.zeros((2, 8), np.float32), np.zeros((2, 8), np.int64)
    sampling.log_softmax_top_k(
        np.empty(0, dtype), _address(x), 4, 5000, _address(running), 8, 2, _address(scores), _address(places)
    )
    s = _exact(x)
    s = (s - np.log(np.exp(s).sum(-1, keepdims=True)) + _exact(running)[:, None]).reshape(2, -1)
    found = np.take_along_axis(s, places, -1)
    return max(_error(scores, -np.sort(-s, -1)[:, :8]), _error(scores, found))


_CASES: tuple[tuple[str, Case], ...] = (
    ("rms_norm", _rms_norm),
    ("norm_heads", _norm_heads),
    ("layer_norm", _layer_norm),
    ("scale", _scale),
    ("linear_rows", functools.partial(_linear, n_rows=3)),
    ("linear_tiles", functools.partial(_linear, n_rows=linear.ROW_LIMIT + 1)),
    *(
        (
            f"{name}, {bits} bits, {n_rows} rows",
            functools.partial(_quantized, whole=whole, bits=bits, n_rows=n_rows),
        )
        for name, whole in (("quantized_linear", False), ("quantized_linear, whole inputs", True))
        for bits, n_rows in ((8, 3), (4, 20))
    ),
    *(
        (f"{name}, cache of codes" if is_coded else name, functools.partial(case, is_coded=is_coded))
        for name, case in (
            ("rotate_and_store", _rotate_and_store),
            ("attend_decode", functools.partial(_attend_decode, is_bent=False)),
            ("attend_decode, bent scores", functools.partial(_attend_decode, is_bent=True)),
            ("attend_prefill", functools.partial(_attend_prefill, is_bent=False)),
            ("attend_prefill, bent scores", functools.partial(_attend_prefill, is_bent=True)),
        )
        for is_coded in (False, True)
    ),
    ("argmax", _argmax),
    ("log_softmax_top_k", _log_softmax_top_k),
)


def run() -> list[tuple[str, bool, str]]:
    """(kernel and dtype, whether its results are right, detail); compiles what is not cached."""
    results = []
    for name, case in _CASES:
        for dtype, tolerance in _TOLERANCE.items():
            label = f"{name} {_NAMES[dtype]}"
            try:
                error = case(dtype)
            except Exception as problem:  # noqa: BLE001 (whatever is wrong with this machine is what is asked for)
                results.append((label, False, f"{type(problem).__name__}: {problem}"))
            else:
                results.append(
                    (label, error <= tolerance, f"largest error {error:.1e}, {tolerance:.0e} allowed")
                )
    return results
