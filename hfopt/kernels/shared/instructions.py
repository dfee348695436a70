"""What processes that have a model together do in the middle of a program."""

from typing import NamedTuple

import numpy as np

from hfopt.kernels.embedding import TABLE_ADDRESS, TABLE_FIELDS, TABLE_ROWS
from hfopt.kernels.instruction import UNKNOWN_INDEX, Group, Instruction, read_fields
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.move import copy_bytes
from hfopt.kernels.sampling import find_largest
from hfopt.kernels.shared.collectives import all_gather, all_reduce, arg_max
from hfopt.kernels.shared.member import DONE, NOT_YET, member_at
from hfopt.kernels.simd.constants import LOWEST
from hfopt.kernels.simd.memory import load_scalar
from hfopt.kernels.simd.pointer import (
    address_as,
    address_of,
    bytes_at,
    integers_at,
    item_bytes,
    pointer,
    shifted,
)

# ---- collectives ------------------------------------------------------------------------------------------------------


@body
def _sum(like, group, x, n):
    """The sum of n elements at x, unless a collective before has not been done."""
    group = read_fields(group, Group)
    status = integers_at(group.status)
    if status[0] == DONE:
        found = NOT_YET
        while found == NOT_YET:
            found = all_reduce(like, group.member, x, n)
        status[0] = found


@body
def _all_reduce(like, held, operands, step):
    _sum(like, step.group, operands.x, operands.n * operands.size)


# IN = the sum of the IN of all processes, SIZE values
ALL_REDUCE = Instruction("all-reduce", (), _all_reduce, needs_group=True)


class _Gather(NamedTuple):
    pieces: int  # address of int64 [n_pieces, 3]: first value in IN, in OUT, and how many
    n_pieces: int
    width: int  # values of OUT


@body
def _clear(n_bytes, target):
    target = bytes_at(target)
    for k in range(n_bytes):
        target[k] = 0


@body
def _gather(like, held, operands, step):
    own, n, size = read_fields(operands.own, _Gather), operands.n, operands.size * item_bytes(like)
    group = read_fields(step.group, Group)
    status = integers_at(group.status)
    if own.n_pieces == 1 and operands.size * member_at(group.member).size == own.width:
        if status[0] == DONE:
            found = NOT_YET
            while found == NOT_YET:
                found = all_gather(group.member, operands.x, n, size, operands.out)
            status[0] = found
        return
    # what others have is 0 here
    item, pieces = item_bytes(like), integers_at(own.pieces)
    _clear(n * own.width * item, operands.out)
    for row in range(n):
        x, out = operands.x + row * size, operands.out + row * own.width * item
        for k in range(own.n_pieces):
            piece = shifted(pieces, 3 * k)
            copy_bytes(x + piece[0] * item, piece[2] * item, out + piece[1] * item)
    _sum(like, step.group, operands.out, n * own.width)


@body
def is_one_piece(own, width):
    """Whether a gather gives `width` values, of which each process has some that follow each other."""
    own = read_fields(own, _Gather)
    return own.n_pieces == 1 and own.width == width


@body
def choose(like, group, operands, chosen):
    """chosen[r] = `sampling.argmax` of the row that a gather of one piece would give, int64, without the gather."""
    own, size = read_fields(operands.own, _Gather), operands.size * item_bytes(like)
    group = read_fields(group, Group)
    pieces, status = integers_at(own.pieces), integers_at(group.status)
    values = np.empty(operands.n, np.float32)
    first, place, n = pieces[0], pieces[1], pieces[2]
    for row in range(operands.n):
        x = address_as(operands.x + row * size + first * item_bytes(like), like)
        values[row], chosen[row] = LOWEST, place
        if n > 0:
            find_largest(x, 1, n, shifted(chosen, row))
            values[row] = load_scalar(x, chosen[row])
            chosen[row] += place
    if status[0] == DONE:
        found = NOT_YET
        while found == NOT_YET:
            found = arg_max(group.member, address_of(pointer(values)), address_of(chosen), operands.n)
        status[0] = found


# OUT = IN, SIZE values, of all processes side by side
GATHER = Instruction("gather", _Gather._fields, _gather, needs_group=True)


# ---- parts ------------------------------------------------------------------------------------------------------------


class _TakePart(NamedTuple):
    first: int  # value
    width: int  # values of IN


@body
def _take_part(like, held, operands, step):
    own, size = read_fields(operands.own, _TakePart), operands.size * item_bytes(like)
    source = operands.x + own.first * item_bytes(like)
    for row in range(operands.n):
        copy_bytes(source + row * own.width * item_bytes(like), size, operands.out + row * size)


# OUT = SIZE values of IN, from `first` on
TAKE_PART = Instruction("take part", _TakePart._fields, _take_part, needs_group=True)


class _LookUpPart(NamedTuple):
    table: int  # its number
    by: int  # TOKENS or POSITIONS
    first: int  # of the rows of all processes that it has
    n_all: int  # rows of all processes


@body
def _check(held, own, step):
    """0 if a table of some process has a row for each token."""
    own = read_fields(own, _LookUpPart)
    for token in range(step.n_tokens):
        index = step.ids[own.by * step.n_tokens + token]
        if index < 0 or index >= own.n_all:
            return UNKNOWN_INDEX
    return 0


@body
def _look_up_part(like, held, operands, step):
    own, size = read_fields(operands.own, _LookUpPart), operands.size
    table = shifted(step.tables, own.table * TABLE_FIELDS)
    indices = shifted(step.ids, own.by * step.n_tokens)
    for token in range(step.n_tokens):
        place, target = indices[token] - own.first, operands.out + token * size
        if place < 0 or place >= table[TABLE_ROWS]:
            _clear(size, target)
        else:
            copy_bytes(table[TABLE_ADDRESS] + place * size, size, target)


# OUT = a row of the table, SIZE bytes of whatever type, or 0 for those of other processes
LOOK_UP_PART = Instruction("embedding", _LookUpPart._fields, _look_up_part, check=_check, needs_group=True)
