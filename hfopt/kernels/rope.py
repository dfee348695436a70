"""Rotary position embedding, fused with the write of new keys and values into the cache."""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.attention.cache_record import (
    ADDRESS,
    COLUMNS,
    HEAD_DIM,
    KV_HEADS,
    LENGTH,
    ROWS,
    SCALES,
    START,
)
from hfopt.kernels.attention.pack import absmax
from hfopt.kernels.attention.tile import where_up_to
from hfopt.kernels.instruction import Instruction, read_fields
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.simd.constants import LARGEST, NAN, ZERO
from hfopt.kernels.simd.memory import load, load_part, store, store_codes, store_part, store_scalar
from hfopt.kernels.simd.pointer import address_as, floats_at, pointer, pointer_as, scales_at, shifted
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import absolute, doubled, fence, fma, rotated_pairs, splat

NONE, HALF, INTERLEAVED = range(3)

_PARALLEL_SIZE = 1 << 15  # elements; below, more threads cost more than they save
_MAX = 127  # of the size of a code
_STEP = np.float32(1 / _MAX)


@body
def copy_channels(x, first, last, out):
    """out[first:last] = x[first:last]."""
    k = first
    while k + LANES <= last:
        store(out, k, load(x, k))
        k += LANES
    if k < last:
        store_part(out, k, last - k, load_part(x, k, last - k))


@body
def rotate_half(x, cos, sin, n_rotary, out):
    """Channels i and i + n_rotary / 2 turn by the angles of which cos and sin hold n_rotary; out may be x."""
    half = n_rotary // 2
    k = 0
    while k + LANES <= half:
        low, high = load(x, k), load(x, half + k)
        store(out, k, low * load(cos, k) - high * load(sin, k))
        store(out, half + k, fma(high, load(cos, half + k), low * load(sin, half + k)))
        k += LANES
    count = half - k
    if count > 0:
        low, high = load_part(x, k, count), load_part(x, half + k, count)
        turned_low = low * load_part(cos, k, count) - high * load_part(sin, k, count)
        turned_high = fma(high, load_part(cos, half + k, count), low * load_part(sin, half + k, count))
        store_part(out, k, count, turned_low)
        store_part(out, half + k, count, turned_high)


@body
def rotate_pairs(x, cos, sin, n_rotary, out):
    """Channels 2i and 2i + 1 turn by angle i of n_rotary / 2; out may be x."""
    k = 0
    while k + LANES <= n_rotary:
        c = doubled(load_part(cos, k // 2, LANES // 2))
        s = doubled(load_part(sin, k // 2, LANES // 2))
        value = load(x, k)
        store(out, k, fma(value, c, rotated_pairs(value) * s))
        k += LANES
    count = n_rotary - k
    if count > 0:
        c = doubled(load_part(cos, k // 2, count // 2))
        s = doubled(load_part(sin, k // 2, count // 2))
        value = load_part(x, k, count)
        store_part(out, k, count, fma(value, c, rotated_pairs(value) * s))


@body
def quantise(x, size, codes, scale):
    """`cache.codes.quantised` of one vector; pointers to where its codes and its scale go."""
    most = absmax(x, size)
    factor, step = ZERO, NAN
    if most <= LARGEST:
        # in float64, whose quotients no flag of the compiler makes approximate
        factor = np.float32(min(np.float64(_MAX) / np.float64(most), np.float64(LARGEST)))
        step = most * _STEP
    for k in range(0, size, LANES):
        value = load(x, k) if k + LANES <= size else load_part(x, k, size - k)
        value = where_up_to(absolute(value), splat(LARGEST), value, splat(ZERO))
        store_codes(codes, k, min(size - k, LANES), fence(value * splat(factor)))
    store_scalar(scale, 0, step)


class _Batch(NamedTuple):
    """New tokens and where they go; sizes and steps in elements."""

    qkv: Any  # pointers to the first token's
    cos: Any
    sin: Any
    keys: Any
    width: Any  # of qkv
    n_new: Any  # tokens of a row
    n_angles: Any  # of a token
    angle_step: Any  # from a row to the next
    n_rotary: Any
    kind: Any
    n_heads: Any
    n_kv_heads: Any
    size: Any  # channels of a head
    to_values: Any  # from a key to its value
    columns: Any  # of the cache
    first_scale: Any  # place of the scale of the first key
    to_value_scales: Any


@body
def _token(index, batch, scales):
    """One token: rotates its queries in place; writes keys, rotated, and values.

    scales: of the cache, if it holds codes, else None. Keys too are rotated in place, and then quantised.
    """
    row = index // batch.n_new
    token = index - row * batch.n_new
    angle = row * batch.angle_step + token * batch.n_angles
    cos, sin = shifted(batch.cos, angle), shifted(batch.sin, angle)
    n_heads, n_kv_heads, size, n_rotary = batch.n_heads, batch.n_kv_heads, batch.size, batch.n_rotary
    stride = batch.columns * size
    keys = shifted(batch.keys, row * n_kv_heads * stride + token * size)
    values = shifted(keys, batch.to_values)
    for head in range(n_heads + 2 * n_kv_heads):
        source = shifted(batch.qkv, index * batch.width + head * size)
        target = source
        first = 0  # channel from which on nothing turns
        if head >= n_heads + n_kv_heads:
            if scales is None:
                target = pointer_as(shifted(values, (head - n_heads - n_kv_heads) * stride), source)
        else:
            first = n_rotary
            if head >= n_heads and scales is None:
                target = pointer_as(shifted(keys, (head - n_heads) * stride), source)
            if batch.kind == HALF:
                rotate_half(source, cos, sin, n_rotary, target)
            elif batch.kind == INTERLEAVED:
                rotate_pairs(source, cos, sin, n_rotary, target)
        if head >= n_heads:
            if scales is None:
                copy_channels(source, first, size, target)
            else:
                place = batch.first_scale + row * n_kv_heads * batch.columns + token
                codes, number = keys, head - n_heads
                if number >= n_kv_heads:
                    codes, number, place = values, number - n_kv_heads, place + batch.to_value_scales
                scale = shifted(scales, place + number * batch.columns)
                quantise(source, size, shifted(codes, number * stride), scale)


@body
def rotate_and_store_rows(
    qkv, held, n_rows, n_new, cos, sin, n_angle_rows, n_rotary, kind, n_heads, record, part, first
):
    """Rotates the queries of qkv in place; writes rotated keys, and values, of n_new tokens a row to
    places from `first` on of a part of the `cache_record`, PREFIX or SUFFIX.

    Pointers to qkv [n_rows, n_new, (n_heads + 2 n_kv_heads) size], floats; to the record; and to cos, sin
    float32 [n_angle_rows = 1 or n_rows, n_new, n_rotary], or n_rotary / 2 for INTERLEAVED; n_rotary 0 for NONE. held: a
    pointer like those to elements of the cache, the type of qkv, or codes, for which keys are rotated in place too.
    """
    n_kv_heads, size, columns = record[KV_HEADS], record[HEAD_DIM], record[part + COLUMNS]
    column = first - record[part + START]
    width = (n_heads + 2 * n_kv_heads) * size
    n_tokens = n_rows * n_new
    n_angles = n_rotary // 2 if kind == INTERLEAVED else n_rotary
    batch = _Batch(
        qkv,
        cos,
        sin,
        shifted(address_as(record[part + ADDRESS], held), column * size),
        width,
        n_new,
        n_angles,
        n_new * n_angles if n_angle_rows > 1 else 0,
        n_rotary,
        kind,
        n_heads,
        n_kv_heads,
        size,
        record[part + ROWS] * n_kv_heads * columns * size,
        columns,
        column,
        record[part + ROWS] * n_kv_heads * columns,
    )
    scales = scales_at(record[part + SCALES], held)
    parallel_for(_token, threads_for(n_tokens, n_tokens * width, _PARALLEL_SIZE), n_tokens, (batch, scales))


@launch
def rotate_and_store(
    like, held, qkv, n_rows, n_new, cos, sin, n_angle_rows, n_rotary, kind, n_heads, record, part, first
):
    """`rotate_and_store_rows` of addresses of qkv, of the type of `like`, and of cos, sin; record: int64.

    held: an array of the element type of the cache.
    """
    rotate_and_store_rows(
        address_as(qkv, pointer(like)),
        pointer(held),
        n_rows,
        n_new,
        floats_at(cos),
        floats_at(sin),
        n_angle_rows,
        n_rotary,
        kind,
        n_heads,
        pointer(record),
        part,
        first,
    )


# ---- without a cache --------------------------------------------------------------------------------------------------


class _Heads(NamedTuple):
    """Heads at the beginning of each token, and their angles."""

    width: Any  # elements of a token
    n_heads: Any
    size: Any  # channels of a head
    n_new: Any  # tokens of a row
    n_angles: Any  # of a token
    angle_step: Any  # from a row to the next
    n_rotary: Any
    kind: Any


@body
def _rotate_token(index, x, cos, sin, heads):
    row = index // heads.n_new
    angle = row * heads.angle_step + (index - row * heads.n_new) * heads.n_angles
    cos, sin = shifted(cos, angle), shifted(sin, angle)
    for head in range(heads.n_heads):
        here = shifted(x, index * heads.width + head * heads.size)
        if heads.kind == HALF:
            rotate_half(here, cos, sin, heads.n_rotary, here)
        elif heads.kind == INTERLEAVED:
            rotate_pairs(here, cos, sin, heads.n_rotary, here)


@body
def rotate_rows(x, n_rows, n_new, width, n_heads, size, cos, sin, n_angle_rows, n_rotary, kind):
    """Turns the first n_heads heads of each token of x [n_rows, n_new, width] in place; angles as in
    `rotate_and_store_rows`."""
    n_tokens = n_rows * n_new
    n_angles = n_rotary // 2 if kind == INTERLEAVED else n_rotary
    angle_step = n_new * n_angles if n_angle_rows > 1 else 0
    heads = _Heads(width, n_heads, size, n_new, n_angles, angle_step, n_rotary, kind)
    threads = threads_for(n_tokens, n_tokens * n_heads * size, _PARALLEL_SIZE)
    parallel_for(_rotate_token, threads, n_tokens, (x, cos, sin, heads))


@launch
def rotate(like, x, n_rows, n_new, width, n_heads, size, cos, sin, n_angle_rows, n_rotary, kind):
    """`rotate_rows` of addresses of x, of the type of `like`, and of cos, sin."""
    x, angles = address_as(x, pointer(like)), (floats_at(cos), floats_at(sin), n_angle_rows, n_rotary, kind)
    rotate_rows(x, n_rows, n_new, width, n_heads, size, *angles)


# ---- instructions -------------------------------------------------------------------------------------------------


class _RotateAndStore(NamedTuple):
    layer: int
    n_heads: int
    cos: int  # slots of float32
    sin: int
    n_rotary: int
    kind: int


@body
def _run(like, held, operands, step):
    own, cache = read_fields(operands.own, _RotateAndStore), step.cache
    record = shifted(cache.records, own.layer * LENGTH)
    cos, sin = (
        floats_at(step.arena + own.cos * step.n_tokens),
        floats_at(step.arena + own.sin * step.n_tokens),
    )
    rotate_and_store_rows(
        address_as(operands.x, like),
        held,
        step.n_rows,
        step.n_new,
        cos,
        sin,
        step.n_rows,
        own.n_rotary,
        own.kind,
        own.n_heads,
        record,
        cache.part,
        cache.first,
    )


ROTATE_AND_STORE = Instruction("rotate and store", _RotateAndStore._fields, _run)


class _Rotate(NamedTuple):
    width: int
    n_heads: int
    cos: int  # slots of float32
    sin: int
    n_rotary: int
    kind: int


@body
def _run_rotate(like, held, operands, step):
    own = read_fields(operands.own, _Rotate)
    cos = floats_at(step.arena + own.cos * step.n_tokens)
    sin = floats_at(step.arena + own.sin * step.n_tokens)
    heads = own.width, own.n_heads, operands.size
    x, angles = address_as(operands.x, like), (cos, sin, step.n_rows, own.n_rotary, own.kind)
    rotate_rows(x, step.n_rows, operands.n // step.n_rows, *heads, *angles)


# in IN, whose heads have SIZE channels
ROTATE = Instruction("rotate", _Rotate._fields, _run_rotate)
