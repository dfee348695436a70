"""Rotary position embedding, fused with the write of new keys and values into the cache."""

from typing import Any, NamedTuple

from ._jit import launch
from ._parallel import body, parallel_for, threads_for
from ._pointer import address_as, floats_at, load, load_part, pointer, shifted, store, store_part
from ._simd import LANES
from ._vector import doubled, fma, rotated_pairs
from .cache_record import ADDRESS, COLUMNS, HEAD_DIM, KV_HEADS, ROWS

NONE, HALF, INTERLEAVED = range(3)

_PARALLEL_SIZE = 1 << 15  # elements; below, more threads cost more than they save


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


@body
def _token(index, batch):
    """One token: rotates its queries in place; writes keys, rotated, and values."""
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
            target = shifted(values, (head - n_heads - n_kv_heads) * stride)
        else:
            first = n_rotary
            if head >= n_heads:
                target = shifted(keys, (head - n_heads) * stride)
            if batch.kind == HALF:
                rotate_half(source, cos, sin, n_rotary, target)
            elif batch.kind == INTERLEAVED:
                rotate_pairs(source, cos, sin, n_rotary, target)
        if head >= n_heads:
            copy_channels(source, first, size, target)


@body
def rotate_and_store_rows(
    qkv, n_rows, n_new, cos, sin, n_angle_rows, n_rotary, kind, n_heads, record, part, first
):
    """Rotates the queries of qkv in place; writes rotated keys, and values, of n_new tokens a row to
    columns from `first` on of a part of the `cache_record`, TRUNK or BRANCH.

    Pointers to qkv [n_rows, n_new, (n_heads + 2 n_kv_heads) size], float32 or bfloat16 bits as the cache; to the record;
    and to cos, sin float32 [n_angle_rows = 1 or n_rows, n_new, n_rotary], or n_rotary / 2 for INTERLEAVED; n_rotary 0
    for NONE.
    """
    n_kv_heads, size, columns = record[KV_HEADS], record[HEAD_DIM], record[part + COLUMNS]
    width = (n_heads + 2 * n_kv_heads) * size
    n_tokens = n_rows * n_new
    n_angles = n_rotary // 2 if kind == INTERLEAVED else n_rotary
    batch = _Batch(
        qkv,
        cos,
        sin,
        shifted(address_as(record[part + ADDRESS], qkv), first * size),
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
    )
    parallel_for(_token, threads_for(n_tokens, n_tokens * width, _PARALLEL_SIZE), n_tokens, (batch,))


@launch
def rotate_and_store(
    like, qkv, n_rows, n_new, cos, sin, n_angle_rows, n_rotary, kind, n_heads, record, part, first
):
    """`rotate_and_store_rows` of addresses of qkv, of the type of `like`, and of cos, sin; record: int64."""
    rotate_and_store_rows(
        address_as(qkv, pointer(like)),
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
