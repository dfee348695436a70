"""Moves of values between places, which round nothing."""

from typing import NamedTuple

from hfopt.kernels.instruction import Instruction, read_fields
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.simd.pointer import address_as, bytes_at, integers_at, shifted

_PARALLEL_SIZE = 1 << 16  # values to permute; below, more threads cost more than they save


@body
def copy_bytes(source, n_bytes, target):
    """n_bytes between two addresses, in order: they may overlap if the target comes first."""
    source, target = bytes_at(source), bytes_at(target)
    for k in range(n_bytes):
        target[k] = source[k]


# ---- the last token of each row ---------------------------------------------------------------------------------------


@body
def _take_last(like, held, operands, step):
    size, n_new = operands.size, step.n_new
    if n_new > step.n_last:
        for row in range(step.n_rows):
            last = operands.x + (row * n_new + n_new - 1) * size
            copy_bytes(last, size, operands.x + row * size)


# Puts the last token of each row, SIZE bytes, where the first ones are, unless all are wanted; instructions behind it are
# PER_ROW.
TAKE_LAST = Instruction("take last", (), _take_last)


# ---- another order ----------------------------------------------------------------------------------------------------


class _Permute(NamedTuple):
    order: int  # address of int64 [SIZE], the places in IN of the values in OUT


@body
def _permute_row(row, x, order, size, out):
    """out[k] = x[order[k]] in one row."""
    source, target = shifted(x, row * size), shifted(out, row * size)
    for k in range(size):
        target[k] = source[order[k]]


@body
def _permute(like, held, operands, step):
    own, n, size = read_fields(operands.own, _Permute), operands.n, operands.size
    x, out = address_as(operands.x, like), address_as(operands.out, like)
    threads = threads_for(n, n * size, _PARALLEL_SIZE)
    parallel_for(_permute_row, threads, n, (x, integers_at(own.order), size, out))


PERMUTE = Instruction("permute", _Permute._fields, _permute)
