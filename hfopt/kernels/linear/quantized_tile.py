"""Register tiles of quantised weights, unrolled like those of `_tile`, and what packs and unpacks 8-bit codes.

A *unit* is 64 bytes of weight codes: of 16 output columns 4 inputs each, byte 4 j + i being input i of column j; with 4-bit
codes 8 inputs each, the low nibbles being the first 4. It meets words of x: 4 signed 8-bit codes in 32 bits.
"""

from functools import partial
from typing import Any, NamedTuple

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import compiler, cpu
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.integer_dot import UNIT, emit_dot_bytes, emit_look_up
from hfopt.kernels.simd.tile import _constant, _literal_ints, _outlined
from hfopt.kernels.simd.types import F32X, I8, I32, I32X, LANES, float32x

CODES, NIBBLES, LEVELS = range(
    3
)  # bytes of 8-bit codes, of two 4-bit codes, of two 4-bit indices into levels
# Rows of x in the largest tile: sums of integers and of floats that leave registers for the weights.
TILE_ROWS = 12 if "avx512f" in cpu.FEATURES else 4
# Blocks of a strip for 1 or 2 rows, each of them a stream of memory, and for more
FEW_BLOCKS, MORE_BLOCKS = (4 if "avx512f" in cpu.FEATURES else 2), 2

_I8X = ir.VectorType(I8, LANES)


def _splat_bytes(value: int) -> ir.Constant:
    return ir.Constant(I32X, [ir.Constant(I32, value * 0x01010101)] * LANES)


def _unpack(builder, unit, kind, levels):
    """Unsigned codes of 4 inputs a lane, one vector for each 4 inputs of a unit."""
    if kind == CODES:
        return [unit]
    mask = _splat_bytes(0x0F)
    parts = [builder.and_(unit, mask), builder.and_(builder.lshr(unit, simd.splat_int(4)), mask)]
    return parts if kind == NIBBLES else [emit_look_up(builder, levels, part) for part in parts]


# ---- memory by address ------------------------------------------------------------------------------------------------


def _load_at(builder, address, offset, vector_type):
    pointer = builder.inttoptr(builder.add(address, offset), vector_type.as_pointer())
    return builder.load(pointer, align=1)


def _prefetch_at(builder, address, offset):
    start = builder.inttoptr(builder.add(address, offset), I8.as_pointer())
    simd.emit_prefetch(builder, start, _constant(0))


def _load_halves(builder, address, offset):
    """16 finite float16 as float32: shifted into place and scaled, which is exact and needs no instruction of its own."""
    bits = builder.sext(_load_at(builder, address, offset, simd.I16X), I32X)
    # the sign has been copied into the upper bits of the exponent
    bits = builder.and_(builder.shl(bits, simd.splat_int(13)), simd.splat_int(0x8FFFE000 - (1 << 32)))
    return builder.fmul(builder.bitcast(bits, F32X), simd.splat_float(2.0**112))


def _load_bytes(builder, address, offset):
    return builder.zext(_load_at(builder, address, offset, _I8X), I32X)


def _load_levels(builder, address):
    quarter = _load_at(builder, address, _constant(0), _I8X)
    lanes = [k % LANES for k in range(UNIT)]
    four = builder.shuffle_vector(
        quarter, ir.Constant(_I8X, None), ir.Constant(ir.VectorType(I32, UNIT), lanes)
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
    n_rows, n_blocks, kind_ = _literal_ints(rows, blocks, kind)
    signature = types.void(x, w, steps, part, sums, rows, blocks, kind)
    parts = 1 if kind_ == CODES else 2
    # two blocks of 4 rows have more sums than AVX2 has registers; codes that are widened are worth it nevertheless
    widened = kind_ != NIBBLES and not cpu.HAS_AVX_VNNI
    together = n_blocks if n_rows <= 2 or "avx512f" in cpu.FEATURES or widened else 1
    tiles = [(j, i) for j in range(together) for i in range(n_rows)]
    # a chain of sums waits for itself: few rows need several
    n_chains = max(1, 4 // (len(tiles) * parts))

    def emit(first_block, builder, args):
        x, scales_x, offsets, *args = args
        (w, scales, zeros, levels), args = args[:4], args[4:]
        (near, far, next_, *others), args = args[:9], args[9:]
        first, last, length, n_units, shift, ahead, sums, sum_step = args
        table = _load_levels(builder, levels) if kind_ == LEVELS else None

        def places(start, near, far):
            """Addresses of the blocks."""
            each = [start, builder.add(start, near), builder.add(start, far)]
            return [*each, builder.add(each[2], near)][first_block : first_block + together]

        codes_at, scales_at, zeros_at = (
            places(w, near, far),
            places(scales, *others[:2]),
            places(zeros, *others[3:5]),
        )
        slots = [[compiler.alloca_once(builder, I32X) for _ in tiles] for _ in range(n_chains)]
        places_of_sums = [
            builder.bitcast(
                builder.gep(sums, [builder.add(builder.mul(sum_step, block), _constant(i * LANES))]),
                F32X.as_pointer(),
            )
            for j, i in tiles
            for block in [_constant(first_block + j)]
        ]
        # sums that have no registers stay in memory
        in_registers = len(tiles) <= 8
        floats = [compiler.alloca_once(builder, F32X) for _ in tiles] if in_registers else places_of_sums

        def move(sources, targets):
            if in_registers:
                for source, target in zip(sources, targets, strict=True):
                    builder.store(builder.load(source, align=4), target, align=4)

        move(places_of_sums, floats)
        none = _constant(0)
        has_zeros = builder.icmp_signed("!=", zeros, none)
        has_scales = builder.icmp_signed("!=", scales, none)
        end = builder.mul(n_units, _constant(UNIT))
        jump = builder.sub(next_, end)

        def add_unit(unit, chain):
            place = builder.mul(unit, _constant(UNIT))
            words = builder.mul(unit, _constant(parts * n_rows))
            units = [_load_at(builder, each, place, I32X) for each in codes_at]
            later = builder.add(place, ahead)
            behind = builder.icmp_signed(">=", later, end)
            later = builder.add(later, builder.select(behind, jump, none))
            for each in codes_at:
                _prefetch_at(builder, each, later)
            codes = [_unpack(builder, each, kind_, table) for each in units]
            for part in range(parts):
                for i in range(n_rows):
                    word = builder.add(words, _constant(part * n_rows + i))
                    x_value = _splat_word(builder, x, word, I32)
                    for j in range(together):
                        slot = slots[chain][j * n_rows + i]
                        total = emit_dot_bytes(
                            builder, builder.load(slot), codes[j][part], x_value, kind_ == NIBBLES
                        )
                        builder.store(total, slot)

        with compiler.for_range(builder, builder.sub(last, first)) as groups:
            group = builder.add(first, groups.index)
            start = builder.mul(group, length)
            left = builder.sub(n_units, start)
            count = builder.select(builder.icmp_signed("<", left, length), left, length)
            of_x = builder.mul(group, _constant(n_rows))
            of_w = builder.mul(builder.ashr(group, shift), _constant(LANES))

            def offset_of(i):
                return _splat_word(builder, offsets, builder.add(of_x, _constant(i)), I32)

            with builder.if_else(has_zeros) as (differing, constant):
                with differing:
                    values = []
                    for each in zeros_at:
                        values.append(_load_bytes(builder, each, of_w))
                        _prefetch_at(builder, each, builder.add(of_w, others[5]))
                    for (j, i), slot in zip(tiles, slots[0], strict=True):
                        builder.store(builder.mul(offset_of(i), values[j]), slot)
                with constant:
                    for (_, i), slot in zip(tiles, slots[0], strict=True):
                        builder.store(offset_of(i), slot)
            for others_ in slots[1:]:
                for slot in others_:
                    builder.store(ir.Constant(I32X, None), slot)

            whole = builder.udiv(count, _constant(n_chains))
            with compiler.for_range(builder, whole) as units:
                unit = builder.add(start, builder.mul(units.index, _constant(n_chains)))
                for chain in range(n_chains):
                    add_unit(builder.add(unit, _constant(chain)), chain)
            done = builder.mul(whole, _constant(n_chains))
            if n_chains > 1:
                with compiler.for_range(builder, builder.sub(count, done)) as units:
                    add_unit(builder.add(start, builder.add(done, units.index)), 0)

            totals = []
            for k in range(len(tiles)):
                total = builder.load(slots[0][k])
                for others_ in slots[1:]:
                    total = builder.add(total, builder.load(others_[k]))
                totals.append(builder.sitofp(total, F32X))

            def add_scaled(of_blocks):
                scales_x_here = [
                    _splat_word(builder, scales_x, builder.add(of_x, _constant(i)), simd.F32)
                    for i in range(n_rows)
                ]
                for (j, i), total, slot in zip(tiles, totals, floats, strict=True):
                    value = scales_x_here[i]
                    if of_blocks:
                        value = builder.fmul(value, of_blocks[j])
                    before = builder.load(slot, align=4)
                    builder.store(simd.emit_fma(builder, total, value, before), slot, align=4)

            with builder.if_else(has_scales) as (grouped, by_row):
                with grouped:
                    offset = builder.shl(of_w, _constant(1))
                    for each in scales_at:
                        _prefetch_at(builder, each, builder.add(offset, others[2]))
                    add_scaled([_load_halves(builder, each, offset) for each in scales_at])
                with by_row:
                    add_scaled(None)

        move(floats, places_of_sums)

    def codegen(context, builder, sig, args):
        values = _flatten(builder, args[:5])
        for block in range(0, n_blocks, together):
            name = f"hfopt.quantized_tile.{n_rows}.{n_blocks}.{kind_}.{block}"
            _outlined(builder, name, values, partial(emit, block))
        return context.get_dummy_value()

    return signature, codegen


def _flatten(builder, values):
    """Elements of tuples, and of tuples in them."""
    flat = []
    for value in values:
        if isinstance(value.type, (ir.LiteralStructType, ir.ArrayType)):
            flat += _flatten(builder, compiler.unpack_tuple(builder, value))
        else:
            flat.append(value)
    return flat


# ---- quantised rows of x ----------------------------------------------------------------------------------------------

_ROUND = 12582912.0  # 1.5 * 2^23: a float32 plus this has its nearest integer in its lowest bits


@intrinsic
def store_codes(typingctx, p, place, value):
    """Stores 16 values between -127 and 127 as int8 at p + place, rounded to nearest even; returns what was stored."""

    def codegen(context, builder, sig, args):
        p, place, value = args
        shifted = simd.emit_fence(builder, builder.fadd(value, simd.splat_float(_ROUND)))
        codes = builder.trunc(builder.bitcast(shifted, I32X), _I8X)
        where = builder.bitcast(p, I8.as_pointer())
        builder.store(codes, builder.bitcast(builder.gep(where, [place]), _I8X.as_pointer()), align=1)
        return builder.fsub(shifted, simd.splat_float(_ROUND))

    return float32x(p, types.intp, float32x), codegen


@intrinsic
def larger_size(typingctx, a, b):
    """Larger of |a| and b in each lane, b being a result of it or zero; NaN if either is."""

    def codegen(context, builder, sig, args):
        a, b = (builder.bitcast(value, I32X) for value in args)
        # the bits of sizes have the order of sizes, with Inf and then NaN on top
        size = builder.and_(a, simd.splat_int(0x7FFFFFFF))
        return builder.bitcast(simd.emit_call(builder, "llvm.smax.v16i32", I32X, [size, b]), F32X)

    return float32x(float32x, float32x), codegen


@intrinsic
def largest_size(typingctx, x):
    """Largest lane of a result of `larger_size`; NaN if one is."""

    def codegen(context, builder, sig, args):
        bits = simd.emit_call(
            builder, "llvm.vector.reduce.smax.v16i32", I32, [builder.bitcast(args[0], I32X)]
        )
        return builder.bitcast(bits, simd.F32)

    return types.float32(float32x), codegen


@intrinsic
def words_of(typingctx, p):
    """The same address as a pointer to int32."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], I32.as_pointer())

    return types.CPointer(types.int32)(p), codegen
