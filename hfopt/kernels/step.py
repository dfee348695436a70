"""New tokens in one launch: walks the instructions of a program and calls the bodies of the other kernels.

An instruction is a row of int64, [OP, IN, OUT, SIZE, ...] and a float64. IN and OUT are slots: places in the arena, in
bytes a token, of arrays [n_rows n_new, ...], or [n_rows, ...] behind TAKE_LAST. What else there is, is named below by
operation.
"""

from typing import Any, NamedTuple

import numpy as np

from .attention.cache_record import BRANCH, LENGTH, TRUNK
from .attention.cache_view import open_cache, valid_rows
from .attention.decode import attend_rows
from .attention.plan import layout_of
from .attention.prefill import Seen, attend_tokens, most_scratch, plan_tokens
from .jit.launch import launch
from .jit.parallel import body, parallel_for, threads_for
from .linear.quantized import multiply_quantized, quantized_scratch
from .linear.quantized_strip import Quantized
from .linear.rows import ROW_LIMIT, Linear, multiply_rows, rows_scratch
from .linear.tiles import multiply_tiles, tiles_scratch
from .norm import add_row, layer_norm, rms_norm
from .rope import rotate_and_store_rows
from .sampling import argmax
from .simd.pointer import (
    address_as,
    address_of,
    bytes_at,
    floats_at,
    integers_at,
    load_part,
    pointer,
    shifted,
    store_part,
)
from .simd.tile import units_ratio
from .simd.types import LANES

LOOK_UP, ADD_LOOKED_UP, RMS_NORM, LAYER_NORM, LINEAR, ROTATE_AND_STORE, ATTEND, TAKE_LAST = range(8)
QUANTIZED_LINEAR, PERMUTE, MULTIPLY = range(8, 11)
NAMES = (
    "look up", "add looked up", "rms_norm", "layer_norm", "linear", "rotate and store", "attend", "take last",
    "quantized linear", "permute", "multiply",
)  # fmt: skip
OP, IN, OUT, SIZE = range(4)
TABLE, BY = 4, 5  # LOOK_UP (SIZE in bytes) and ADD_LOOKED_UP: number of the table, and TOKENS or POSITIONS
WEIGHT, BIAS = 4, 5  # norms, whose float is eps: addresses, or 0
ORDER = 4  # PERMUTE: address of int64 [SIZE], the places in IN of the values in OUT
MATRICES, N_MATRICES, WIDTH, GATED, CODE, RESIDUALS = range(
    4, 10
)  # LINEAR and its kin: as in `linear.Linear`
LAYER, N_HEADS = 4, 5  # ATTEND, whose float is the scale, and ROTATE_AND_STORE
COS, SIN, N_ROTARY, KIND = range(6, 10)  # ROTATE_AND_STORE: slots of float32, and as in `rope`
COLUMNS = 12
# of quantised layers, in a table of their own with a row for each instruction: as in `quantized.quantized_linear`
SCALING, BITS, GROUP, LEVELS, TERMS = range(5)
FORMAT_COLUMNS = 5
# TAKE_LAST (SIZE in bytes) puts the last token of each row where the first ones are; those behind it are of one token a row
# MULTIPLY: OUT *= IN

_PARALLEL_SIZE = 1 << 16  # values to permute; below, more threads cost more than they save
MOST_RESIDUALS = COLUMNS - RESIDUALS
NONE, LOGITS = -1, -2  # in place of a slot
TOKENS, POSITIONS = range(2)
ADDRESS, N_ROWS = range(2)  # of a table

UNKNOWN_INDEX, UNKNOWN_ROW = 1, 2  # what `run_step` returns

_MANY = np.iinfo(np.int64).max

_rms_norm = body(rms_norm.__wrapped__)
_layer_norm = body(layer_norm.__wrapped__)
_argmax = body(argmax.__wrapped__)


class _Cache(NamedTuple):
    """The cache of all layers."""

    records: Any  # pointer to `cache_record`s, one after the other
    trunk_len: Any
    branch_len: Any
    trunk_row: Any  # pointers to int32
    table: Any
    table_row: Any


@body
def _open(cache, layer, held):
    """A layer of the cache; held: a pointer like those to its elements."""
    record = shifted(cache.records, layer * LENGTH)
    lengths = cache.trunk_len, cache.branch_len
    return open_cache(held, record, *lengths, cache.trunk_row, cache.table, cache.table_row)


@body
def _check(code, tables, ids, n_rows, cache, held):
    """0 if all rows exist that the tokens look up in tables, and rows of the batch in the cache."""
    # layers share the rows that they look up, so those with no fewer than an earlier one need no look
    n_trunk_rows = n_branch_rows = _MANY
    for i in range(code.shape[0]):
        if code[i, OP] == LOOK_UP or code[i, OP] == ADD_LOOKED_UP:
            for token in range(ids.shape[1]):
                index = ids[code[i, BY], token]
                if index < 0 or index >= tables[code[i, TABLE], N_ROWS]:
                    return UNKNOWN_INDEX
        elif code[i, OP] == ATTEND:
            opened = _open(cache, code[i, LAYER], held)
            if opened.trunk.n_rows < n_trunk_rows or opened.branch.n_rows < n_branch_rows:
                if not valid_rows(opened, n_rows):
                    return UNKNOWN_ROW
                n_trunk_rows = min(n_trunk_rows, opened.trunk.n_rows)
                n_branch_rows = min(n_branch_rows, opened.branch.n_rows)
    return 0


@launch
def scratch_bytes(like, code, formats, n_rows, n_new, n_kv_heads, head_dim, threads):
    """Bytes of scratch of the instruction of a program that needs most on so many threads, whatever the context.

    formats: int64 [n, FORMAT_COLUMNS], or without rows if no instruction needs one.
    """
    rows, item_size = pointer(like), 4 // units_ratio(pointer(like))
    most, n = 0, n_rows * n_new
    for i in range(code.shape[0]):
        if code[i, OP] == LINEAR:
            if n <= ROW_LIMIT:
                most = max(most, 4 * rows_scratch(rows, n, code[i, SIZE]))
            else:
                most = max(most, tiles_scratch(rows, n, code[i, SIZE], threads))
        elif code[i, OP] == QUANTIZED_LINEAR:
            most = max(most, 4 * quantized_scratch(n, code[i, SIZE], formats[i, GROUP], formats[i, TERMS]))
        elif code[i, OP] == ATTEND:
            heads = code[i, N_HEADS], n_kv_heads, head_dim
            if n_new == 1:
                most = max(most, layout_of(n_rows, *heads, item_size, threads).n_bytes)
            else:
                most = max(most, most_scratch(rows, n_rows, n_new, *heads, threads))
        elif code[i, OP] == TAKE_LAST:
            n = n_rows
    return most


@body
def _look_up(table, n_bytes, index, target):
    """target = row of a table, of whatever type."""
    source = bytes_at(table + index * n_bytes)
    for k in range(n_bytes):
        target[k] = source[k]


@body
def _permute_row(row, x, order, size, out):
    """out[k] = x[order[k]] in one row."""
    source, target = shifted(x, row * size), shifted(out, row * size)
    for k in range(size):
        target[k] = source[order[k]]


@body
def _multiply(x, count, out):
    """out *= x, rounded."""
    k = 0
    while k < count:
        n = min(count - k, LANES)
        store_part(out, k, n, load_part(out, k, n) * load_part(x, k, n))
        k += LANES


class _Step(NamedTuple):
    """What the instructions share besides the cache."""

    n_rows: Any
    n_new: Any  # tokens of a row
    arena: Any  # address
    tables: Any
    ids: Any
    in_branch: Any
    kind: Any  # of mask
    mask: Any  # address, or 0
    mask_row: Any  # bytes from a row to the next
    scratch: Any  # address
    threads: Any  # that it is made for


@body
def _gather_residuals(code, i, arena, n_tokens, residuals):
    """Writes the addresses of the residuals of a linear layer; returns how many there are."""
    n = 0
    while n < MOST_RESIDUALS and code[i, RESIDUALS + n] != NONE:
        residuals[n] = arena + code[i, RESIDUALS + n] * n_tokens
        n += 1
    return n


@body
def _open_quantized(code, formats, i, residuals, n_residuals, out):
    """A quantised layer."""
    return Quantized(
        code[i, SIZE],
        integers_at(code[i, MATRICES]),
        code[i, N_MATRICES],
        code[i, GATED] != 0,
        code[i, CODE],
        pointer(residuals),
        n_residuals,
        out,
        code[i, WIDTH],
        integers_at(formats[i, SCALING]),
        formats[i, BITS],
        formats[i, GROUP],
        formats[i, LEVELS],
    )


@body
def _walk(like, held, code, quantized, scalars, step, cache, logits):
    """Runs all instructions. Numba leaves out what is only for arguments that are not None."""
    rows, n_rows, n_new, arena, tables = pointer(like), step.n_rows, step.n_new, step.arena, step.tables
    part, last = (BRANCH, cache.branch_len) if step.in_branch else (TRUNK, cache.trunk_len)
    n_tokens = n_rows * n_new
    n = n_tokens  # of which there are rows now
    residuals = np.empty(MOST_RESIDUALS, np.int64)
    for i in range(code.shape[0]):
        op, size = code[i, OP], code[i, SIZE]
        x = arena + code[i, IN] * n_tokens
        out = logits if code[i, OUT] == LOGITS else arena + code[i, OUT] * n_tokens
        if op == LINEAR:
            n_residuals = _gather_residuals(code, i, arena, n_tokens, residuals)
            layer = Linear(
                size,
                integers_at(code[i, MATRICES]),
                code[i, N_MATRICES],
                code[i, GATED] != 0,
                code[i, CODE],
                pointer(residuals),
                n_residuals,
                address_as(out, rows),
                code[i, WIDTH],
            )
            if n <= ROW_LIMIT:
                multiply_rows(address_as(x, rows), n, layer, floats_at(step.scratch))
            else:
                multiply_tiles(address_as(x, rows), n, layer, step.scratch, step.threads)
        elif op == QUANTIZED_LINEAR:
            if quantized is not None:
                n_residuals = _gather_residuals(code, i, arena, n_tokens, residuals)
                packed = _open_quantized(code, quantized, i, residuals, n_residuals, address_as(out, rows))
                terms, room = quantized[i, TERMS], floats_at(step.scratch)
                multiply_quantized(address_as(x, rows), n, packed, terms, room)
        elif op == RMS_NORM:
            _rms_norm(like, x, n, size, 0, code[i, WEIGHT], scalars[i], 0, out)
        elif op == LAYER_NORM:
            _layer_norm(like, x, n, size, 0, code[i, WEIGHT], code[i, BIAS], scalars[i], 0, out)
        elif op == ROTATE_AND_STORE:
            record = shifted(cache.records, code[i, LAYER] * LENGTH)
            cos, sin = floats_at(arena + code[i, COS] * n_tokens), floats_at(arena + code[i, SIN] * n_tokens)
            n_rotary, kind, n_heads = code[i, N_ROTARY], code[i, KIND], code[i, N_HEADS]
            qkv, first = address_as(x, rows), last - n_new
            rotate_and_store_rows(
                qkv, held, n_rows, n_new, cos, sin, n_rows, n_rotary, kind, n_heads, record, part, first
            )
        elif op == ATTEND:
            opened, n_heads = _open(cache, code[i, LAYER], held), code[i, N_HEADS]
            q, target, scale = address_as(x, rows), address_as(out, rows), np.float32(scalars[i])
            if n_new == 1:
                q_row = (n_heads + 2 * opened.n_kv_heads) * opened.size
                hidden, room = (step.mask, step.mask_row), (step.scratch, step.threads)
                attend_rows(opened, q, q_row, n_rows, n_heads, *hidden, scale, *room, target)
            else:
                seen = Seen(step.kind, bytes_at(step.mask), n_new, cache.trunk_len + cache.branch_len)
                plan = plan_tokens(q, opened, n_rows, n_new, n_heads, step.threads)
                attend_tokens(plan, opened, q, n_rows, n_heads, seen, scale, step.scratch, target)
        elif op == TAKE_LAST:
            if n_new > 1:
                for row in range(n_rows):
                    _look_up(x, size, row * n_new + n_new - 1, bytes_at(x + row * size))
            n = n_rows
        elif op == PERMUTE:
            permuted = address_as(x, rows), integers_at(code[i, ORDER]), size, address_as(out, rows)
            parallel_for(_permute_row, threads_for(n, n * size, _PARALLEL_SIZE), n, permuted)
        elif op == MULTIPLY:
            _multiply(address_as(x, rows), n * size, address_as(out, rows))
        else:
            source, indices = tables[code[i, TABLE], ADDRESS], step.ids[code[i, BY]]
            for token in range(n_tokens):
                if op == LOOK_UP:
                    _look_up(source, size, indices[token], bytes_at(out + token * size))
                else:
                    target = shifted(address_as(out, rows), token * size)
                    add_row(target, shifted(address_as(source, rows), indices[token] * size), size, target)
    residuals[0] = 0  # the last use: it must live until here


@body
def _follow(ids, chosen, finished, pad, ends):
    """Lets the chosen tokens be those of the next step, `pad` in finished rows; whether none of the others ends its row."""
    goes_on = True
    for row in range(ids.shape[1]):
        if finished[row]:
            chosen[row] = pad
        else:
            for i in range(ends.shape[0]):
                if chosen[row] == ends[i]:
                    goes_on = False
        ids[TOKENS, row] = chosen[row]
        ids[POSITIONS, row] += 1
    return goes_on


@launch
def run_step(
    like,
    held,
    code,
    quantized,
    scalars,
    n_rows,
    n_new,
    arena,
    scratch,
    threads,
    tables,
    ids,
    records,
    trunk_len,
    branch_len,
    in_branch,
    trunk_row,
    table,
    kind,
    mask,
    logits,
    n_logits,
    chosen,
    finished,
    pad,
    ends,
):
    """Runs a program for n_new tokens in each of n_rows rows; or for one, and again for the tokens that it chooses itself.

    Returns how many times, or -UNKNOWN_INDEX or -UNKNOWN_ROW if the first found that, nothing written.

    Like an array of the element type, float32 or bfloat16 bits, held one of that of the cache, the same, or int8 for codes,
    for which code is compiled of its own; code int64 [n, COLUMNS], scalars float64 [n]; quantized int64 [n, FORMAT_COLUMNS],
    or None without such layers: their code is only compiled for programs that have some; address of the arena and of
    `scratch_bytes` for so many threads, on 64-byte boundaries; tables int64 [n, 2]; ids int64 [2, n_rows n_new]: tokens,
    positions; records int64 [layers, `cache_record`]; lengths the first time, in_branch, trunk_row and table as in
    `cache.Appended`; kind as in `attention_prefill`, of mask, uint8 [n_rows, n_new keys]: empty if order alone hides keys;
    of one new token with the keys of the last time, or more; address of logits [n_rows, n_logits], of the element type,
    those of the last tokens. chosen int64 [n_steps, n_rows]: their `sampling.argmax` each time, or no rows if the logits are
    wanted; behind it `pad` in rows that are finished, bool [n_rows]. The last time is one that chooses any of `ends`, int64
    [n], for another row.
    """
    cached = pointer(held)
    hidden = address_of(pointer(mask)) if mask.size > 0 else 0
    seen = kind, hidden, mask.shape[1]
    step = _Step(n_rows, n_new, arena, tables, ids, in_branch, *seen, scratch, threads)
    n_steps = max(chosen.shape[0], 1)
    for k in range(n_steps):
        in_trunk = 0 if in_branch else k
        cache = _Cache(
            pointer(records),
            trunk_len + in_trunk,
            branch_len + k - in_trunk,
            pointer(trunk_row),
            pointer(table),
            table.shape[1],
        )
        wrong = _check(code, tables, ids, n_rows, cache, cached)
        if wrong != 0:
            return k if k > 0 else -wrong
        _walk(like, cached, code, quantized, scalars, step, cache, logits)
        if chosen.shape[0] > 0:
            _argmax(like, logits, n_rows, n_logits, address_of(pointer(chosen)) + 8 * n_rows * k)
            if not _follow(ids, chosen[k], finished, pad, ends):
                n_steps = k + 1
                break
    return n_steps
