"""Register tiles of attention, each unrolled by one intrinsic."""

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import compiler
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.constants import INTEGERS
from hfopt.kernels.simd.emit import accumulators, add_into, intp, is_pairs, literal_ints, outlined
from hfopt.kernels.simd.types import F32X, I32, I32X, LANES


@intrinsic
def where_bytes(typingctx, p, index, count, inside, outside):
    """`inside` in those of the first `count` lanes whose byte at p + index is not zero, else `outside`."""

    def codegen(context, builder, sig, args):
        p, index, count, inside, outside = args
        lanes = ir.VectorType(ir.IntType(8), LANES)
        values = simd.emit_load_masked(builder, p, index, count, lanes, 1)
        chosen = builder.icmp_signed("!=", values, ir.Constant(lanes, None))
        return builder.select(chosen, inside, outside)

    return simd.float32x(types.CPointer(types.uint8), types.intp, types.intp, inside, outside), codegen


@intrinsic(prefer_literal=True)
def multiply_tile(typingctx, a, a_row, a_step, b, size, out, n_rows, n_vectors, accumulate):
    """out[i, :] (+)= sum over k < size of a[i * a_row + k * a_step] b[k, :], rows of 16 * n_vectors (literals).

    a and b are 32-bit units (`CPointer(float32)`, or pairs of bfloat16 as `CPointer(uint32)`), out is float32.
    """
    rows, vectors = literal_ints(n_rows, n_vectors)
    signature = types.void(a, types.intp, types.intp, b, types.intp, out, n_rows, n_vectors, types.boolean)
    pairs = is_pairs(a)

    def emit(builder, args):
        a, a_row, a_step, b, size, out, accumulate = args
        vector = I32X if pairs else F32X
        sums = accumulators(builder, rows * vectors)
        a_rows = [builder.gep(a, [builder.mul(a_row, intp(i))]) for i in range(rows)]
        with compiler.for_range(builder, size) as loop:
            b_row = builder.gep(b, [builder.mul(loop.index, intp(vectors * LANES))])
            b_values = [simd.emit_load(builder, b_row, intp(c * LANES), vector, 4) for c in range(vectors)]
            place = builder.mul(loop.index, a_step)
            for i, a_row in enumerate(a_rows):
                a_value = builder.load(builder.gep(a_row, [place]), align=4)
                a_value = simd.emit_splat(builder, a_value, vector)
                for c, b_value in enumerate(b_values):
                    add_into(builder, sums[i * vectors + c], a_value, b_value)
        # what is there is added last: short chains of additions round less
        with builder.if_then(accumulate):
            for place, slot in enumerate(sums):
                before = simd.emit_load(builder, out, intp(place * LANES), F32X, 4)
                builder.store(builder.fadd(before, builder.load(slot)), slot)
        for place, slot in enumerate(sums):
            target = builder.gep(out, [intp(place * LANES)])
            builder.store(builder.load(slot), builder.bitcast(target, F32X.as_pointer()), align=4)

    def codegen(context, builder, sig, args):
        name = f"hfopt.multiply_tile.{rows}.{vectors}.{'pairs' if pairs else 'floats'}"
        outlined(builder, name, [*args[:6], args[8]], emit)
        return context.get_dummy_value()

    return signature, codegen


# 2^x = 1 + x P(x) for |x| <= 1/2, highest power first, fitted for the least relative error: 9e-8, and 1e-4, which
# is little beside the 2e-3 of rounding to bfloat16
_EXACT = (1.5353362e-4, 1.3398875e-3, 9.6184369e-3, 5.5503324e-2, 2.4022648e-1, 6.9314718e-1, 1.0)
_COARSE = (5.5008931e-2, 2.4221096e-1, 6.9328293e-1, 1.0)
_EXPONENT = INTEGERS + 127.0  # of whose sums the lowest bits are those of an exponent


def _power_of_two(builder, x, coefficients):
    low = simd.splat_float(-127.0)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    # the sums must stay as they are written, in this order
    shifted = simd.emit_fence(builder, builder.fadd(x, simd.splat_float(_EXPONENT)))
    whole = simd.emit_fence(builder, builder.fsub(shifted, simd.splat_float(_EXPONENT)))
    fraction = builder.fsub(x, whole)
    result = simd.emit_polynomial(builder, fraction, coefficients)
    exponent = builder.shl(builder.bitcast(shifted, I32X), simd.splat_int(23))
    return builder.fmul(result, builder.bitcast(exponent, F32X))


@intrinsic
def weight_of(typingctx, x, like):
    """2^x for x <= 0, 0 below -126.5, NaN for NaN; for the precision of `like`, units of a weight."""

    def codegen(context, builder, sig, args):
        return _power_of_two(builder, args[0], _COARSE if is_pairs(sig.args[1]) else _EXACT)

    return simd.float32x(simd.float32x, like), codegen


def emit_pairs(builder, low, high):
    """Units of two bfloat16, rounded to the nearest, ties away from zero."""
    half = simd.splat_int(0x8000)
    low, high = (builder.add(builder.bitcast(value, I32X), half) for value in (low, high))
    low = builder.lshr(low, simd.splat_int(16))
    return builder.or_(low, builder.and_(high, simd.splat_int(-65536)))


@intrinsic
def store_pair(typingctx, p, pair, width, column, low, high):
    """Columns of rows 2 pair (low) and 2 pair + 1 (high) of p[:, width], which has a row of units for each pair in bfloat16.

    Rounds to the nearest bfloat16, ties away from zero.
    """

    def codegen(context, builder, sig, args):
        p, pair, width, column, low, high = args
        row = builder.mul(pair, width)
        if not is_pairs(sig.args[0]):
            first = builder.add(builder.mul(row, intp(2)), column)
            for place, value in ((first, low), (builder.add(first, width), high)):
                target = builder.gep(p, [place])
                builder.store(value, builder.bitcast(target, F32X.as_pointer()), align=4)
            return context.get_dummy_value()
        units = emit_pairs(builder, low, high)
        target = builder.gep(p, [builder.add(row, column)])
        builder.store(units, builder.bitcast(target, I32X.as_pointer()), align=4)
        return context.get_dummy_value()

    index = types.intp
    return types.void(p, index, index, index, simd.float32x, simd.float32x), codegen


@intrinsic
def load_row(typingctx, p, row, width, column):
    """16 columns of a row that `store_pair` has stored."""

    def codegen(context, builder, sig, args):
        p, row, width, column = args
        if not is_pairs(sig.args[0]):
            return simd.emit_load(builder, p, builder.add(builder.mul(row, width), column), F32X, 4)
        pair = builder.lshr(row, intp(1))
        units = simd.emit_load(builder, p, builder.add(builder.mul(pair, width), column), I32X, 4)
        odd = builder.trunc(builder.and_(row, intp(1)), I32)
        bits = simd.emit_splat(builder, builder.mul(odd, ir.Constant(I32, 16)), I32X)
        return builder.bitcast(builder.shl(builder.lshr(units, bits), simd.splat_int(16)), F32X)

    return simd.float32x(p, types.intp, types.intp, types.intp), codegen


@intrinsic
def where_up_to(typingctx, a, b, inside, outside):
    """`inside` in the lanes where a <= b, else `outside`."""

    def codegen(context, builder, sig, args):
        a, b, inside, outside = args
        return builder.select(builder.fcmp_ordered("<=", a, b), inside, outside)

    vector = simd.float32x
    return vector(vector, vector, vector, vector), codegen


@intrinsic
def any_below(typingctx, a, b):
    """Whether a < b in a lane."""

    def codegen(context, builder, sig, args):
        lanes = builder.bitcast(builder.fcmp_ordered("<", *args), ir.IntType(LANES))
        return builder.icmp_unsigned("!=", lanes, ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(simd.float32x, simd.float32x), codegen
