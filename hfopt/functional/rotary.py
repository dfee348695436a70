"""Rotary position embedding, fused with the write of new keys and values into the cache."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import rope as kernels
from hfopt.kernels.attention.cache_record import PREFIX, SUFFIX, record_of

from .checks import CODES, ELEMENTS, address_of, check_array, check_floats, plain_address, prepare_threads

if TYPE_CHECKING:
    from hfopt.cache import Appended, Buffers

ROTATIONS = {"none": kernels.NONE, "half": kernels.HALF, "interleaved": kernels.INTERLEAVED}


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    appended: "Appended",
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    rotation: str,
) -> None:
    """Rotate queries in place; write rotated keys, and values, to the cache columns of the new tokens.

    Into a cache of codes they go quantised, after keys have been rotated in place too: what `IndirectCache.update` makes of
    them.

    qkv: [n_rows, n_new, (n_heads + 2 * n_kv_heads) * head_dim], contiguous: heads of queries, then keys,
    then values.
    rotation: "half" turns channels i and i + n_rotary / 2 (https://arxiv.org/abs/2104.09864, in Llama's
        order; cos, sin [1 or
        n_rows, n_new, n_rotary]); "interleaved" turns channels 2i and 2i + 1 (GPT-J; cos, sin [1 or n_rows,
        n_new, n_rotary / 2]); "none" only stores (cos, sin None). Channels from n_rotary on stay. cos, sin:
        float32, bfloat16 or float16.
    Raises `InvalidInput`.
    """
    address, record = check_qkv(qkv, appended, n_heads, n_kv_heads, head_dim)
    if rotation not in ROTATIONS:
        raise InvalidInput(f"rotation is {rotation!r}: {', '.join(map(repr, ROTATIONS))} are allowed")
    n_rows, n_new, _ = qkv.shape
    angles = _NO_ANGLES
    if rotation != "none":
        angles = Angles.of(cos, sin, n_rows, n_new, head_dim, rotation)
    cache, length, start = (
        (appended.suffix, appended.suffix_len, appended.starts[1])
        if appended.in_suffix
        else (appended.prefix, appended.prefix_len, appended.starts[0])
    )
    if cache.shape[1] < n_rows or not n_new <= length - start <= cache.shape[3]:
        raise InvalidInput(
            f"appended ends at column {length - start} of {cache.shape}: "
            f"room for {n_new} tokens of {n_rows} rows is needed"
        )
    if address:
        prepare_threads()
        kernels.rotate_and_store(
            ELEMENTS[qkv.dtype],
            held_by(appended, qkv.dtype),
            address,
            n_rows,
            n_new,
            angles.cos_at,
            angles.sin_at,
            angles.n_rows,
            angles.n_rotary,
            angles.kind,
            n_heads,
            record,
            SUFFIX if appended.in_suffix else PREFIX,
            length - n_new,
        )


def rotate(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, n_heads: int, head_dim: int, rotation: str
) -> None:
    """Turn the first n_heads heads of x [n_rows, n_new, width] in place; arguments as in `rotate_and_store`.

    x may be part of a wider tensor, such as queries beside keys and values: each token contiguous, all as far apart.

    Raises `InvalidInput`.
    """
    if x.ndim != 3 or n_heads < 1 or head_dim < 1 or n_heads * head_dim > x.shape[-1]:
        given = f"{tuple(x.shape)} with {n_heads} heads of {head_dim}"
        raise InvalidInput(f"x has shape {given}: [rows, tokens, width], a width that holds them, is needed")
    if rotation not in ROTATIONS or rotation == "none":
        raise InvalidInput(f"rotation is {rotation!r}: half and interleaved are allowed")
    n_rows, n_new, _ = x.shape
    address, step = plain_address(x, None), x.shape[-1]
    if not address:
        check_floats("x", x)
        address, step = address_of("x", x), _token_step(x)
    angles = Angles.of(cos, sin, n_rows, n_new, head_dim, rotation)
    if x.numel():
        turn(x.dtype, address, n_rows, n_new, step, n_heads, head_dim, angles)


class Angles(NamedTuple):
    """Cosines and sines of tokens that have been checked, as kernels get them."""

    tables: tuple[Tensor, ...]  # which have to be kept alive
    cos_at: int  # address of float32 [n_rows, n_new, n_rotary], or n_rotary / 2 for "interleaved"
    sin_at: int
    n_rows: int  # 1 for the same ones in all
    n_rotary: int
    kind: int  # of `ROTATIONS`

    @classmethod
    def of(
        cls, cos: Tensor | None, sin: Tensor | None, n_rows: int, n_new: int, head_dim: int, rotation: str
    ) -> "Angles":
        """For n_rows rows of n_new tokens, arguments as in `rotate_and_store`; raises `InvalidInput`."""
        cos, cos_at, shape = _angles("cos", cos, n_rows, n_new, head_dim, rotation)
        sin, sin_at, sin_shape = _angles("sin", sin, n_rows, n_new, head_dim, rotation)
        if shape != sin_shape:
            raise InvalidInput(f"sin has shape {tuple(sin_shape)}: that of cos, {tuple(shape)}, is needed")
        n_rotary = shape[2] if rotation == "half" else 2 * shape[2]
        return cls((cos, sin), cos_at, sin_at, shape[0], n_rotary, ROTATIONS[rotation])


_NO_ANGLES = Angles((), 0, 0, 0, 0, kernels.NONE)


def turn(
    dtype: torch.dtype,
    address: int,
    n_rows: int,
    n_new: int,
    step: int,
    n_heads: int,
    head_dim: int,
    angles: Angles,
) -> None:
    """The kernel of `rotate`, for what has been checked: tokens of this dtype at an address, `step` elements apart."""
    prepare_threads()
    _, cos_at, sin_at, n_angle_rows, n_rotary, kind = angles
    kernels.rotate(
        ELEMENTS[dtype],
        address,
        n_rows,
        n_new,
        step,
        n_heads,
        head_dim,
        cos_at,
        sin_at,
        n_angle_rows,
        n_rotary,
        kind,
    )


def _token_step(x: Tensor) -> int:
    """Elements from a token of x [n_rows, n_new, width] to the next; raises `InvalidInput` if they are not as far apart."""
    n_rows, n_new, width = x.shape
    of_row, step, of_channel = x.stride()
    if n_new == 1:
        step = of_row if n_rows > 1 else width
    is_even = n_rows == 1 or of_row == n_new * step
    if x.numel() and not (is_even and step >= width and (of_channel == 1 or width == 1)):
        raise InvalidInput(
            f"x has strides {x.stride()} with shape {tuple(x.shape)}: "
            "tokens that are contiguous, and all as far apart, are needed"
        )
    return step


def check_qkv(
    qkv: Tensor, appended: "Appended", n_heads: int, n_kv_heads: int, head_dim: int, *, stores: bool = True
) -> tuple[int, np.ndarray]:
    """(address of the projections, record of the cache); raises `InvalidInput` unless they and the sizes belong
    together.

    stores: there are keys and values in the projections; else there may be queries alone.
    """
    if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads or head_dim < 1:
        raise InvalidInput(
            f"n_heads = {n_heads}, n_kv_heads = {n_kv_heads}, head_dim = {head_dim}: "
            "positive numbers are needed, n_heads a multiple of n_kv_heads"
        )
    width = (n_heads + 2 * n_kv_heads) * head_dim
    if not stores and qkv.shape[-1:] == (n_heads * head_dim,):
        width = n_heads * head_dim
    address = check_array("qkv", qkv, (len(appended.prefix_row), appended.n_new, width))
    return address, cache_record(appended, qkv.dtype, n_kv_heads, head_dim)


def held_by(appended: "Appended | Buffers", dtype: torch.dtype) -> np.ndarray:
    """What tells a kernel of which type the elements of a cache are."""
    return ELEMENTS[dtype] if appended.prefix_scales is None else CODES


def cache_record(appended: "Appended", dtype: torch.dtype, n_kv_heads: int, head_dim: int) -> np.ndarray:
    """The `kernels.cache_record` of a layer; raises `InvalidInput` unless it has this dtype and these heads."""
    layout = dtype, n_kv_heads, head_dim
    buffers = known_buffers(appended)
    if buffers is None:
        return _checked_record(appended, *layout)
    return record_of_buffers(buffers, *layout)


def record_of_buffers(buffers: "Buffers", dtype: torch.dtype, n_kv_heads: int, head_dim: int) -> np.ndarray:
    """`cache_record`, found once for the buffers of a layer."""
    layout = dtype, n_kv_heads, head_dim
    if buffers.checked != layout:
        buffers.record = _checked_record(buffers, *layout)
        buffers.checked = layout
    record: np.ndarray = buffers.record
    return record


def known_buffers(appended: "Appended") -> Any:
    """Those of a cache, unless `_replace` has put other arrays beside them."""
    buffers = appended.buffers
    if buffers is None or buffers.prefix is not appended.prefix or buffers.suffix is not appended.suffix:
        return None
    if buffers.starts != appended.starts:
        return None
    scales = buffers.prefix_scales, buffers.suffix_scales
    is_same = scales[0] is appended.prefix_scales and scales[1] is appended.suffix_scales
    return buffers if is_same else None


def _checked_record(
    stored: "Appended | Buffers", dtype: torch.dtype, n_kv_heads: int, head_dim: int
) -> np.ndarray:
    bits = held_by(stored, dtype).dtype
    prefix, suffix = stored.prefix, stored.suffix
    prefix_scales, suffix_scales = stored.prefix_scales, stored.suffix_scales
    for name, cache, scales in (("prefix", prefix, prefix_scales), ("suffix", suffix, suffix_scales)):
        shape = cache.shape
        if len(shape) != 5 or shape[0] != 2 or shape[2] != n_kv_heads or shape[4] != head_dim:
            raise InvalidInput(
                f"appended.{name} has shape {shape}: (2, rows, {n_kv_heads}, columns, {head_dim}) is needed"
            )
        if cache.dtype != bits or not cache.flags.c_contiguous:
            raise InvalidInput(f"appended.{name} has dtype {cache.dtype}: contiguous {bits} is needed")
        if bits == CODES.dtype:
            _check_scales(f"appended.{name}_scales", scales, shape[:4])
    if bits != CODES.dtype and suffix_scales is not None:
        raise InvalidInput(f"appended.suffix_scales is given, and no prefix_scales: {bits} has none")
    starts = stored.starts
    if starts[0] < 0 or starts[1] < -suffix.shape[3]:
        raise InvalidInput(f"appended.starts is {starts}: from 0 and {-suffix.shape[3]} on are allowed")
    return record_of(prefix, suffix, prefix_scales, suffix_scales, starts=starts)


def _check_scales(name: str, scales: np.ndarray | None, shape: tuple[int, ...]) -> None:
    if scales is None or scales.shape != shape or scales.dtype != np.float32 or not scales.flags.c_contiguous:
        given = "None" if scales is None else f"{scales.dtype} {scales.shape}"
        raise InvalidInput(f"{name} is {given}: contiguous float32 {shape} is needed")


def _angles(
    name: str, tensor: Tensor | None, n_rows: int, n_new: int, head_dim: int, rotation: str
) -> tuple[Tensor, int, torch.Size]:
    """(contiguous float32 tensor, its address, its shape)."""
    if tensor is None:
        raise InvalidInput(f"{name} is None: rotation {rotation!r} needs it")
    address = plain_address(tensor, torch.float32)
    if not address:
        check_floats(name, tensor)
    shape = tensor.shape
    if len(shape) != 3 or shape[0] not in (1, n_rows) or shape[1] != n_new:
        raise InvalidInput(f"{name} has shape {tuple(shape)}: [1 or {n_rows}, {n_new}, angles] is needed")
    n_rotary = shape[2] if rotation == "half" else 2 * shape[2]
    if n_rotary % 2 or n_rotary > head_dim:
        raise InvalidInput(
            f"{name} has {shape[2]} angles: they turn {n_rotary} channels, "
            f"an even number up to {head_dim} is allowed"
        )
    if not address:
        address_of(name, tensor)
        tensor = tensor.to(torch.float32).contiguous()
        address = tensor.data_ptr()
    return tensor, address, shape
