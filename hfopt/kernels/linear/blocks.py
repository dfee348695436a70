"""Blocks of linear layers, and their epilogue: y = epilogue(x W^T + b) over one or several weight matrices in one launch.

The matrices stay where the model has them, `[out, in]` row-major; a launch gets their addresses in a table of int64,
one row a matrix: (weight address, bias address or 0, out features, first output column).

A *block* is 16 output columns of one matrix, with `gated` the same 16 columns of both matrices. Each output value is
summed by one thread in a fixed order, so the bits do not depend on the number of threads.
"""

from typing import Any, NamedTuple

from hfopt.kernels.instruction import NONE
from hfopt.kernels.jit.parallel import body, inlined
from hfopt.kernels.linear.activation import activate
from hfopt.kernels.simd.memory import load_part, store, store_part
from hfopt.kernels.simd.pointer import address_as, item_bytes, shifted
from hfopt.kernels.simd.types import LANES

WEIGHT, BIAS, SIZE, COLUMN = range(4)
_FIELDS = 4


class Linear(NamedTuple):
    """The matrices of a layer, and what becomes of the sums over their rows."""

    size: Any  # features of x
    table: Any  # pointer to int64 [n_matrices, 4]
    n_matrices: Any
    gated: Any
    code: Any  # from `activation`
    residuals: Any  # pointer to the addresses of arrays like out
    n_residuals: Any
    out: Any  # pointer to [rows, width]
    width: Any


class Columns(NamedTuple):
    """The output columns of a block."""

    count: Any  # 16, or fewer at the end of a matrix
    bias: Any  # address of the first one's, or 0
    gate_bias: Any
    place: Any  # of the first one in a row of out


@body
def field_of(layer, matrix, field):
    """A number in the table of matrices."""
    return layer.table[matrix * _FIELDS + field]


@body
def blocks_of(layer, matrix):
    """Blocks of a matrix."""
    return (field_of(layer, matrix, SIZE) + LANES - 1) // LANES


@body
def count_blocks(layer):
    """Number of blocks."""
    if layer.gated:
        return blocks_of(layer, 0)
    blocks = 0
    for matrix in range(layer.n_matrices):
        blocks += blocks_of(layer, matrix)
    return blocks


@body
def find_block(layer, index):
    """(matrix, first row in it) of the index-th block; with `gated` the second matrix."""
    if layer.gated:
        return 1, index * LANES
    matrix = 0
    while index >= blocks_of(layer, matrix):
        index -= blocks_of(layer, matrix)
        matrix += 1
    return matrix, index * LANES


@body
def weight_rows(layer, matrix, first):
    """Pointer to the rows of a matrix from `first` on."""
    return shifted(address_as(field_of(layer, matrix, WEIGHT), layer.out), first * layer.size)


@body
def _offset(address, count, like):
    """address + count elements of `like`, 0 staying 0."""
    if address == 0:
        return address
    return address + count * item_bytes(like)


@body
def columns_of(layer, matrix, first):
    """The columns of the block that starts at a row of a matrix."""
    count = min(field_of(layer, matrix, SIZE) - first, LANES)
    bias = _offset(field_of(layer, matrix, BIAS), first, layer.out)
    gate_bias = _offset(field_of(layer, 0, BIAS), first, layer.out)
    place = first if layer.gated else field_of(layer, matrix, COLUMN) + first
    return Columns(count, bias, gate_bias, place)


def _finish(layer, columns, row, value, gate):
    """Epilogue of a block in one row: bias, activation, gate, residuals, rounding, store.

    `value` belongs to the only matrix, or with `gated` to the second one, and `gate` to the first.
    """
    out, count = layer.out, columns.count
    place = row * layer.width + columns.place
    if columns.bias != 0:
        value = value + load_part(address_as(columns.bias, out), 0, count)
    if layer.gated:
        if columns.gate_bias != 0:
            gate = gate + load_part(address_as(columns.gate_bias, out), 0, count)
        value = activate(gate, layer.code) * value
    else:
        value = activate(value, layer.code)
    for r in range(layer.n_residuals):
        value = value + load_part(address_as(layer.residuals[r], out), place, count)
    if count == LANES:
        store(out, place, value)
    else:
        store_part(out, place, count, value)


finish = body(_finish)
# the same where many rows make it dear to hand over a layer; bits may be others, as those of many rows are
finish_inlined = inlined(_finish)


# ---- instructions ----------------------------------------------------------------------------------------------------


class LinearColumns(NamedTuple):
    """Columns of an instruction with such a layer."""

    matrices: int  # address of the table
    n_matrices: int
    width: int
    gated: int
    code: int
    residual: int  # slots, or NONE
    second_residual: int


RESIDUALS = ("residual", "second_residual")


@body
def gather_residuals(own, step, residuals):
    """Writes the addresses of the residuals of an instruction; returns how many there are."""
    n = 0
    if own.residual != NONE:
        residuals[0] = step.arena + own.residual * step.n_tokens
        n = 1
        if own.second_residual != NONE:
            residuals[1] = step.arena + own.second_residual * step.n_tokens
            n = 2
    return n
