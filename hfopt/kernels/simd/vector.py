"""Operations on vectors beside `+ - * /`: arithmetic, comparisons, and the order of lanes."""

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit.compiler import emit_call
from hfopt.kernels.simd.types import (
    F32,
    F32X,
    I16,
    I32,
    I32X,
    INTP,
    LANES,
    emit_fence,
    emit_fma,
    emit_lane_mask,
    emit_splat,
    float32x,
)

# ---- arithmetic -------------------------------------------------------------------------------------------------------


def elementwise(emit, doc):
    """Intrinsic of one vector whose code `emit` makes."""

    def typed(typingctx, x):
        return float32x(float32x), lambda context, builder, sig, args: emit(builder, args[0])

    typed.__doc__ = doc
    return intrinsic(typed)


def _reduction(name, doc, first=None):
    def typed(typingctx, x):
        def codegen(context, builder, sig, args):
            # reassoc: a tree of adds instead of 16 in a row; its shape is fixed by the target
            head = [] if first is None else [ir.Constant(F32, first)]
            return emit_call(
                builder, f"llvm.vector.reduce.{name}.v16f32", F32, [*head, args[0]], fastmath=("reassoc",)
            )

        return types.float32(float32x), codegen

    typed.__doc__ = doc
    return intrinsic(typed)


absolute = elementwise(lambda b, x: emit_call(b, "llvm.fabs.v16f32", F32X, [x]), "|x|.")
sum_lanes = _reduction("fadd", "Sum of the 16 lanes.", first=-0.0)
max_lanes = _reduction("fmaximum", "Largest of the 16 lanes; NaN if one is.")


@intrinsic
def splat(typingctx, value):
    """The number in every lane, as float32."""

    def codegen(context, builder, sig, args):
        return emit_splat(builder, args[0], F32X)

    return float32x(types.float32), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c."""

    def codegen(context, builder, sig, args):
        return emit_fma(builder, *args)

    return float32x(float32x, float32x, float32x), codegen


def _as_written(method, flag, doc):
    """Intrinsic of two vectors. The flag means nothing to the instruction, and keeps away those that Numba gives to
    instructions without any: reciprocals instead of quotients, and sums fused with products."""

    def typed(typingctx, a, b):
        def codegen(context, builder, sig, args):
            return getattr(builder, method)(*args, flags=(flag,))

        return float32x(float32x, float32x), codegen

    typed.__doc__ = doc
    return intrinsic(typed)


added = _as_written("fadd", "contract", "a + b, in the order in which sums are written.")
product = _as_written("fmul", "afn", "a * b, rounded before it is added to anything.")
quotient = _as_written("fdiv", "contract", "a / b, rounded as IEEE 754 says.")


@intrinsic
def fence(typingctx, x):
    """x, as a whole: no operation is moved across it, so (a - b) - c stays what it says."""

    def codegen(context, builder, sig, args):
        return emit_fence(builder, args[0])

    return float32x(float32x), codegen


@intrinsic
def maximum(typingctx, a, b):
    """Larger of each lane; NaN if either is."""

    def codegen(context, builder, sig, args):
        a, b = args
        larger = builder.select(builder.fcmp_ordered(">", a, b), a, b)
        return builder.select(builder.fcmp_unordered("uno", a, a), a, larger)

    return float32x(float32x, float32x), codegen


@intrinsic
def larger(typingctx, a, b):
    """a where it is larger than b, else b, which is also what a NaN leaves."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return float32x(float32x, float32x), codegen


@intrinsic
def lanes_from(typingctx, x, bound):
    """Bit k is set where lane k is not below the number `bound`; a NaN is not."""

    def codegen(context, builder, sig, args):
        x, bound = args
        reached = builder.fcmp_unordered(">=", x, emit_splat(builder, bound, F32X))
        return builder.zext(builder.bitcast(reached, I16), INTP)

    return types.intp(float32x, types.float32), codegen


@intrinsic
def where_part(typingctx, count, inside, outside):
    """`inside` in the first `count` lanes, `outside` in the others."""

    def codegen(context, builder, sig, args):
        return builder.select(emit_lane_mask(builder, args[0], LANES), args[1], args[2])

    return float32x(types.intp, float32x, float32x), codegen


@intrinsic
def lane_numbers(typingctx):
    """(0, 1, ..., 15)."""
    numbers = ir.Constant(F32X, [ir.Constant(F32, float(k)) for k in range(LANES)])
    return float32x(), lambda context, builder, sig, args: numbers


@intrinsic
def lane(typingctx, x, index):
    """Lane `index` as a number."""

    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], builder.trunc(args[1], I32))

    return types.float32(float32x, types.intp), codegen


# ---- lanes as pairs ---------------------------------------------------------------------------------------------------


@intrinsic
def rotated_pairs(typingctx, x):
    """(-x1, x0, -x3, x2, ...): pairs of lanes as complex numbers, times i."""

    def codegen(context, builder, sig, args):
        order = ir.Constant(ir.VectorType(I32, LANES), [k ^ 1 for k in range(LANES)])
        swapped = builder.shuffle_vector(args[0], args[0], order)
        sign = ir.Constant(I32X, [ir.Constant(I32, 0 if k & 1 else -(2**31)) for k in range(LANES)])
        return builder.bitcast(builder.xor(builder.bitcast(swapped, I32X), sign), F32X)

    return float32x(float32x), codegen


@intrinsic
def doubled(typingctx, x):
    """(x0, x0, x1, x1, ..., x7, x7)."""

    def codegen(context, builder, sig, args):
        order = ir.Constant(ir.VectorType(I32, LANES), [k // 2 for k in range(LANES)])
        return builder.shuffle_vector(args[0], args[0], order)

    return float32x(float32x), codegen
