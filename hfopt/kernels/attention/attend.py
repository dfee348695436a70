"""Attention of the new tokens of a step, one or several a row."""

from typing import NamedTuple

import numpy as np

from hfopt.kernels.attention.cache_record import LENGTH, PREFIX, ROWS, SUFFIX
from hfopt.kernels.attention.cache_view import holds, open_cache, valid_rows
from hfopt.kernels.attention.decode import attend_rows
from hfopt.kernels.attention.plan import layout_of, steps_alike
from hfopt.kernels.attention.prefill import attend_tokens, most_scratch, plan_tokens
from hfopt.kernels.attention.scoring import Scoring, skipped_keys
from hfopt.kernels.attention.seen import Seen
from hfopt.kernels.instruction import UNKNOWN_ROW, Instruction, read_fields
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.simd.memory import load_scalar
from hfopt.kernels.simd.pointer import address_as, address_of, bytes_at, floats_at, shifted
from hfopt.kernels.simd.tile import units_ratio


class _Attend(NamedTuple):
    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    softcap: int  # bits of float32; the others as in `Scoring`
    slopes: int
    sinks: int
    window: int
    ranked: int


_SOFTCAP = _Attend._fields.index("softcap")


@body
def _open(cache, layer, held, skipped, n_later):
    """A layer of the cache without the last n_later tokens; held: a pointer like those to its elements."""
    record = shifted(cache.records, layer * LENGTH)
    in_prefix = n_later if cache.part == PREFIX else 0
    lengths = cache.prefix_len - in_prefix, cache.suffix_len - (n_later - in_prefix)
    return open_cache(held, record, *lengths, cache.prefix_row, cache.table, cache.table_row, skipped)


@body
def _check(held, own, step):
    """0 if the layer has the rows of the cache that those of the batch name, and the tokens that new ones see."""
    own, cache = read_fields(own, _Attend), step.cache
    record = shifted(cache.records, own.layer * LENGTH)
    skipped = skipped_keys(own.window, cache.prefix_len + cache.suffix_len, step.n_new)
    if not holds(record, cache.prefix_len, skipped):
        return UNKNOWN_ROW
    # one with no fewer rows than another before it, which is looked at as well, needs no look
    for layer in range(own.layer):
        other = shifted(cache.records, layer * LENGTH)
        if other[PREFIX + ROWS] <= record[PREFIX + ROWS] and other[SUFFIX + ROWS] <= record[SUFFIX + ROWS]:
            return 0
    # all of them: a layer behind this one may see more
    return 0 if valid_rows(_open(cache, own.layer, held, 0, 0), step.n_rows) else UNKNOWN_ROW


@body
def _run(like, held, operands, step):
    own, cache, n_rows = read_fields(operands.own, _Attend), step.cache, step.n_rows
    n_new = operands.n // n_rows  # one where only the last tokens go on
    n_keys, n_heads = cache.prefix_len + cache.suffix_len, own.n_heads
    softcap = load_scalar(floats_at(address_of(shifted(operands.own, _SOFTCAP))), 0)
    scoring = Scoring(np.float32(operands.scalar), softcap, own.slopes, own.sinks, own.window, own.ranked)
    q, out = address_as(operands.x, like), address_as(operands.out, like)
    q_row, out_row = operands.size, n_heads * own.head_dim
    before = 0 if step.n_last > 1 else (step.n_new - n_new) * n_keys
    if n_new == 1 or step.n_last > 1:
        token = 0
        while token < n_new:  # as many as may be at once, each in the bits of a step
            n_later = n_new - 1 - token
            skipped = skipped_keys(own.window, n_keys - n_later, 1)
            opened, n = _open(cache, own.layer, held, skipped, n_later), 1
            if n_later > 0 and skipped_keys(own.window, n_keys, 1) == 0:
                sizes = n_heads, own.n_kv_heads, own.head_dim, 4 // units_ratio(q), step.threads
                n = steps_alike(opened, n_rows, layout_of(n_rows, n_new, *sizes, False).chunk, n_later + 1)
                opened = _open(cache, own.layer, held, skipped, n_later + 1 - n)
            mask = step.mask + before + skipped if step.mask != 0 else 0
            seen, scratch = (mask, step.mask_row), (step.scratch, step.threads)
            rows = shifted(q, token * q_row), n_new * q_row, q_row, n_rows, n, n_heads
            target = shifted(out, token * out_row), n_new * out_row, out_row
            attend_rows(opened, *rows, *seen, scoring, *scratch, *target, False)
            token += n
    else:
        skipped = skipped_keys(own.window, n_keys, n_new)
        opened = _open(cache, own.layer, held, skipped, 0)
        mask = step.mask + before + skipped if step.mask != 0 else 0
        shown = Seen(step.kind, bytes_at(mask), n_keys, n_new, n_keys - skipped, own.window, 0)
        plan = plan_tokens(q, opened, n_rows, n_new, n_heads, step.threads)
        attend_tokens(plan, opened, q, q_row, n_rows, n_heads, shown, scoring, step.scratch, out)


@body
def _scratch_bytes(like, own, format, sizes):
    own = read_fields(own, _Attend)
    heads = own.n_heads, own.n_kv_heads, own.head_dim
    n_new = sizes.n // sizes.n_rows
    if n_new == 1 or sizes.n_last > 1:
        item_size = 4 // units_ratio(like)
        return layout_of(sizes.n_rows, n_new, *heads, item_size, sizes.threads, False).n_bytes
    return most_scratch(like, sizes.n_rows, n_new, *heads, sizes.threads)


# IN has SIZE values a token, queries first; the scalar is the scale
ATTEND = Instruction("attend", _Attend._fields, _run, _scratch_bytes, _check)
