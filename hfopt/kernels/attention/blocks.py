"""The blocks of keys and values of a chunk of decode attention, and which rows see the same ones.

Blocks of 16 keys are read where they are, if they follow each other and all are seen. Others (those of the suffix of a
layer, those of which a mask hides some, and those that are widened) are gathered first, without what is hidden, so that
NaN or Inf there cannot reach a result. The scales of codes are gathered in any case, in the order of the keys.
"""

import numpy as np
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.attention.cache_view import key_of, names_keys, scale_of
from hfopt.kernels.attention.elements import BLOCK
from hfopt.kernels.attention.lanes import seen_keys, set_address
from hfopt.kernels.attention.pack import copy_row
from hfopt.kernels.attention.scoring import RANKED, first_seen
from hfopt.kernels.jit.parallel import body, inlined
from hfopt.kernels.simd.constants import ONE, ZERO
from hfopt.kernels.simd.emit import stack_block
from hfopt.kernels.simd.memory import bfloat16, copy_codes, load, load_part, prefetch, store, store_part
from hfopt.kernels.simd.pointer import address_of, as_units, bytes_at, item_bytes, shifted
from hfopt.kernels.simd.tile import units_ratio
from hfopt.kernels.simd.types import F32, LANES
from hfopt.kernels.simd.vector import lane_numbers, splat

MAX_KEYS = 256  # of a chunk; also a literal in `chunk`, in the sizes of stacks


@body
def first_of(problem, place, row, step):
    """Where that of a place begins, in what has elements `row` from a row to the next and `step` from a step to the next."""
    return problem.order[place // problem.n_steps] * row + place % problem.n_steps * step


@body
def query_of(problem, kv_head, number):
    """Pointer to a query of a key head, numbered over all places."""
    place, member = number // problem.group, number % problem.group
    head = kv_head * problem.group + member
    first = first_of(problem, place, problem.q_row, problem.q_step)
    return shifted(problem.q, first + head * problem.cache.size)


@body
def seen_of(problem, place, first, count):
    """Bits of `count` <= 16 keys, those that the row at a place sees; first: token number of the first."""
    behind = max(min(_last_key(problem, place) + 1 - first, count), 0)
    seen = (1 << behind) - 1
    if problem.mask == 0:
        return seen
    return (
        seen_keys(bytes_at(problem.mask), first_of(problem, place, problem.mask_row, 0) + first, count) & seen
    )


@body
def _last_key(problem, place):
    """The last key of the step that the row at a place makes."""
    return problem.n_keys - problem.n_steps + place % problem.n_steps


@body
def origin_of(problem, place):
    """The first key that the row at a place sees."""
    if problem.mask == 0:
        return 0
    first = first_of(problem, place, problem.mask_row, 0)
    return first_seen(bytes_at(problem.mask), first, _last_key(problem, place) + 1)


@intrinsic
def stack_factors(typingctx, scales):
    """Room on the stack of the calling body for the scales of a chunk, float32 [4, MAX_KEYS]: of the listed keys, of their
    values, and of those of both that were copied; None for None.
    """
    result = types.none if scales is types.none else types.CPointer(types.float32)

    def codegen(context, builder, sig, args):
        if result is types.none:
            return context.get_dummy_value()
        block = stack_block(builder, F32, 4 * MAX_KEYS)
        block.align = 64
        return builder.bitcast(block, F32.as_pointer())

    return result(scales), codegen


@body
def _copy_factors(scales, to_values, n, factors):
    """n <= 16 scales of keys, and of their values."""
    store_part(factors, 0, n, load_part(scales, 0, n))
    store_part(factors, MAX_KEYS, n, load_part(scales, to_values, n))


@body
def _hold(source, scales, n, size, target, padded):
    """n rows of `size` elements as rows of `padded` elements, with zeros behind them; scales: None if they are no codes."""
    if scales is not None:
        for i in range(n):
            for k in range(0, padded, LANES):
                here, there = shifted(source, i * size + k), shifted(target, i * padded + k)
                copy_codes(here, max(min(size - k, LANES), 0), there)
    elif size == padded and item_bytes(source) * units_ratio(source) == 4:
        units, held = as_units(source, source), as_units(target, target)
        for k in range(0, n * padded // units_ratio(source), LANES):
            store(held, k, load(units, k))
    else:
        for i in range(n):
            copy_row(shifted(source, i * size), size, ONE, shifted(target, i * padded), padded)


@body
def _distances_from(problem, first):
    """Of 16 keys that follow each other."""
    distances = lane_numbers() + splat(np.float32(first))
    return bfloat16(distances) if problem.scoring.ranked == RANKED else distances


@body
def _follow_each_other(problem, segment, place, token, count):
    """Whether keys of the suffix from a token on do in memory, for the row at a place."""
    if not names_keys(segment, problem.cache.size):
        return False
    rows = shifted(problem.cache.table, problem.order[place] * problem.cache.table_row + token)
    wrong = 0
    for i in range(1, count):
        wrong |= rows[i] ^ rows[0]
    return wrong == 0


@inlined
def list_blocks(
    problem, item, scales, place, first, n, following, to_next, keys, values, aheads, room, factors, distances
):
    """Addresses of blocks of those of n keys from token `first` of an item's segment on that the row at a place sees.

    Returns how many keys these are, and writes hidden ones nowhere. following: the `Following` in the suffix; to_next: bytes
    from values to what is read next, if all blocks are in one row; aheads: of each block. room: for copies of n keys and
    values. scales: those of the segment; factors: see `stack_factors`. distances: room for those of the keys from the last
    key of the row, and of as many that were copied, or their ranks from its first key on; left alone where no score depends
    on them.
    """
    cache, size, padded = problem.cache, problem.cache.size, problem.padded
    segment, in_prefix, p, kv_head = item.segment, item.in_prefix, item.row, item.kv_head
    start = first if in_prefix else cache.prefix.n_tokens + first
    held_values = shifted(room, problem.plan.chunk * padded)
    held_distances = shifted(distances, MAX_KEYS)
    has_distances = problem.scoring.slopes != 0
    origin = _last_key(problem, place)
    if problem.scoring.ranked == RANKED:
        origin = origin_of(problem, place)
    nearest = start - origin
    n_blocks = 0
    n_held = 0
    is_held = item_bytes(segment.keys) == item_bytes(room)
    for t in range(0, n, BLOCK):
        count = min(n - t, BLOCK)
        seen = seen_of(problem, place, start + t, count)
        follow = in_prefix
        if not in_prefix and seen == (1 << count) - 1:
            p = cache.table[problem.order[place] * cache.table_row + first + t]
            follow = _follow_each_other(problem, segment, place, first + t, count)
        if follow and is_held and size == padded and seen == (1 << BLOCK) - 1:
            key = key_of(segment, p, kv_head, first + t, size)
            set_address(keys, n_blocks, address_of(key))
            set_address(values, n_blocks, address_of(shifted(key, segment.to_values)))
            ahead = to_next
            later = following.first + t
            if not in_prefix and later < following.end:
                row = cache.table[problem.order[following.place] * cache.table_row + later]
                ahead = address_of(key_of(segment, row, following.kv_head, later, size))
                ahead -= address_of(shifted(key, segment.to_values))
            set_address(aheads, n_blocks, ahead)
            if scales is not None:
                here = shifted(scales, scale_of(segment, p, kv_head, first + t))
                _copy_factors(here, segment.to_value_scales, BLOCK, shifted(factors, n_blocks * BLOCK))
                prefetch(here, problem.plan.chunk)
                prefetch(here, segment.to_value_scales + problem.plan.chunk)
            if has_distances:
                store(distances, n_blocks * BLOCK, _distances_from(problem, nearest + t))
            n_blocks += 1
        else:
            together = count if follow and seen == (1 << count) - 1 else 1
            for token in range(first + t, first + t + count, together):
                if seen >> (token - first - t) & 1:
                    row = p if in_prefix else cache.table[problem.order[place] * cache.table_row + token]
                    key = key_of(segment, row, kv_head, token, size)
                    _hold(key, scales, together, size, shifted(room, n_held * padded), padded)
                    value = shifted(key, segment.to_values)
                    _hold(value, scales, together, size, shifted(held_values, n_held * padded), padded)
                    if scales is not None:
                        here = shifted(scales, scale_of(segment, row, kv_head, token))
                        held_factors = shifted(factors, 2 * MAX_KEYS + n_held)
                        _copy_factors(here, segment.to_value_scales, together, held_factors)
                    if has_distances:
                        store(held_distances, n_held, _distances_from(problem, nearest + token - first))
                    n_held += together
    n_seen = n_blocks * BLOCK + n_held
    n_copied = n_held
    n_held = (n_held + BLOCK - 1) // BLOCK * BLOCK
    # scores of no key are overwritten, but values have a weight of 0
    if scales is not None:
        for k in range(n_copied * padded, n_held * padded, LANES):
            copy_codes(held_values, 0, shifted(held_values, k))
        store_part(factors, 3 * MAX_KEYS + n_copied, n_held - n_copied, splat(ZERO))
    else:
        for k in range(n_copied * padded, n_held * padded, LANES):
            store(held_values, k, splat(ZERO))
    for t in range(0, n_held, BLOCK):
        if scales is not None:
            held_factors = shifted(factors, 2 * MAX_KEYS + t)
            _copy_factors(held_factors, MAX_KEYS, BLOCK, shifted(factors, n_blocks * BLOCK))
        if has_distances:
            store(distances, n_blocks * BLOCK, load(held_distances, t))
        set_address(keys, n_blocks, address_of(shifted(room, t * padded)))
        set_address(values, n_blocks, address_of(shifted(held_values, t * padded)))
        set_address(aheads, n_blocks, to_next)
        n_blocks += 1
    return n_seen


@inlined
def rows_alike(problem, begin, end, first, n):
    """Whether the rows at places begin ... end see the same ones of n keys, at the same ranks if scores depend on these."""
    if problem.n_steps > 1:  # those of one row, see `plan.steps_alike`
        return first + n <= problem.n_keys - problem.n_steps + 1 and problem.scoring.slopes == 0
    alike = True
    if problem.mask != 0:
        if problem.scoring.ranked == RANKED:
            for place in range(begin + 1, end):
                alike &= origin_of(problem, place) == origin_of(problem, begin)
        for t in range(first, first + n, BLOCK):
            count = min(first + n - t, BLOCK)
            seen = seen_of(problem, begin, t, count)
            for place in range(begin + 1, end):
                alike &= seen_of(problem, place, t, count) == seen
    return alike
