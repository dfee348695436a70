"""Rotary position embedding, fused with the write of new keys and values into the cache."""

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


@body
def rotate_and_store_token(qkv, cos, sin, n_rotary, kind, n_heads, n_kv_heads, size, keys, values, stride):
    """One token: rotates its queries in place; writes keys, rotated, and values, heads `stride` apart."""
    for head in range(n_heads + 2 * n_kv_heads):
        source = shifted(qkv, head * size)
        target = source
        first = 0  # channel from which on nothing turns
        if head >= n_heads + n_kv_heads:
            target = shifted(values, (head - n_heads - n_kv_heads) * stride)
        else:
            first = n_rotary
            if head >= n_heads:
                target = shifted(keys, (head - n_heads) * stride)
            if kind == HALF:
                rotate_half(source, cos, sin, n_rotary, target)
            elif kind == INTERLEAVED:
                rotate_pairs(source, cos, sin, n_rotary, target)
        if head >= n_heads:
            copy_channels(source, first, size, target)


@body
def _token(
    index,
    qkv,
    width,
    n_new,
    cos,
    sin,
    angle_step,
    n_angles,
    n_rotary,
    kind,
    n_heads,
    n_kv_heads,
    size,
    keys,
    to_values,
    columns,
):
    row = index // n_new
    token = index - row * n_new
    angle = row * angle_step + token * n_angles
    key = shifted(keys, (row * n_kv_heads * columns + token) * size)
    rotate_and_store_token(
        shifted(qkv, index * width),
        shifted(cos, angle),
        shifted(sin, angle),
        n_rotary,
        kind,
        n_heads,
        n_kv_heads,
        size,
        key,
        shifted(key, to_values),
        columns * size,
    )


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
    angle_step = n_new * n_angles if n_angle_rows > 1 else 0
    arguments = (
        qkv,
        width,
        n_new,
        cos,
        sin,
        angle_step,
        n_angles,
        n_rotary,
        kind,
        n_heads,
        n_kv_heads,
        size,
        shifted(address_as(record[part + ADDRESS], qkv), first * size),
        record[part + ROWS] * n_kv_heads * columns * size,
        columns,
    )
    parallel_for(_token, threads_for(n_tokens, n_tokens * width, _PARALLEL_SIZE), n_tokens, arguments)


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
