"""Attention of the new tokens of a step, one or several a row."""

from typing import NamedTuple

import numpy as np

from hfopt.kernels.attention.cache_record import LENGTH, PREFIX, ROWS, SUFFIX
from hfopt.kernels.attention.cache_view import open_cache, valid_rows
from hfopt.kernels.attention.decode import attend_rows
from hfopt.kernels.attention.plan import layout_of
from hfopt.kernels.attention.prefill import attend_tokens, most_scratch, plan_tokens
from hfopt.kernels.attention.scoring import Scoring
from hfopt.kernels.attention.seen import Seen
from hfopt.kernels.instruction import UNKNOWN_ROW, Instruction, read_fields
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.simd.memory import load_scalar
from hfopt.kernels.simd.pointer import address_as, address_of, bytes_at, floats_at, shifted
from hfopt.kernels.simd.tile import units_ratio


class _Attend(NamedTuple):
    layer: int
    n_heads: int
    softcap: int  # bits of float32; the others as in `Scoring`
    slopes: int
    sinks: int
    window: int


_SOFTCAP = _Attend._fields.index("softcap")


@body
def _open(cache, layer, held):
    """A layer of the cache; held: a pointer like those to its elements."""
    record = shifted(cache.records, layer * LENGTH)
    lengths = cache.prefix_len, cache.suffix_len
    return open_cache(held, record, *lengths, cache.prefix_row, cache.table, cache.table_row)


@body
def _check(held, own, step):
    """0 if the layer has the rows of the cache that those of the batch name."""
    own, cache = read_fields(own, _Attend), step.cache
    opened = _open(cache, own.layer, held)
    # one with no fewer rows than another before it, which is looked at as well, needs no look
    for layer in range(own.layer):
        other = shifted(cache.records, layer * LENGTH)
        if other[PREFIX + ROWS] <= opened.prefix.n_rows and other[SUFFIX + ROWS] <= opened.suffix.n_rows:
            return 0
    return 0 if valid_rows(opened, step.n_rows) else UNKNOWN_ROW


@body
def _run(like, held, operands, step):
    own, cache, n_rows, n_new = read_fields(operands.own, _Attend), step.cache, step.n_rows, step.n_new
    opened, n_heads = _open(cache, own.layer, held), own.n_heads
    softcap = load_scalar(floats_at(address_of(shifted(operands.own, _SOFTCAP))), 0)
    scoring = Scoring(np.float32(operands.scalar), softcap, own.slopes, own.sinks, own.window)
    q, out = address_as(operands.x, like), address_as(operands.out, like)
    if n_new == 1:
        q_row = (n_heads + 2 * opened.n_kv_heads) * opened.size
        mask, scratch = (step.mask, step.mask_row), (step.scratch, step.threads)
        attend_rows(opened, q, q_row, n_rows, n_heads, *mask, scoring, *scratch, out)
    else:
        seen = Seen(step.kind, bytes_at(step.mask), n_new, cache.prefix_len + cache.suffix_len, own.window)
        plan = plan_tokens(q, opened, n_rows, n_new, n_heads, step.threads)
        attend_tokens(plan, opened, q, n_rows, n_heads, seen, scoring, step.scratch, out)


@body
def _scratch_bytes(like, own, format, sizes):
    own = read_fields(own, _Attend)
    heads = own.n_heads, sizes.n_kv_heads, sizes.head_dim
    if sizes.n_new == 1:
        return layout_of(sizes.n_rows, *heads, 4 // units_ratio(like), sizes.threads).n_bytes
    return most_scratch(like, sizes.n_rows, sizes.n_new, *heads, sizes.threads)


# the scalar is the scale
ATTEND = Instruction("attend", _Attend._fields, _run, _scratch_bytes, _check)
