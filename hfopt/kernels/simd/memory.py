"""Loads and stores of vectors and numbers, by the element type of a pointer, and prefetches."""

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import cpu
from hfopt.kernels.jit.compiler import emit_call
from hfopt.kernels.simd.constants import INTEGERS
from hfopt.kernels.simd.pointer import is_bits, is_codes, is_e4m3, is_float8, is_halves
from hfopt.kernels.simd.types import (
    BF16X,
    F16X,
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
from hfopt.kernels.simd.vector import elementwise


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


bfloat16 = elementwise(lambda b, x: _emit_widen(b, emit_round(b, x)), "x, rounded to bfloat16.")


def emit_halves(builder, bits16):
    """float16 bits -> float32; exact, and a NaN becomes quiet."""
    if cpu.HAS_FLOAT16:
        return builder.fpext(builder.bitcast(bits16, F16X), F32X)
    # elsewhere fpext would call a function of the C compiler's library, as fptrunc below
    bits = builder.zext(bits16, I32X)
    size = builder.and_(bits, splat_int(0x7FFF))
    exponent = builder.add(builder.shl(size, splat_int(13)), splat_int(112 << 23))
    beyond = builder.add(exponent, splat_int(112 << 23))
    beyond = builder.select(
        builder.icmp_signed(">", size, splat_int(0x7C00)), builder.or_(beyond, splat_int(0x400000)), beyond
    )
    small = builder.bitcast(builder.fmul(builder.sitofp(size, F32X), splat_float(2.0**-24)), I32X)
    value = builder.select(builder.icmp_signed("<", size, splat_int(0x400)), small, exponent)
    value = builder.select(builder.icmp_signed("<", size, splat_int(0x7C00)), value, beyond)
    sign = builder.shl(builder.and_(bits, splat_int(0x8000)), splat_int(16))
    return builder.bitcast(builder.or_(value, sign), F32X)


def emit_half(builder, bits16):
    """`emit_halves` of one."""
    return builder.extract_element(
        emit_halves(builder, emit_splat(builder, bits16, I16X)), ir.Constant(I32, 0)
    )


def _emit_round_to_half(builder, value):
    """float32 -> float16 bits, to nearest even, infinite from 65,520 on; a NaN stays a NaN."""
    if cpu.HAS_FLOAT16:
        return builder.bitcast(builder.fptrunc(value, F16X), I16X)
    bits = builder.bitcast(value, I32X)
    size = builder.and_(bits, splat_int(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, splat_int(13)), splat_int(1))
    rounded = builder.add(size, builder.add(odd, splat_int(0xFFF - (112 << 23))))
    rounded = builder.lshr(rounded, splat_int(13))
    # the last bit of a sum with 1/2 is that of the smallest float16
    small = builder.bitcast(builder.fadd(builder.bitcast(size, F32X), splat_float(0.5)), I32X)
    small = builder.sub(small, splat_int(0x3F000000))
    kept = builder.or_(builder.lshr(size, splat_int(13)), splat_int(0x200))
    kept = builder.or_(builder.and_(kept, splat_int(0x3FF)), splat_int(0x7C00))
    chosen = builder.select(builder.icmp_signed("<", size, splat_int(0x38800000)), small, rounded)
    chosen = builder.select(builder.icmp_signed("<", size, splat_int(0x477FF000)), chosen, splat_int(0x7C00))
    chosen = builder.select(builder.icmp_signed(">", size, splat_int(0x7F800000)), kept, chosen)
    sign = builder.and_(builder.lshr(bits, splat_int(16)), splat_int(0x8000))
    return builder.trunc(builder.or_(chosen, sign), I16X)


def _emit_float8(builder, p, codes):
    """float8 bits -> float32; exact, and a NaN becomes quiet. Those of e5m2 are the upper byte of a float16; those of e4m3
    are its upper bits but for an exponent that is 8 more, and have no infinities (https://arxiv.org/abs/2209.05433)."""
    vector = I16X
    bits = builder.zext(codes, vector)
    eight = ir.Constant(vector, [8] * LANES)
    if not is_e4m3(p):
        return emit_halves(builder, builder.shl(bits, eight))
    size = builder.and_(bits, ir.Constant(vector, [0x7F] * LANES))
    sign = builder.shl(builder.and_(bits, ir.Constant(vector, [0x80] * LANES)), eight)
    half = builder.or_(sign, builder.shl(size, ir.Constant(vector, [7] * LANES)))
    value = builder.fmul(emit_halves(builder, half), splat_float(256.0))
    is_nan = builder.icmp_unsigned("==", size, ir.Constant(vector, [0x7F] * LANES))
    return builder.select(is_nan, splat_float(float("nan")), value)


def emit_integers(builder, codes):
    """16 int8 as float32."""
    return builder.sitofp(builder.sext(codes, I32X), F32X)


def _elements(p):
    """(vector of 16 elements of p as they are in memory, bytes of an element)."""
    if is_bits(p) or is_halves(p):
        return I16X, 2
    return (I8X, 1) if is_codes(p) or is_float8(p) else (F32X, 4)


def _emit_float(builder, p, elements):
    """Elements of p as float32."""
    if is_bits(p):
        return _emit_widen(builder, elements)
    if is_halves(p):
        return emit_halves(builder, elements)
    if is_float8(p):
        return _emit_float8(builder, p, elements)
    return emit_integers(builder, elements) if is_codes(p) else elements


def _emit_element(builder, p, value):
    """float32, rounded to elements of p."""
    if is_bits(p):
        return emit_round(builder, value)
    return _emit_round_to_half(builder, value) if is_halves(p) else value


@intrinsic
def load(typingctx, p, index):
    """16 elements from p + index as float32."""

    def codegen(context, builder, sig, args):
        return _emit_float(builder, sig.args[0], emit_load(builder, *args, *_elements(sig.args[0])))

    return float32x(p, types.intp), codegen


@intrinsic
def load_part(typingctx, p, index, count):
    """`count` (0 to 16) elements from p + index as float32, zeros behind them."""

    def codegen(context, builder, sig, args):
        return _emit_float(builder, sig.args[0], emit_load_masked(builder, *args, *_elements(sig.args[0])))

    return float32x(p, types.intp, types.intp), codegen


@intrinsic
def store(typingctx, p, index, value):
    """16 float32 to p + index, rounded to the element type of p."""

    def codegen(context, builder, sig, args):
        where, index, value = args
        value = _emit_element(builder, sig.args[0], value)
        target = builder.bitcast(builder.gep(where, [index]), value.type.as_pointer())
        builder.store(value, target, align=_elements(sig.args[0])[1])
        return context.get_dummy_value()

    return types.void(p, types.intp, float32x), codegen


@intrinsic
def store_part(typingctx, p, index, count, value):
    """The first `count` (0 to 16) lanes to p + index, rounded to the element type of p."""

    def codegen(context, builder, sig, args):
        where, index, count, value = args
        value = _emit_element(builder, sig.args[0], value)
        target = builder.bitcast(builder.gep(where, [index]), value.type.as_pointer())
        mask = emit_lane_mask(builder, count, LANES)
        name = f"llvm.masked.store.v16{'f32' if value.type == F32X else 'i16'}.p0"
        arguments = [value, target, ir.Constant(I32, _elements(sig.args[0])[1]), mask]
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
            loads = [emit_load(builder, where, place, *_elements(sig.args[0])) for place in places]
            values = [_emit_float(builder, sig.args[0], elements) for elements in loads]
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
            size = _elements(sig.args[0])[1]
            for place, value in ((0, a), (LANES, b)):
                value = _emit_element(builder, sig.args[0], value)
                there = builder.gep(where, [ir.Constant(INTP, place)])
                builder.store(value, builder.bitcast(there, value.type.as_pointer()), align=size)
        return context.get_dummy_value()

    return types.void(p, types.intp, float32x, float32x), codegen


@intrinsic
def load_scalar(typingctx, p, index):
    """One element from p + index as float32."""

    def codegen(context, builder, sig, args):
        value = builder.load(builder.gep(args[0], [args[1]]))
        if is_bits(sig.args[0]):
            return builder.bitcast(builder.shl(builder.zext(value, I32), ir.Constant(I32, 16)), F32)
        if is_halves(sig.args[0]):
            return emit_half(builder, value)
        if is_float8(sig.args[0]):
            wide = _emit_float8(builder, sig.args[0], emit_splat(builder, value, I8X))
            return builder.extract_element(wide, ir.Constant(I32, 0))
        return builder.sitofp(value, F32) if is_codes(sig.args[0]) else value

    return types.float32(p, types.intp), codegen


@intrinsic
def store_scalar(typingctx, p, index, value):
    """One float32 to p + index, rounded to the element type of p."""

    def codegen(context, builder, sig, args):
        where, index, value = args
        elements = _emit_element(builder, sig.args[0], emit_splat(builder, value, F32X))
        value = builder.extract_element(elements, ir.Constant(I32, 0))
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
    what is widened takes longer than its bytes, and was slower with it."""

    def codegen(context, builder, sig, args):
        where, index = args
        if _elements(sig.args[0])[0] == F32X:
            emit_prefetch(builder, where, index)
            emit_prefetch(builder, where, builder.add(index, ir.Constant(INTP, LANES)))
        return context.get_dummy_value()

    return types.void(p, types.intp), codegen
