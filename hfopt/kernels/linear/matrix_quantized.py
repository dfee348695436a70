"""Quantised linear layers of many rows of bfloat16 in tile registers: weights become bfloat16, a panel at a time.

The pairs of inputs that an instruction multiplies lie side by side in a unit of codes (`quantized_tile`), so that 16 columns
are a tile as they are unpacked, and rows of x are read where they are. x is not quantised. Codes are whole numbers, which
bfloat16 holds; with scales of groups, weights are rounded to it.
"""

from typing import Any, NamedTuple

from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit.parallel import body, next_share, parallel_for, usable_threads
from hfopt.kernels.linear.blocks import WEIGHT, columns_of, field_of, finish_inlined
from hfopt.kernels.linear.matrix_rows import FEATURES
from hfopt.kernels.linear.matrix_tiles import (
    CHUNKS,
    PAIRS,
    TILE,
    begin_sums,
    keep_sums,
    panels_together,
    room_bytes,
)
from hfopt.kernels.linear.panels import count_panels, half_panel
from hfopt.kernels.linear.quantized_strip import ROW_SCALES, SCALES, ZEROS, scaling_of, zero_point
from hfopt.kernels.linear.quantized_tile import (
    CODES,
    LEVELS,
    NIBBLES,
    load_at,
    load_bytes,
    load_halves,
    load_levels,
    unpack,
)
from hfopt.kernels.move import copy_bytes
from hfopt.kernels.simd import matrix, tile
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.emit import intp, literal_ints, outlined
from hfopt.kernels.simd.integer_dot import UNIT
from hfopt.kernels.simd.memory import emit_round, load
from hfopt.kernels.simd.pointer import address_of, floats_at, integers_at
from hfopt.kernels.simd.types import F32X, I32X, LANES, float32x
from hfopt.kernels.simd.vector import splat

# fewer rows have the bits of one, and for them codes take longer to unpack than x to quantise
LEAST_ROWS = 65
_ROWS = matrix.ROWS
_LINE = matrix.LINE


def _vector_at(emit, doc):
    def typed(typingctx, address):
        def codegen(context, builder, sig, args):
            return emit(builder, args[0])

        return float32x(types.intp), codegen

    typed.__doc__ = doc
    return intrinsic(typed)


_scales_at = _vector_at(lambda builder, at: load_halves(builder, at, intp(0)), "16 float16 at an address.")
_zeros_at = _vector_at(
    lambda builder, at: builder.sitofp(load_bytes(builder, at, intp(0)), F32X), "16 bytes at an address."
)


@intrinsic(prefer_literal=True)
def _unpack_unit(typingctx, codes, levels, scale, zero, target, kind):
    """A unit of codes as pairs of bfloat16, [pairs, 16 columns, 2] at `target`: `scale` (code - zero).

    Addresses of codes, of 16 levels, and of the pairs; kind (literal): see `quantized_tile`.
    """
    (kind_,) = literal_ints(kind)

    def emit(builder, args):
        codes, levels, scale, zero, target = args
        unit, pairs = load_at(builder, codes, intp(0), I32X), builder.inttoptr(target, I32X.as_pointer())
        parts = unpack(builder, unit, kind_, load_levels(builder, levels) if kind_ == LEVELS else None)
        for row, (part, place) in enumerate((part, place) for part in parts for place in (0, 2)):
            bits = []
            for shift in (8 * place, 8 * place + 8):
                byte = builder.and_(builder.lshr(part, simd.splat_int(shift)), simd.splat_int(0xFF))
                value = builder.fmul(builder.fsub(builder.sitofp(byte, F32X), zero), scale)
                bits.append(builder.zext(emit_round(builder, value), I32X))
            both = builder.or_(bits[0], builder.shl(bits[1], simd.splat_int(16)))
            builder.store(both, builder.gep(pairs, [intp(row)]), align=4)

    def codegen(context, builder, sig, args):
        outlined(builder, f"hfopt.unpack_unit.{kind_}", args[:5], emit)
        return context.get_dummy_value()

    index = types.intp
    return types.void(index, index, float32x, float32x, index, kind), codegen


class _Work(NamedTuple):
    """What a worker does with all groups of panels and parts of the rows; x and room are addresses."""

    x: Any  # of rows, as they are
    n_rows: Any
    padded: Any  # the last tile of x, if it has fewer rows than a tile
    room: Any  # of the first worker, for panels that are unpacked, and sums
    n_workers: Any
    n_together: Any  # panels of a group
    n_panels: Any


@body
def unpacked_scratch(size, threads):
    """Bytes of scratch that `multiply_unpacked` needs on so many threads."""
    return 2 * _LINE + _ROWS * size * 2 + threads * room_bytes()


@body
def _unpack_half(layer, number, first, chunks, room):
    """Chunks of 16 columns from `first` on of a matrix: tiles of pairs, every second one from `room` on."""
    per_unit = 4 if layer.bits == 8 else 8
    n_units, block = layer.size // per_unit, first // LANES
    n_groups = 1 if layer.group == 0 else layer.size // layer.group
    codes = field_of(layer, number, WEIGHT) + block * n_units * UNIT
    scales, zeros = scaling_of(layer, number, SCALES), scaling_of(layer, number, ZEROS)
    scale, zero = splat(1.0), splat(float(zero_point(layer)))
    units = FEATURES // per_unit  # of a chunk
    group_units = n_units if layer.group == 0 else layer.group // per_unit
    for chunk in range(chunks[0], chunks[1]):
        target = room + 2 * (chunk - chunks[0]) * TILE
        for place in range(units):
            unit = chunk * units + place
            if unit % group_units == 0 or unit == chunks[0] * units:
                group = block * n_groups + unit // group_units
                if scales != 0:
                    scale = _scales_at(scales + group * 2 * LANES)
                if zeros != 0:
                    zero = _zeros_at(zeros + group * LANES)
            source, pairs = codes + unit * UNIT, target + place * (TILE // units)
            if layer.bits == 8:
                _unpack_unit(source, layer.levels, scale, zero, pairs, CODES)
            elif layer.levels == 0:
                _unpack_unit(source, layer.levels, scale, zero, pairs, NIBBLES)
            else:
                _unpack_unit(source, layer.levels, scale, zero, pairs, LEVELS)


@body
def _tile_of_x(work, stride, row):
    """Where 16 rows of x are; of none, the ones before."""
    if row >= work.n_rows:
        row -= _ROWS
    return work.x + row * stride if row + _ROWS <= work.n_rows else work.padded


@body
def _multiply(weights, x, y, stride, n_chunks, sums, goes_on):
    """sums (+)= products of two tiles of x with a panel: [2 tiles of x, 2 halves]."""
    begin_sums(sums, goes_on)
    for chunk in range(n_chunks):
        here = weights + chunk * 2 * TILE
        matrix.load(4, x + chunk * _LINE, stride)
        matrix.load(6, here, _LINE)
        matrix.multiply(0, 4, 6)
        matrix.load(7, here + TILE, _LINE)
        matrix.multiply(1, 4, 7)
        matrix.load(5, y + chunk * _LINE, stride)
        matrix.multiply(2, 5, 6)
        matrix.multiply(3, 5, 7)
    keep_sums(sums)


@body
def _finish_panel(layer, panel, row, n_rows, sums):
    """Epilogue of a panel for the rows of two tiles of x."""
    first, last = 1 if layer.gated else 0, min(n_rows - row, 2 * _ROWS)
    gate_scale = splat(1.0)
    for half in range(2):
        number, column, count = half_panel(layer, panel, half)
        if count > 0:
            scale = load(floats_at(scaling_of(layer, number, ROW_SCALES)), column)
            if half < first:
                gate_scale = scale
            else:
                columns = columns_of(layer, number, column)
                for place in range(last):
                    own = floats_at(sums + place // _ROWS * 2 * TILE + place % _ROWS * _LINE)
                    value, gate = load(own, half * 256) * scale, load(own, 0) * gate_scale
                    finish_inlined(layer, columns, row + place, value, gate)


@body
def _group(layer, work, first_panel, last_panel, pairs, room):
    """Some panels for some rows; room: of the worker."""
    sums, stride, n_chunks = room + CHUNKS * 2 * TILE, layer.size * 2, layer.size // FEATURES
    for first in range(0, n_chunks, CHUNKS):
        last = min(first + CHUNKS, n_chunks)
        for each in range(first_panel, last_panel):
            for half in range(2):
                number, column, count = half_panel(layer, each, half)
                if count > 0:
                    _unpack_half(layer, number, column, (first, last), room + half * TILE)
            for pair in range(pairs[0], pairs[1]):
                row = 2 * pair * _ROWS
                place = first * _LINE
                x = _tile_of_x(work, stride, row) + place
                y = _tile_of_x(work, stride, row + _ROWS) + place
                own = sums
                if n_chunks > CHUNKS:
                    own = sums + ((each - first_panel) * PAIRS + pair - pairs[0]) * 4 * TILE
                _multiply(room, x, y, stride, last - first, own, first > 0)
                if last == n_chunks:
                    _finish_panel(layer, each, row, work.n_rows, own)


@body
def _worker(worker, counter, layer, work):
    """Shares of all groups of panels, of all parts of the rows, as long as there are any."""
    config = tile.stack_floats(16)
    n_pairs = (work.n_rows + 2 * _ROWS - 1) // (2 * _ROWS)
    n_parts = (n_pairs + PAIRS - 1) // PAIRS
    n_groups = (work.n_panels + work.n_together - 1) // work.n_together
    room = work.room + worker * room_bytes()
    matrix.configure(address_of(config), _ROWS, _ROWS, _ROWS, 0, 0)
    while True:
        start, end = next_share(counter, n_groups * n_parts, work.n_workers)
        if start == end:
            break
        for index in range(start, end):
            group = index // n_parts
            panel, part = group * work.n_together, index - group * n_parts
            last_panel = min(panel + work.n_together, work.n_panels)
            pairs = part * n_pairs // n_parts, (part + 1) * n_pairs // n_parts
            _group(layer, work, panel, last_panel, pairs, room)
    matrix.release()


@body
def can_unpack(n_rows, size, group, terms):
    """Whether `multiply_unpacked` is for so many rows of x, where there are tile registers.

    A row of one term loses more to its 8 bits than scaled weights do to bfloat16; with more terms nothing is to be lost.
    """
    return n_rows >= LEAST_ROWS and size % FEATURES == 0 and (terms == 1 or group == 0)


@body
def multiply_unpacked(x, n_rows, layer, scratch, threads):
    """layer.out = epilogue(x W^T + b) for many rows of bfloat16 at x; scratch: address of `unpacked_scratch` bytes."""
    n_workers, size = min(usable_threads(), threads), layer.size
    first = (scratch + _LINE - 1) // _LINE * _LINE
    counter, padded = integers_at(first), first + _LINE
    n_panels = count_panels(layer)
    n_together = panels_together(n_panels, n_workers)
    rest, row_bytes = n_rows % _ROWS, 2 * size
    copy_bytes(address_of(x) + (n_rows - rest) * row_bytes, rest * row_bytes, padded)
    room = padded + _ROWS * row_bytes
    work = _Work(address_of(x), n_rows, padded, room, n_workers, n_together, n_panels)
    counter[0] = 0
    parallel_for(_worker, n_workers, n_workers, (counter, layer, work))
