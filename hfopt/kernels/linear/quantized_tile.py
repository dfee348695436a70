"""Register tiles of quantised weights, unrolled like those of `simd.tile`, and what packs and unpacks 8-bit codes.

A *unit* is 64 bytes of weight codes: of 16 output columns 4 inputs each, byte 4 j + i being input i of column j; with 4-bit
codes 8 inputs each, the low nibbles being the first 4. It meets words of x: 4 signed 8-bit codes in 32 bits.
"""

from typing import Any, NamedTuple

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import compiler, cpu
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.emit import intp, literal_ints, outlined
from hfopt.kernels.simd.integer_dot import UNIT, emit_dot_bytes, emit_look_up
from hfopt.kernels.simd.types import F32X, I8, I8X, I32, I32X, LANES

CODES, NIBBLES, LEVELS = range(
    3
)  # bytes of 8-bit codes, of two 4-bit codes, of two 4-bit indices into levels
# Rows of x in the largest tile: sums of integers and of floats that leave registers for the weights.
TILE_ROWS = 12 if "avx512f" in cpu.FEATURES else 4
# Blocks of a strip for 1 or 2 rows, each of them a stream of memory, and for more
FEW_BLOCKS, MORE_BLOCKS = (4 if "avx512f" in cpu.FEATURES else 2), 2


def _splat_bytes(value: int) -> ir.Constant:
    return ir.Constant(I32X, [ir.Constant(I32, value * 0x01010101)] * LANES)


def unpack(builder, unit, kind, levels):
    """Unsigned codes of 4 inputs a lane, one vector for each 4 inputs of a unit."""
    if kind == CODES:
        return [unit]
    mask = _splat_bytes(0x0F)
    parts = [builder.and_(unit, mask), builder.and_(builder.lshr(unit, simd.splat_int(4)), mask)]
    return parts if kind == NIBBLES else [emit_look_up(builder, levels, part) for part in parts]


# ---- memory by address ------------------------------------------------------------------------------------------------


def load_at(builder, address, offset, vector_type):
    pointer = builder.inttoptr(builder.add(address, offset), vector_type.as_pointer())
    return builder.load(pointer, align=1)


def _prefetch_at(builder, address, offset):
    start = builder.inttoptr(builder.add(address, offset), I8.as_pointer())
    simd.emit_prefetch(builder, start, intp(0))


def load_halves(builder, address, offset):
    """16 finite float16 as float32: shifted into place and scaled, which is exact and needs no instruction of its own."""
    bits = builder.sext(load_at(builder, address, offset, simd.I16X), I32X)
    # the sign has been copied into the upper bits of the exponent
    bits = builder.and_(builder.shl(bits, simd.splat_int(13)), simd.splat_int(0x8FFFE000 - (1 << 32)))
    return builder.fmul(builder.bitcast(bits, F32X), simd.splat_float(2.0**112))


def load_bytes(builder, address, offset):
    return builder.zext(load_at(builder, address, offset, I8X), I32X)


def load_levels(builder, address):
    quarter = load_at(builder, address, intp(0), I8X)
    lanes = [k % LANES for k in range(UNIT)]
    four = builder.shuffle_vector(
        quarter, ir.Constant(I8X, None), ir.Constant(ir.VectorType(I32, UNIT), lanes)
    )
    return builder.bitcast(four, I32X)


def _splat_word(builder, pointer, index, element):
    where = builder.bitcast(builder.gep(pointer, [index]), element.as_pointer())
    return simd.emit_splat(builder, builder.load(where, align=4), ir.VectorType(element, LANES))


# ---- tiles ------------------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """Bytes from the first block of a strip to the others: block j is j % 2 * near + j // 2 * far behind it.

    next: to the first block of the strip that is likely to follow.
    """

    near: Any
    far: Any
    next: Any


class _Arguments(NamedTuple):
    """Arguments of a `quantized_tile`, as its code gets them."""

    x: Any
    scales_x: Any
    offsets: Any
    w: Any
    scales: Any
    zeros: Any
    levels: Any
    near: Any
    far: Any
    next: Any
    scales_near: Any
    scales_far: Any
    scales_next: Any
    zeros_near: Any
    zeros_far: Any
    zeros_next: Any
    first: Any
    last: Any
    length: Any
    n_units: Any
    shift: Any
    ahead: Any
    sums: Any
    sum_step: Any


class _Shape(NamedTuple):
    """Literals of a `quantized_tile`."""

    rows: int
    blocks: int  # that are worked on at a time
    kind: int

    @property
    def parts(self) -> int:
        """Vectors that a unit unpacks to."""
        return 1 if self.kind == CODES else 2

    @property
    def places(self) -> list[tuple[int, int]]:
        """(block, row) of each sum."""
        return [(j, i) for j in range(self.blocks) for i in range(self.rows)]

    @property
    def n_chains(self) -> int:
        """Sums that take turns: one waits for itself, so few rows need several."""
        return max(1, 4 // (self.rows * self.blocks * self.parts))


class _Tile:
    """The code of a `quantized_tile` for some blocks, from `first_block` on."""

    def __init__(self, shape: _Shape, first_block: int, builder, args):
        self.shape, self.builder = shape, builder
        self.a = a = _Arguments(*args)
        self.table = load_levels(builder, a.levels) if shape.kind == LEVELS else None
        self.codes_at = self._blocks(first_block, a.w, a.near, a.far)
        self.scales_at = self._blocks(first_block, a.scales, a.scales_near, a.scales_far)
        self.zeros_at = self._blocks(first_block, a.zeros, a.zeros_near, a.zeros_far)
        # integers of a group
        self.slots = [
            [compiler.alloca_once(builder, I32X) for _ in shape.places] for _ in range(shape.n_chains)
        ]
        self.sums = [self._sum_at(first_block + j, i) for j, i in shape.places]
        # sums that have no registers stay in memory
        in_registers = len(shape.places) <= 8
        self.floats = (
            [compiler.alloca_once(builder, F32X) for _ in shape.places] if in_registers else self.sums
        )

    def _blocks(self, first, start, near, far):
        """Addresses of the blocks."""
        builder = self.builder
        each = [start, builder.add(start, near), builder.add(start, far)]
        return [*each, builder.add(each[2], near)][first : first + self.shape.blocks]

    def _sum_at(self, block, row):
        builder, a = self.builder, self.a
        place = builder.add(builder.mul(a.sum_step, intp(block)), intp(row * LANES))
        return builder.bitcast(builder.gep(a.sums, [place]), F32X.as_pointer())

    def _move(self, sources, targets):
        if sources is not targets:
            for source, target in zip(sources, targets, strict=True):
                self.builder.store(self.builder.load(source, align=4), target, align=4)

    def emit(self):
        """All groups."""
        builder, a = self.builder, self.a
        self._move(self.sums, self.floats)
        self.has_zeros = builder.icmp_signed("!=", a.zeros, intp(0))
        self.has_scales = builder.icmp_signed("!=", a.scales, intp(0))
        self.end = builder.mul(a.n_units, intp(UNIT))
        self.jump = builder.sub(a.next, self.end)
        with compiler.for_range(builder, builder.sub(a.last, a.first)) as groups:
            group = builder.add(a.first, groups.index)
            start = builder.mul(group, a.length)
            left = builder.sub(a.n_units, start)
            count = builder.select(builder.icmp_signed("<", left, a.length), left, a.length)
            of_x = builder.mul(group, intp(self.shape.rows))
            of_w = builder.mul(builder.ashr(group, a.shift), intp(LANES))
            self._start_group(of_x, of_w)
            self._add_units(start, count)
            self._finish_group(of_x, of_w)
        self._move(self.floats, self.sums)

    def _start_group(self, of_x, of_w):
        """Sums begin with the offsets of x."""
        builder, a, places, slots = self.builder, self.a, self.shape.places, self.slots

        def offset_of(i):
            return _splat_word(builder, a.offsets, builder.add(of_x, intp(i)), I32)

        with builder.if_else(self.has_zeros) as (differing, constant):
            with differing:
                values = []
                for each in self.zeros_at:
                    values.append(load_bytes(builder, each, of_w))
                    _prefetch_at(builder, each, builder.add(of_w, a.zeros_next))
                for (j, i), slot in zip(places, slots[0], strict=True):
                    builder.store(builder.mul(offset_of(i), values[j]), slot)
            with constant:
                for (_, i), slot in zip(places, slots[0], strict=True):
                    builder.store(offset_of(i), slot)
        for chain in slots[1:]:
            for slot in chain:
                builder.store(ir.Constant(I32X, None), slot)

    def _add_units(self, start, count):
        builder, n_chains = self.builder, self.shape.n_chains
        whole = builder.udiv(count, intp(n_chains))
        with compiler.for_range(builder, whole) as units:
            unit = builder.add(start, builder.mul(units.index, intp(n_chains)))
            for chain in range(n_chains):
                self._add_unit(builder.add(unit, intp(chain)), chain)
        done = builder.mul(whole, intp(n_chains))
        if n_chains > 1:
            with compiler.for_range(builder, builder.sub(count, done)) as units:
                self._add_unit(builder.add(start, builder.add(done, units.index)), 0)

    def _add_unit(self, unit, chain):
        builder, a, (n_rows, n_blocks, kind) = self.builder, self.a, self.shape
        place = builder.mul(unit, intp(UNIT))
        words = builder.mul(unit, intp(self.shape.parts * n_rows))
        units = [load_at(builder, each, place, I32X) for each in self.codes_at]
        later = builder.add(place, a.ahead)
        behind = builder.icmp_signed(">=", later, self.end)
        later = builder.add(later, builder.select(behind, self.jump, intp(0)))
        for each in self.codes_at:
            _prefetch_at(builder, each, later)
        codes = [unpack(builder, each, kind, self.table) for each in units]
        for part in range(self.shape.parts):
            for i in range(n_rows):
                word = builder.add(words, intp(part * n_rows + i))
                x_value = _splat_word(builder, a.x, word, I32)
                for j in range(n_blocks):
                    slot = self.slots[chain][j * n_rows + i]
                    total = emit_dot_bytes(
                        builder, builder.load(slot), codes[j][part], x_value, kind == NIBBLES
                    )
                    builder.store(total, slot)

    def _finish_group(self, of_x, of_w):
        """Integers are scaled and added to the sums."""
        builder = self.builder
        totals = []
        for first, *others in zip(*self.slots, strict=True):
            total = builder.load(first)
            for other in others:
                total = builder.add(total, builder.load(other))
            totals.append(builder.sitofp(total, F32X))
        with builder.if_else(self.has_scales) as (grouped, by_row):
            with grouped:
                offset = builder.shl(of_w, intp(1))
                for each in self.scales_at:
                    _prefetch_at(builder, each, builder.add(offset, self.a.scales_next))
                scales = [load_halves(builder, each, offset) for each in self.scales_at]
                self._add_scaled(totals, of_x, scales)
            with by_row:
                self._add_scaled(totals, of_x, None)

    def _add_scaled(self, totals, of_x, of_blocks):
        builder, shape = self.builder, self.shape
        scales = [
            _splat_word(builder, self.a.scales_x, builder.add(of_x, intp(i)), simd.F32)
            for i in range(shape.rows)
        ]
        for (j, i), total, slot in zip(shape.places, totals, self.floats, strict=True):
            value = scales[i]
            if of_blocks:
                value = builder.fmul(value, of_blocks[j])
            before = builder.load(slot, align=4)
            builder.store(simd.emit_fma(builder, total, value, before), slot, align=4)


@intrinsic(prefer_literal=True)
def quantized_tile(typingctx, x, w, steps, part, sums, rows, blocks, kind):
    """sums[j, i, :] += products of rows of x with the 16 columns of the blocks of a strip, over some groups of inputs.

    The products of a group are summed as integers and then scaled. rows, blocks (1, 2 or 4) and kind (CODES, NIBBLES or
    LEVELS) are literals.

    x: pointers (words int32 [unit, 4 inputs, rows], scales float32 [group, rows], offsets int32 [group, rows]), an offset
    being minus the sum of x's codes, times the zero point where w has none of its own.
    w: addresses of the first block (codes uint8 [units, 64], scales float16 [groups, 16] or 0, zero points uint8
    [groups, 16] or 0, levels uint8 [16]); group g of x is in group g >> shift of w.
    steps: `Steps` of codes, scales and zero points.
    part: (first group of x, end, units of a group, of which the last may have fewer, units of a block, shift, bytes by
    which codes are asked for in advance).
    sums: (pointer to float32 [blocks, rows, 16], elements from a block to the next).
    """
    n_rows, n_blocks, kind_ = literal_ints(rows, blocks, kind)
    # two blocks of 4 rows have more sums than AVX2 has registers; codes that are widened are worth it nevertheless
    widened = kind_ != NIBBLES and not cpu.HAS_AVX_VNNI
    together = n_blocks if n_rows <= 2 or "avx512f" in cpu.FEATURES or widened else 1
    shape = _Shape(n_rows, together, kind_)

    def codegen(context, builder, sig, args):
        values = _flatten(builder, args[:5])
        for block in range(0, n_blocks, together):
            name = f"hfopt.quantized_tile.{n_rows}.{n_blocks}.{kind_}.{block}"
            outlined(
                builder,
                name,
                values,
                lambda inner, args, block=block: _Tile(shape, block, inner, args).emit(),
            )
        return context.get_dummy_value()

    return types.void(x, w, steps, part, sums, rows, blocks, kind), codegen


def _flatten(builder, values):
    """Elements of tuples, and of tuples in them."""
    flat = []
    for value in values:
        if isinstance(value.type, (ir.LiteralStructType, ir.ArrayType)):
            flat += _flatten(builder, compiler.unpack_tuple(builder, value))
        else:
            flat.append(value)
    return flat
