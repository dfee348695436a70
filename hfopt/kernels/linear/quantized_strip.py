"""Strips of quantised weights: blocks that a register tile of `quantized_tile` multiplies together; their epilogue."""

from typing import Any, NamedTuple

from hfopt.kernels.jit.parallel import body
from hfopt.kernels.linear.blocks import WEIGHT, blocks_of, columns_of, count_blocks, field_of, finish
from hfopt.kernels.linear.quantized_tile import FEW_BLOCKS, MORE_BLOCKS, Steps, quantized_tile
from hfopt.kernels.simd.integer_dot import UNIT
from hfopt.kernels.simd.memory import load, prefetch
from hfopt.kernels.simd.pointer import floats_at, shifted
from hfopt.kernels.simd.types import LANES

SCALES, ZEROS, ROW_SCALES = range(3)
_FIELDS = 3


class Quantized(NamedTuple):
    """As `blocks.Linear`, where the table has the addresses of codes, and what the codes mean."""

    size: Any
    table: Any
    n_matrices: Any
    gated: Any
    code: Any
    residuals: Any
    n_residuals: Any
    out: Any
    width: Any
    scaling: Any  # pointer to int64 [n_matrices, 3]: addresses of scales or 0, of zero points or 0, of scales of rows
    bits: Any  # 8 or 4
    group: Any  # inputs with a scale in common, or 0
    levels: Any  # address of 16 bytes that 4-bit codes are indices into, or 0


@body
def scaling_of(layer, matrix, field):
    return layer.scaling[matrix * _FIELDS + field]


@body
def zero_point(layer):
    """That of all codes, or 1 where each group has its own."""
    if scaling_of(layer, 0, ZEROS) != 0:
        return 1
    return 128 if layer.bits == 8 or layer.levels != 0 else 8


@body
def _shift(group, x_group):
    """log2 of the groups of x in one of the weights; 62 where those have none."""
    if group == 0:
        return 62
    shift = 0
    while group > x_group << shift:
        shift += 1
    return shift


class _Strip(NamedTuple):
    """Blocks that a tile works on together: of one matrix, or with `gated` as many of both."""

    matrix: Any  # the first one's
    block: Any  # the first one
    count: Any  # panels
    blocks: Any  # of a tile, which may be more: then some are worked on twice


class _Operands(NamedTuple):
    """The strip of weights that tiles multiply."""

    w: Any  # addresses of codes, scales, zero points, levels
    steps: Any  # of codes, scales, zero points
    length: Any  # units of a group of x
    n_units: Any
    shift: Any
    ahead: Any


def _dot_of(kind):
    """The body that multiplies a tile of rows with codes of a kind of `quantized_tile`; tiles are made for literals."""

    @body
    def dot(x, rows, o, part, to):
        steps, part = o.steps, (*part, o.length, o.n_units, o.shift, o.ahead)
        if rows == 1:
            quantized_tile(x, o.w, steps, part, to, 1, FEW_BLOCKS, kind)
        elif rows == 2:
            quantized_tile(x, o.w, steps, part, to, 2, FEW_BLOCKS, kind)
        elif rows == 4:
            quantized_tile(x, o.w, steps, part, to, 4, MORE_BLOCKS, kind)
        elif rows == 8:
            quantized_tile(x, o.w, steps, part, to, 8, MORE_BLOCKS, kind)
        else:
            quantized_tile(x, o.w, steps, part, to, 12, MORE_BLOCKS, kind)

    return dot


_dot_codes, _dot_nibbles, _dot_levels = (_dot_of(kind) for kind in range(3))


@body
def _panels_of(layer, blocks):
    """Panels of a strip."""
    return blocks // 2 if layer.gated else blocks


@body
def count_strips(layer, blocks):
    """Number of strips of so many blocks."""
    if layer.gated:
        size = _panels_of(layer, blocks)
        return (count_blocks(layer) + size - 1) // size
    strips = 0
    for matrix in range(layer.n_matrices):
        strips += (blocks_of(layer, matrix) + blocks - 1) // blocks
    return strips


@body
def find_strip(layer, index, blocks):
    if layer.gated:
        size = _panels_of(layer, blocks)
        first = index * size
        return _Strip(0, first, min(size, count_blocks(layer) - first), blocks)
    matrix = 0
    while index >= (blocks_of(layer, matrix) + blocks - 1) // blocks:
        index -= (blocks_of(layer, matrix) + blocks - 1) // blocks
        matrix += 1
    first = index * blocks
    return _Strip(matrix, first, min(blocks, blocks_of(layer, matrix) - first), blocks)


@body
def _place_in(layer, strip, panel, half):
    """Which of the blocks of a tile is the first or second one of a panel of a strip; see `_steps`."""
    if layer.gated:
        return 2 * panel + half
    return panel if panel < 2 else panel + strip.blocks - strip.count


@body
def _steps(layer, strip, one, other):
    """`Steps` where a block has `one` bytes and the second matrix is `other` bytes behind the first."""
    if layer.gated:
        far = one if strip.count > 1 else 0
        return Steps(other, far, strip.blocks // 2 * one)
    near = one if strip.count > 1 else 0
    return Steps(near, max(strip.count - 2, 0) * one, strip.blocks * one)


@body
def operands_of(rows, layer, strip, ahead):
    """What tiles multiply with a strip."""
    per_unit = 4 if layer.bits == 8 else 8
    n_units = (layer.size + per_unit - 1) // per_unit
    n_groups = 1 if layer.group == 0 else layer.size // layer.group
    matrix, block = strip.matrix, strip.block
    codes, scales, zeros = (
        field_of(layer, matrix, WEIGHT),
        scaling_of(layer, matrix, SCALES),
        scaling_of(layer, matrix, ZEROS),
    )
    second = 1 if layer.gated else matrix
    code_bytes, scale_bytes, zero_bytes = n_units * UNIT, n_groups * 2 * LANES, n_groups * LANES
    steps = (
        _steps(layer, strip, code_bytes, field_of(layer, second, WEIGHT) - codes),
        _steps(layer, strip, scale_bytes, scaling_of(layer, second, SCALES) - scales),
        _steps(layer, strip, zero_bytes, scaling_of(layer, second, ZEROS) - zeros),
    )
    return _Operands(
        (
            codes + block * code_bytes,
            scales + block * scale_bytes if scales != 0 else 0,
            zeros + block * zero_bytes if zeros != 0 else 0,
            layer.levels,
        ),
        steps,
        rows.group // per_unit,
        n_units,
        _shift(layer.group, rows.group),
        ahead,
    )


@body
def multiply_tile(rows, row, n_together, layer, operands, part, to):
    """Adds the products of a tile of rows with a strip.

    part: (first group of x, end). to: (pointer to the tile's sums, elements from a block to the next).
    """
    place = row * rows.n_groups
    x = (shifted(rows.words, row * rows.n_words), shifted(rows.scales, place), shifted(rows.offsets, place))
    if layer.bits == 8:
        _dot_codes(x, n_together, operands, part, to)
    elif layer.levels == 0:
        _dot_nibbles(x, n_together, operands, part, to)
    else:
        _dot_levels(x, n_together, operands, part, to)


@body
def _sum_terms(sums, row, terms):
    """The sum of a row of x, the least term first."""
    last = (row + 1) * terms - 1
    total = load(sums, last * LANES)
    for term in range(1, terms):
        total = total + load(sums, (last - term) * LANES)
    return total


@body
def finish_strip(layer, strip, sums, sum_step, first_row, n_rows, terms):
    """Epilogue of the columns of a strip, in rows of x."""
    matrix = 1 if layer.gated else strip.matrix
    for panel in range(strip.count):
        first = (strip.block + panel) * LANES
        columns = columns_of(layer, matrix, first)
        gates = shifted(sums, _place_in(layer, strip, panel, 0) * sum_step)
        values = shifted(sums, _place_in(layer, strip, panel, 1) * sum_step) if layer.gated else gates
        scale = load(floats_at(scaling_of(layer, matrix, ROW_SCALES)), first)
        gate_scale = load(floats_at(scaling_of(layer, 0, ROW_SCALES)), first) if layer.gated else scale
        for row in range(n_rows):
            value = _sum_terms(values, row, terms) * scale
            gate = _sum_terms(gates, row, terms) * gate_scale if layer.gated else value
            finish(layer, columns, first_row + row, value, gate)


@body
def ask_for_rows(layer, strip):
    """Asks for what the epilogue of the next strip reads."""
    place = (strip.block + _panels_of(layer, strip.blocks)) * LANES
    for panel in range(strip.count):
        prefetch(floats_at(scaling_of(layer, strip.matrix, ROW_SCALES)), place + panel * LANES)
        if layer.gated:
            prefetch(floats_at(scaling_of(layer, 1, ROW_SCALES)), place + panel * LANES)
