"""SIMD vectors as Numba values: their type, their operators, and what emits their instructions.

A `Vector` type is an LLVM vector, `<16 x float>`; a kernel holds it in a local variable like any number,
and every operation is an intrinsic that emits one instruction or a short fixed sequence. All vectors have 16 lanes:
LLVM splits what is wider than the machine's registers, so one source serves AVX-512, AVX2 and NEON.

What kernels call is in `vector` (arithmetic), `functions` (exp and the like) and `pointer` (memory).
"""

import operator

import llvmlite.ir as ir
from numba import types
from numba.extending import models, register_model

from hfopt.kernels.jit import compiler
from hfopt.kernels.jit.compiler import BFLOAT, define_operator, emit_call

LANES = 16

F32 = ir.FloatType()
INTP, I32 = compiler.INTP, compiler.I32
I16 = ir.IntType(16)
I8 = ir.IntType(8)
F32X = ir.VectorType(F32, LANES)
I32X = ir.VectorType(I32, LANES)
I16X = ir.VectorType(I16, LANES)
I8X = ir.VectorType(I8, LANES)


BF16X = ir.VectorType(BFLOAT, LANES)
F16X = ir.VectorType(ir.HalfType(), LANES)
BF16X2 = ir.VectorType(BFLOAT, 2 * LANES)


class Vector(types.Type):
    """Numba type of a vector of 16 float32."""

    def __init__(self):
        super().__init__(name=f"vector<{LANES} x float32>")


float32x = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, F32X)


for _op, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    define_operator(_op, float32x, _method)


# ---- emitters: what the intrinsics and the register tiles are made of -------------------------------------------------


def splat_float(value: float) -> ir.Constant:
    return ir.Constant(F32X, [ir.Constant(F32, value)] * LANES)


def splat_int(value: int) -> ir.Constant:
    return ir.Constant(I32X, [ir.Constant(I32, value)] * LANES)


def emit_splat(builder, scalar, vector_type):
    undefined = ir.Constant(vector_type, ir.Undefined)
    one = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    lanes = ir.Constant(ir.VectorType(I32, vector_type.count), [0] * vector_type.count)
    return builder.shuffle_vector(one, undefined, lanes)


def emit_fma(builder, a, b, c):
    # fmuladd, not fma: a target without the instruction would call libm once a lane
    return emit_call(builder, "llvm.fmuladd.v16f32", F32X, [a, b, c])


def emit_fence(builder, x):
    return emit_call(builder, "llvm.arithmetic.fence.v16f32", F32X, [x])


def emit_load(builder, pointer, index, vector_type, alignment):
    where = builder.bitcast(builder.gep(pointer, [index]), vector_type.as_pointer())
    return builder.load(where, align=alignment)


def emit_lane_mask(builder, count, lanes):
    """The first `count` of `lanes` bits set."""
    vector = ir.VectorType(I32, lanes)
    limit = emit_splat(builder, builder.trunc(count, I32), vector)
    return builder.icmp_signed("<", ir.Constant(vector, list(range(lanes))), limit)


def emit_load_masked(builder, pointer, index, count, vector_type, alignment):
    """The first `count` lanes, zeros behind them; no memory behind them is read."""
    # Up to LLVM 21 the alignment is an argument; newer versions upgrade this form when they parse it.
    kind = "f32" if vector_type.element == F32 else f"i{vector_type.element.width}"
    where = builder.bitcast(builder.gep(pointer, [index]), vector_type.as_pointer())
    mask = emit_lane_mask(builder, count, vector_type.count)
    args = [where, ir.Constant(I32, alignment), mask, ir.Constant(vector_type, None)]
    return emit_call(builder, f"llvm.masked.load.v{vector_type.count}{kind}.p0", vector_type, args)


def emit_polynomial(builder, x, coefficients):
    """Horner's scheme, highest power first."""
    result = splat_float(coefficients[0])
    for coefficient in coefficients[1:]:
        result = emit_fma(builder, result, x, splat_float(coefficient))
    return result


def emit_prefetch(builder, pointer, index):
    where = builder.bitcast(builder.gep(pointer, [index]), ir.IntType(8).as_pointer())
    hints = [ir.Constant(I32, value) for value in (0, 2, 1)]  # for reading, up to the L2 cache, data
    emit_call(builder, "llvm.prefetch.p0", ir.VoidType(), [where, *hints])
