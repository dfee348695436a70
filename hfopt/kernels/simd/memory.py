"""Loads and stores of vectors and numbers, by the element type of a pointer, and prefetches."""

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import cpu
from hfopt.kernels.jit.compiler import emit_call
from hfopt.kernels.simd.constants import INTEGERS
from hfopt.kernels.simd.pointer import is_bits, is_codes
from hfopt.kernels.simd.types import (
    BF16X,
    F32,
    F32X,
    I8X,
    I16X,
    I32,
    I32X,
    INTP,
    LANES,
    emit_fence,
    emit_lane_mask,
    emit_load,
    emit_load_masked,
    emit_prefetch,
    emit_splat,
    float32x,
    splat_float,
    splat_int,
)


def _emit_widen(builder, bits16):
    """bfloat16 bits -> float32; exact: the bits are the upper half."""
    return builder.bitcast(builder.shl(builder.zext(bits16, I32X), splat_int(16)), F32X)


def emit_round(builder, value):
    """float32 -> bfloat16 bits, to nearest even; a NaN stays a NaN."""
    if cpu.HAS_AVX512_BF16:
        return builder.bitcast(builder.fptrunc(value, BF16X), I16X)
    # elsewhere fptrunc would call a function of the C compiler's library, which is not there
    bits = builder.bitcast(value, I32X)
    odd = builder.and_(builder.lshr(bits, splat_int(16)), splat_int(1))
    rounded = builder.add(bits, builder.add(odd, splat_int(0x7FFF)))
    quiet = builder.or_(bits, splat_int(0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, splat_int(16)), I16X)


def emit_integers(builder, codes):
    """16 int8 as float32."""
    return builder.sitofp(builder.sext(codes, I32X), F32X)


@intrinsic
def load(typingctx, p, index):
    """16 elements from p + index as float32."""

    def codegen(context, builder, sig, args):
        if is_bits(sig.args[0]):
            return _emit_widen(builder, emit_load(builder, args[0], args[1], I16X, 2))
        if is_codes(sig.args[0]):
            return emit_integers(builder, emit_load(builder, args[0], args[1], I8X, 1))
        return emit_load(builder, args[0], args[1], F32X, 4)

    return float32x(p, types.intp), codegen


@intrinsic
def load_part(typingctx, p, index, count):
    """`count` (0 to 16) elements from p + index as float32, zeros behind them."""

    def codegen(context, builder, sig, args):
        if is_bits(sig.args[0]):
            return _emit_widen(builder, emit_load_masked(builder, args[0], args[1], args[2], I16X, 2))
        if is_codes(sig.args[0]):
            return emit_integers(builder, emit_load_masked(builder, args[0], args[1], args[2], I8X, 1))
        return emit_load_masked(builder, args[0], args[1], args[2], F32X, 4)

    return float32x(p, types.intp, types.intp), codegen


@intrinsic
def store(typingctx, p, index, value):
    """16 float32 to p + index, rounded to the element type of p."""

    def codegen(context, builder, sig, args):
        where, index, value = args
        bits = is_bits(sig.args[0])
        if bits:
            value = emit_round(builder, value)
        target = builder.bitcast(builder.gep(where, [index]), value.type.as_pointer())
        builder.store(value, target, align=2 if bits else 4)
        return context.get_dummy_value()

    return types.void(p, types.intp, float32x), codegen


@intrinsic
def store_part(typingctx, p, index, count, value):
    """The first `count` (0 to 16) lanes to p + index, rounded to the element type of p."""

    def codegen(context, builder, sig, args):
        where, index, count, value = args
        bits = is_bits(sig.args[0])
        if bits:
            value = emit_round(builder, value)
        target = builder.bitcast(builder.gep(where, [index]), value.type.as_pointer())
        mask = emit_lane_mask(builder, count, LANES)
        name = f"llvm.masked.store.v16{'i16' if bits else 'f32'}.p0"
        arguments = [value, target, ir.Constant(I32, 2 if bits else 4), mask]
        emit_call(builder, name, ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(p, types.intp, types.intp, float32x), codegen


@intrinsic
def store_codes(typingctx, p, index, count, value):
    """The first `count` (0 to 16) lanes to p + index as integers, rounded to nearest even; each from -127 to 127."""

    def codegen(context, builder, sig, args):
        where, index, count, value = args
        # the lowest bits of the sum are the integer
        bits = builder.bitcast(builder.fadd(emit_fence(builder, value), splat_float(INTEGERS)), I32X)
        codes = builder.trunc(bits, I8X)
        target = builder.bitcast(builder.gep(where, [index]), I8X.as_pointer())
        mask = emit_lane_mask(builder, count, LANES)
        emit_call(
            builder, "llvm.masked.store.v16i8.p0", ir.VoidType(), [codes, target, ir.Constant(I32, 1), mask]
        )
        return context.get_dummy_value()

    return types.void(p, types.intp, types.intp, float32x), codegen


@intrinsic
def copy_codes(typingctx, source, count, target):
    """The first `count` (0 to 16) codes, and zeros up to 16."""

    def codegen(context, builder, sig, args):
        source, count, target = args
        codes = emit_load_masked(builder, source, ir.Constant(INTP, 0), count, I8X, 1)
        builder.store(codes, builder.bitcast(target, I8X.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(source, types.intp, target), codegen


@intrinsic
def load_two(typingctx, p, index):
    """32 elements from p + index as two vectors of float32, for `store_two` or for sums.

    Of bfloat16 one has the even elements and the other the odd ones, which are widened at half the cost of neighbours.
    """
    pair = types.UniTuple(float32x, 2)

    def codegen(context, builder, sig, args):
        where, index = args
        if is_bits(sig.args[0]):
            units = emit_load(builder, where, index, I32X, 2)
            even, odd = builder.shl(units, splat_int(16)), builder.and_(units, splat_int(-65536))
            values = [builder.bitcast(even, F32X), builder.bitcast(odd, F32X)]
        else:
            places = [index, builder.add(index, ir.Constant(INTP, LANES))]
            values = [emit_load(builder, where, place, F32X, 4) for place in places]
        return context.make_tuple(builder, pair, values)

    return pair(p, types.intp), codegen


@intrinsic
def store_two(typingctx, p, index, a, b):
    """32 float32 as `load_two` has them to p + index, rounded to the element type of p."""

    def codegen(context, builder, sig, args):
        where, index, a, b = args
        where = builder.gep(where, [index])
        if is_bits(sig.args[0]):
            order = ir.Constant(
                ir.VectorType(I32, 2 * LANES), [k // 2 + k % 2 * LANES for k in range(2 * LANES)]
            )
            bits = builder.shuffle_vector(emit_round(builder, a), emit_round(builder, b), order)
            builder.store(bits, builder.bitcast(where, bits.type.as_pointer()), align=2)
        else:
            builder.store(a, builder.bitcast(where, F32X.as_pointer()), align=4)
            second = builder.gep(where, [ir.Constant(INTP, LANES)])
            builder.store(b, builder.bitcast(second, F32X.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(p, types.intp, float32x, float32x), codegen


@intrinsic
def load_scalar(typingctx, p, index):
    """One element from p + index as float32."""

    def codegen(context, builder, sig, args):
        value = builder.load(builder.gep(args[0], [args[1]]))
        if is_bits(sig.args[0]):
            return builder.bitcast(builder.shl(builder.zext(value, I32), ir.Constant(I32, 16)), F32)
        return builder.sitofp(value, F32) if is_codes(sig.args[0]) else value

    return types.float32(p, types.intp), codegen


@intrinsic
def store_scalar(typingctx, p, index, value):
    """One float32 to p + index, rounded to the element type of p."""

    def codegen(context, builder, sig, args):
        where, index, value = args
        if is_bits(sig.args[0]):
            value = builder.extract_element(
                emit_round(builder, emit_splat(builder, value, F32X)), ir.Constant(I32, 0)
            )
        builder.store(value, builder.gep(where, [index]))
        return context.get_dummy_value()

    return types.void(p, types.intp, types.float32), codegen


@intrinsic
def prefetch(typingctx, p, index):
    """Asks for the cache line of p + index, into the L2 cache; there need not be any memory."""

    def codegen(context, builder, sig, args):
        emit_prefetch(builder, *args)
        return context.get_dummy_value()

    return types.void(p, types.intp), codegen


@intrinsic
def prefetch_two(typingctx, p, index):
    """Asks for what `load_two` reads, where there need not be any memory, in the L2 cache. Of float32 only: work on
    bfloat16 takes longer than its bytes, and was slower with it."""

    def codegen(context, builder, sig, args):
        where, index = args
        if not is_bits(sig.args[0]):
            emit_prefetch(builder, where, index)
            emit_prefetch(builder, where, builder.add(index, ir.Constant(INTP, LANES)))
        return context.get_dummy_value()

    return types.void(p, types.intp), codegen
