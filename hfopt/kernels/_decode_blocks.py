"""The blocks of keys and values of a chunk of decode attention, and which rows see the same ones.

Blocks of 16 keys are read where they are, if they follow each other and all are seen. Others (those of the
branch, and those of which a mask hides some) are gathered first, without what is hidden, so that NaN or Inf
there cannot reach a result.
"""

import numpy as np

from ._attention_cache import key_of
from ._attention_pack import copy_row
from ._decode_tile import BLOCK, address_of, seen_keys, set_address
from ._parallel import body, inlined
from ._pointer import as_units, bytes_at, load, shifted, store
from ._simd import LANES
from ._tile import units_ratio
from ._vector import splat

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@body
def seen_of(problem, place, first, count):
    """Bits of `count` <= 16 keys, those that the row at a place sees; first: token number of the first."""
    if problem.mask == 0:
        return (1 << count) - 1
    return seen_keys(bytes_at(problem.mask), problem.order[place] * problem.mask_row + first, count)


@body
def _hold(source, n, size, target, padded):
    """n rows of `size` elements as rows of `padded` elements, with zeros behind them."""
    if size == padded:
        units, held = as_units(source, source), as_units(target, target)
        for k in range(0, n * padded // units_ratio(source), LANES):
            store(held, k, load(units, k))
    else:
        for i in range(n):
            copy_row(shifted(source, i * size), size, _ONE, shifted(target, i * padded), padded)


@inlined
def list_blocks(problem, item, place, first, n, keys, values, room):
    """Addresses of blocks of those of n keys from token `first` of an item's segment on that the row at a place sees.

    Returns how many keys these are, and writes hidden ones nowhere. room: for copies of n keys and values.
    """
    cache, size, padded = problem.cache, problem.cache.size, problem.padded
    segment, in_trunk, p, kv_head = item.segment, item.in_trunk, item.row, item.kv_head
    start = first if in_trunk else cache.trunk.n_tokens + first
    held_values = shifted(room, problem.plan.chunk * padded)
    n_blocks = 0
    n_held = 0
    for t in range(0, n, BLOCK):
        count = min(n - t, BLOCK)
        seen = seen_of(problem, place, start + t, count)
        if in_trunk and size == padded and seen == (1 << BLOCK) - 1:
            key = key_of(segment, p, kv_head, first + t, size)
            set_address(keys, n_blocks, address_of(key))
            set_address(values, n_blocks, address_of(shifted(key, segment.to_values)))
            n_blocks += 1
        else:
            together = count if in_trunk and seen == (1 << count) - 1 else 1
            for token in range(first + t, first + t + count, together):
                if seen >> (token - first - t) & 1:
                    row = p if in_trunk else cache.table[problem.order[place] * cache.table_row + token]
                    key = key_of(segment, row, kv_head, token, size)
                    _hold(key, together, size, shifted(room, n_held * padded), padded)
                    value = shifted(key, segment.to_values)
                    _hold(value, together, size, shifted(held_values, n_held * padded), padded)
                    n_held += together
    n_seen = n_blocks * BLOCK + n_held
    n_copied = n_held
    n_held = (n_held + BLOCK - 1) // BLOCK * BLOCK
    # scores of no key are overwritten, but values have a weight of 0
    for k in range(n_copied * padded, n_held * padded, LANES):
        store(held_values, k, splat(_ZERO))
    for t in range(0, n_held, BLOCK):
        set_address(keys, n_blocks, address_of(shifted(room, t * padded)))
        set_address(values, n_blocks, address_of(shifted(held_values, t * padded)))
        n_blocks += 1
    return n_seen


@inlined
def rows_alike(problem, begin, end, first, n):
    """Whether the rows at places begin ... end see the same ones of n keys."""
    alike = True
    if problem.mask != 0:
        for t in range(first, first + n, BLOCK):
            count = min(first + n - t, BLOCK)
            seen = seen_of(problem, begin, t, count)
            for place in range(begin + 1, end):
                alike &= seen_of(problem, place, t, count) == seen
    return alike
