"""Rows of tables, looked up for each token."""

from typing import NamedTuple

from hfopt.kernels.elementwise import add_row
from hfopt.kernels.instruction import UNKNOWN_INDEX, Instruction, read_fields
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.move import copy_bytes
from hfopt.kernels.simd.pointer import address_as, shifted

TOKENS, POSITIONS = range(2)
TABLE_ADDRESS, TABLE_ROWS = range(2)
TABLE_FIELDS = 2


class _LookUp(NamedTuple):
    table: int  # its number
    by: int  # TOKENS or POSITIONS


@body
def _check(held, own, step):
    """0 if the table has a row for each token."""
    own = read_fields(own, _LookUp)
    n_table_rows = step.tables[own.table * TABLE_FIELDS + TABLE_ROWS]
    for token in range(step.n_tokens):
        index = step.ids[own.by * step.n_tokens + token]
        if index < 0 or index >= n_table_rows:
            return UNKNOWN_INDEX
    return 0


@body
def _look_up(like, held, operands, step):
    own, size = read_fields(operands.own, _LookUp), operands.size
    source = step.tables[own.table * TABLE_FIELDS + TABLE_ADDRESS]
    indices = shifted(step.ids, own.by * step.n_tokens)
    for token in range(step.n_tokens):
        copy_bytes(source + indices[token] * size, size, operands.out + token * size)


@body
def _add_looked_up(like, held, operands, step):
    own, size = read_fields(operands.own, _LookUp), operands.size
    source = address_as(step.tables[own.table * TABLE_FIELDS + TABLE_ADDRESS], like)
    indices, out = shifted(step.ids, own.by * step.n_tokens), address_as(operands.out, like)
    for token in range(step.n_tokens):
        target = shifted(out, token * size)
        add_row(target, shifted(source, indices[token] * size), size, target)


# OUT = a row of the table, SIZE bytes of whatever type
LOOK_UP = Instruction("embedding", _LookUp._fields, _look_up, check=_check)
# OUT += a row of the table
ADD_LOOKED_UP = Instruction("add embedding", _LookUp._fields, _add_looked_up, check=_check)
