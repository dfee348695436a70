"""What decode attention does with addresses of blocks, and with lanes of queries, beside its register tiles."""

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.attention.tile import emit_pairs
from hfopt.kernels.jit import compiler
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.constants import INTEGERS
from hfopt.kernels.simd.emit import intp, literal_ints
from hfopt.kernels.simd.types import F32, F32X, I8, I16, I32, I32X, INTP, LANES

address_list = types.CPointer(types.int64)


@intrinsic
def set_address(typingctx, addresses, index, address):
    """addresses[index] = address."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(address_list, types.intp, types.int64), codegen


@intrinsic
def seen_keys(typingctx, mask, index, count):
    """Bit j: whether the byte at mask + index + j is not zero, for j < count <= 16."""

    def codegen(context, builder, sig, args):
        mask, index, count = args
        lanes = ir.VectorType(ir.IntType(8), LANES)
        values = simd.emit_load_masked(builder, mask, index, count, lanes, 1)
        seen = builder.icmp_signed("!=", values, ir.Constant(lanes, None))
        return builder.zext(builder.bitcast(seen, I16), INTP)

    return types.int64(types.CPointer(types.uint8), types.intp, types.intp), codegen


@intrinsic
def where_keys(typingctx, count, width, inside, outside):
    """`inside` in the lanes of the first `count` of `width` keys, `outside` in the others."""

    def codegen(context, builder, sig, args):
        count, width, inside, outside = args
        last = simd.emit_splat(builder, builder.sub(builder.trunc(width, I32), ir.Constant(I32, 1)), I32X)
        key = builder.and_(ir.Constant(I32X, list(range(LANES))), last)
        limit = simd.emit_splat(builder, builder.trunc(count, I32), I32X)
        return builder.select(builder.icmp_signed("<", key, limit), inside, outside)

    return simd.float32x(types.intp, types.intp, inside, outside), codegen


@intrinsic(prefer_literal=True)
def partner(typingctx, x, span):
    """Lane k is lane k ^ span of x, for a literal span."""
    (distance,) = literal_ints(span)

    def codegen(context, builder, sig, args):
        order = ir.Constant(ir.VectorType(I32, LANES), [k ^ distance for k in range(LANES)])
        return builder.shuffle_vector(args[0], args[0], order)

    return simd.float32x(simd.float32x, span), codegen


@intrinsic
def load_key_factors(typingctx, factors, first, width):
    """Numbers of `width` (4 or 16) keys, for each query of a vector of scores."""

    def codegen(context, builder, sig, args):
        factors, first, width = args
        spread = ir.Constant(ir.VectorType(I32, LANES), [k % 4 for k in range(LANES)])
        few = simd.emit_load(builder, factors, first, ir.VectorType(F32, 4), 4)
        few = builder.shuffle_vector(few, few, spread)
        result = compiler.alloca_once_value(builder, few)
        with builder.if_then(builder.icmp_signed("==", width, intp(LANES))):
            builder.store(simd.emit_load(builder, factors, first, F32X, 4), result)
        return builder.load(result)

    return simd.float32x(factors, types.intp, types.intp), codegen


@intrinsic
def largest_weight(typingctx, a, b):
    """Larger of each lane, of numbers that are not negative; NaN if either is."""

    def codegen(context, builder, sig, args):
        # in the order of their bits, NaN is the largest, with and without a sign
        a, b = (builder.bitcast(x, I32X) for x in args)
        return builder.bitcast(builder.select(builder.icmp_unsigned(">", a, b), a, b), F32X)

    return simd.float32x(simd.float32x, simd.float32x), codegen


@intrinsic(prefer_literal=True)
def pack_query(typingctx, source, steps, target, place, queries):
    """Query number `place` of a packed tile: segment s goes to lanes place * width ... of target[s, 16]."""
    (n_queries,) = literal_ints(queries)
    segment = ir.VectorType(I32, LANES // n_queries)

    def codegen(context, builder, sig, args):
        source, steps, target, place, _ = args
        source = builder.bitcast(source, I32.as_pointer())
        target = builder.bitcast(target, I32.as_pointer())
        first = builder.mul(place, intp(segment.count))
        with compiler.for_range(builder, steps) as loop:
            here = builder.mul(loop.index, intp(segment.count))
            value = simd.emit_load(builder, source, here, segment, 2)
            there = builder.add(builder.mul(loop.index, intp(LANES)), first)
            there = builder.bitcast(builder.gep(target, [there]), segment.as_pointer())
            builder.store(value, there, align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp, queries), codegen


@intrinsic
def pack_digits(typingctx, source, steps, target, place):
    """Query number `place` of a tile of four, of 16-bit integers, as digits: 16 channels of each query, the upper 8 bits
    (signed) and then the lower ones (unsigned), and so on."""
    channels = ir.VectorType(I16, LANES)

    def codegen(context, builder, sig, args):
        source, steps, target, place = args
        target = builder.bitcast(target, I8.as_pointer())
        first = builder.mul(place, intp(LANES))
        with compiler.for_range(builder, builder.lshr(steps, intp(1))) as loop:
            value = simd.emit_load(builder, source, builder.mul(loop.index, intp(LANES)), channels, 2)
            upper = builder.lshr(value, ir.Constant(channels, [8] * LANES))
            for digit, at in ((upper, 0), (value, 4 * LANES)):
                there = builder.add(builder.mul(loop.index, intp(8 * LANES)), first)
                there = builder.gep(target, [builder.add(there, intp(at))])
                digit = builder.trunc(digit, simd.I8X)
                builder.store(digit, builder.bitcast(there, simd.I8X.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), codegen


@intrinsic
def store_integers(typingctx, p, index, value):
    """16 numbers from -32768 to 32767 to p + index, 16-bit elements, rounded to nearest even."""

    def codegen(context, builder, sig, args):
        where, index, value = args
        # the lowest bits of the sum are the integer
        value = builder.fadd(simd.emit_fence(builder, value), simd.splat_float(INTEGERS))
        shorts = builder.trunc(builder.bitcast(value, I32X), simd.I16X)
        target = builder.bitcast(builder.gep(where, [index]), shorts.type.as_pointer())
        builder.store(shorts, target, align=2)
        return context.get_dummy_value()

    return types.void(p, types.intp, simd.float32x), codegen


@intrinsic
def load_quads(typingctx, p, index):
    """The first 4 numbers of 4 rows of 16 from p + index on, row by row."""

    def codegen(context, builder, sig, args):
        quad = ir.VectorType(F32, 4)
        places = [builder.add(args[1], intp(row * LANES)) for row in range(4)]
        rows = [simd.emit_load(builder, args[0], place, quad, 4) for place in places]
        halves = [_joined(builder, rows[i], rows[i + 1], 8) for i in (0, 2)]
        return _joined(builder, halves[0], halves[1], LANES)

    return simd.float32x(types.CPointer(types.float32), types.intp), codegen


def _joined(builder, first, second, n):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, n), list(range(n))))


@intrinsic
def store_pair_quads(typingctx, p, index, x):
    """As `tile.store_pair`, of four keys of four queries, key by key: two pairs, in rows of 16 units from p + index on."""

    def codegen(context, builder, sig, args):
        p, index, x = args
        next_keys = ir.Constant(I32X, [i ^ 4 for i in range(LANES)])
        units = emit_pairs(builder, x, builder.shuffle_vector(x, x, next_keys))
        for row in range(2):
            lanes = ir.Constant(ir.VectorType(I32, 4), [8 * row + i for i in range(4)])
            there = builder.gep(p, [builder.add(index, intp(row * LANES))])
            there = builder.bitcast(there, ir.VectorType(I32, 4).as_pointer())
            builder.store(builder.shuffle_vector(units, units, lanes), there, align=4)
        return context.get_dummy_value()

    return types.void(p, types.intp, simd.float32x), codegen
