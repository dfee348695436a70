"""What low-rank adapters add to a linear layer: out += B (scale A x), with other matrices in each row, or several, or none.

A x is made by `lora.shrink`. B v is made of whole rows of B: most adapters meet few tokens here, for which turning columns,
as `lora.expand_rows` does for many, takes longer. The tables say which matrices: they may be others in each request, so the
instruction of a program has no more than a number, by which it finds its rows in the tables of the request:

    ranges  int64 [places, n_rows, 2]: the first term of a row, and how many there are
    terms   int64 [n, TERM_FIELDS], see `Term`
    pieces  int64 [n, PIECE_FIELDS], see `Piece`: all columns of out, in order

Adapters may be float32 whatever the activations are, which is what peft makes of them; x is widened once for those.
"""

from typing import Any, NamedTuple

from hfopt.kernels.instruction import Instruction, read_fields
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.linear.blocks import gather_residuals
from hfopt.kernels.lora import RANKS, shrink
from hfopt.kernels.simd.constants import ZERO
from hfopt.kernels.simd.memory import load, load_part, load_scalar, prefetch, store, store_part
from hfopt.kernels.simd.pointer import (
    address_as,
    address_of,
    floats_at,
    integers_at,
    item_bytes,
    pointer,
    shifted,
)
from hfopt.kernels.simd.tile import stack_addresses, stack_floats, sum_rows
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import splat

_PARALLEL_SIZE = 1 << 15  # multiply-adds, or values to widen; below, more threads cost more than they save


class Term(NamedTuple):
    """One adapter of one matrix."""

    a: int  # address of [rank, size]
    b: int  # address of [outputs, rank]
    rank: int
    wide: int  # both are float32, else of the type of x
    scale: int  # bits of float32
    part: int  # number of the matrix among those whose outputs lie side by side
    place: int  # of A x among the numbers of a token, a multiple of 16


class Piece(NamedTuple):
    """Outputs of one matrix that follow each other."""

    column: int  # of the first one in out
    width: int
    part: int  # the matrix
    first: int  # row of B


_AHEAD = 2  # blocks of rows of B that are asked for in advance
TERM_FIELDS, PIECE_FIELDS = len(Term._fields), len(Piece._fields)
_SCALE, _PART = Term._fields.index("scale"), Term._fields.index("part")


class Deltas(NamedTuple):
    """Addresses of the tables of a request, and of room for A x: float32, `room_row` for each token. 0: no adapters."""

    ranges: int
    terms: int
    room: int
    room_row: int


class _Rows(NamedTuple):
    """The tokens of a layer, and where their terms are."""

    x: Any  # pointers
    wide_x: Any  # the same as float32, if a term needs it
    n: Any
    per_row: Any  # tokens of a row
    size: Any
    ranges: Any  # pointer to those of this layer, or to anything if there are no adapters
    terms: Any
    room: Any
    room_row: Any
    n_rows: Any  # 0 without adapters


class _Out(NamedTuple):
    """Where results go."""

    out: Any
    width: Any
    pieces: Any
    residuals: Any  # pointer to the addresses of arrays like out
    n_residuals: Any


@body
def _term(rows, i):
    return read_fields(shifted(rows.terms, i * TERM_FIELDS), Term)


@body
def _range(rows, row):
    """(first term of a row, the one behind its last)."""
    if row >= rows.n_rows:
        return 0, 0
    return rows.ranges[2 * row], rows.ranges[2 * row] + rows.ranges[2 * row + 1]


@body
def _groups(rows, row):
    """Tasks of `_shrink_task` for a token of a row."""
    first, end = _range(rows, row)
    n = 0
    for i in range(first, end):
        n += (_term(rows, i).rank + RANKS - 1) // RANKS
    return n


@body
def _widen_row(row, x, size, out):
    source, target = shifted(x, row * size), shifted(out, row * size)
    for k in range(0, size, LANES):
        n = min(size - k, LANES)
        store_part(target, k, n, load_part(source, k, n))


@body
def _shrink_task(task, rows, n_groups):
    """RANKS numbers of A x of one token."""
    token, group = task // n_groups, task % n_groups
    first, end = _range(rows, token // rows.per_row)
    size = rows.size
    for i in range(first, end):
        term = _term(rows, i)
        n = (term.rank + RANKS - 1) // RANKS
        if group < n:
            begin = group * RANKS
            v = shifted(rows.room, token * rows.room_row + term.place + begin)
            scale = load_scalar(floats_at(address_of(shifted(rows.terms, i * TERM_FIELDS + _SCALE))), 0)
            count = min(term.rank - begin, RANKS)
            if term.wide != 0:
                a = shifted(floats_at(term.a), begin * size)
                shrink(shifted(rows.wide_x, token * size), a, size, size, count, scale, v)
            else:
                a = shifted(address_as(term.a, rows.x), begin * size)
                shrink(shifted(rows.x, token * size), a, size, size, count, scale, v)
            break
        group -= n


@body
def _dot_rows(b, rank, count, v, tile):
    """16 products of rows of B with v, float32; those behind the first `count`, 1 to 16, are of no use."""
    value = splat(ZERO)
    for k in range(0, rank, LANES):
        n = min(rank - k, LANES)
        part = load_part(v, k, n)
        for j in range(LANES):
            row = shifted(b, min(j, count - 1) * rank + k)
            prefetch(row, _AHEAD * LANES * rank)
            store(tile, j * LANES, (load(row, 0) if n == LANES else load_part(row, 0, n)) * part)
        value = value + sum_rows(tile)
    return value


@body
def _piece_of(out, block):
    """(piece, first of 16 columns in it) of a block."""
    p = 0
    piece = read_fields(out.pieces, Piece)
    while block >= (piece.width + LANES - 1) // LANES:
        block -= (piece.width + LANES - 1) // LANES
        p += 1
        piece = read_fields(shifted(out.pieces, p * PIECE_FIELDS), Piece)
    return piece, block * LANES


@body
def _expand_task(block, rows, out):
    """16 outputs of all tokens."""
    tile = stack_floats(16 * 16)
    piece, begin = _piece_of(out, block)
    count, row_of_b = min(piece.width - begin, LANES), piece.first + begin
    for row in range(rows.n // rows.per_row):
        first, end = _range(rows, row)
        if first == end and out.n_residuals == 0:
            continue
        for token in range(row * rows.per_row, (row + 1) * rows.per_row):
            place = token * out.width + piece.column + begin
            value = load_part(out.out, place, count)
            for i in range(first, end):
                if rows.terms[i * TERM_FIELDS + _PART] == piece.part:
                    term = _term(rows, i)
                    v, at = shifted(rows.room, token * rows.room_row + term.place), row_of_b * term.rank
                    if term.wide != 0:
                        value = value + _dot_rows(shifted(floats_at(term.b), at), term.rank, count, v, tile)
                    else:
                        b = shifted(address_as(term.b, rows.x), at)
                        value = value + _dot_rows(b, term.rank, count, v, tile)
            for r in range(out.n_residuals):
                value = value + load_part(address_as(out.residuals[r], out.out), place, count)
            store_part(out.out, place, count, value)


@body
def _add(rows, out, n_pieces):
    """out += what the adapters of each row give, and the residuals."""
    n_groups, is_wide = 0, False
    for row in range(rows.n_rows):
        n_groups = max(n_groups, _groups(rows, row))
        first, end = _range(rows, row)
        for i in range(first, end):
            is_wide = is_wide or _term(rows, i).wide != 0
    n, size = rows.n, rows.size
    if is_wide:
        parallel_for(_widen_row, threads_for(n, n * size, _PARALLEL_SIZE), n, (rows.x, size, rows.wide_x))
    if n_groups > 0:
        n_tasks = n * n_groups
        threads = threads_for(n_tasks, n_tasks * RANKS * size, _PARALLEL_SIZE)
        parallel_for(_shrink_task, threads, n_tasks, (rows, n_groups))
    if n_groups > 0 or out.n_residuals > 0:
        n_blocks = 0
        for p in range(n_pieces):
            n_blocks += (read_fields(shifted(out.pieces, p * PIECE_FIELDS), Piece).width + LANES - 1) // LANES
        threads = threads_for(n_blocks, n * (n_groups + 1) * RANKS * out.width, _PARALLEL_SIZE)
        parallel_for(_expand_task, threads, n_blocks, (rows, out))


@body
def wide_bytes(like, n, size):
    """Of x as float32."""
    return 4 * n * size if item_bytes(like) < 4 else 0


@launch
def add_deltas(
    like, x, n, n_rows, size, ranges, terms, room, room_row, wide_x, pieces, residuals, out, width
):
    """out += what the adapters of each row give for x, and the residuals; rounded once.

    Addresses of x [n, size] and out [n, width] of the type of `like`, n / n_rows tokens a row; tables as above, of a place;
    addresses of room, float32 [n, room_row], and of as many float32 as x has; residuals int64 addresses of arrays like out.
    """
    x = address_as(x, pointer(like))
    tables = pointer(ranges), pointer(terms), floats_at(room), room_row
    rows = _Rows(x, floats_at(wide_x), n, n // n_rows, size, *tables, n_rows)
    target = _Out(address_as(out, x), width, pointer(pieces), pointer(residuals), residuals.shape[0])
    _add(rows, target, pieces.shape[0])


# ---- the instruction --------------------------------------------------------------------------------------------------


class _Own(NamedTuple):
    place: int  # in the tables of the request
    pieces: int  # address
    n_pieces: int
    width: int
    residual: int  # slots, or NONE
    second_residual: int


@body
def _run(like, held, operands, step):
    own, n = read_fields(operands.own, _Own), operands.n
    deltas = read_fields(step.deltas, Deltas)
    residuals = stack_addresses(2)
    n_residuals = gather_residuals(own, step, residuals)
    x = address_as(operands.x, like)
    n_rows = 0 if deltas.ranges == 0 else step.n_rows
    ranges = shifted(integers_at(deltas.ranges), own.place * 2 * n_rows)
    tables = ranges, integers_at(deltas.terms), floats_at(deltas.room), deltas.room_row
    rows = _Rows(x, floats_at(step.scratch), n, n // step.n_rows, operands.size, *tables, n_rows)
    out = _Out(address_as(operands.out, like), own.width, integers_at(own.pieces), residuals, n_residuals)
    _add(rows, out, own.n_pieces)


@body
def _scratch_bytes(like, own, format, sizes):
    return wide_bytes(like, sizes.n, sizes.size)


# OUT += what the adapters of the request give for IN, SIZE values a token, and the residuals
ADD_DELTAS = Instruction("adapters", _Own._fields, _run, _scratch_bytes)
