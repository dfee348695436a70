"""SIMD vectors as Numba values.

A `Vector` type is an LLVM vector, `<16 x float>`; a kernel holds it in a local variable like any number,
and every operation is an intrinsic that emits one instruction or a short fixed sequence. All vectors have 16 lanes:
LLVM splits what is wider than the machine's registers, so one source serves AVX-512, AVX2 and NEON.

Memory is reached through typed pointers, made from arrays by `pointer` and from integer addresses by `address_as`:
`CPointer(float32)`, or `CPointer(uint16)` for the bits of bfloat16. The element type decides how `load` widens and how
`store` rounds, so a body is written once and specialised by the types of its arguments.
"""

import operator

import llvmlite.ir as ir
from llvmlite.ir.types import _BaseFloatType
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from . import _target

LANES = 16

F32 = ir.FloatType()
_INTP = ir.IntType(64)
I32 = ir.IntType(32)
I16 = ir.IntType(16)
F32X = ir.VectorType(F32, LANES)
I32X = ir.VectorType(I32, LANES)
I16X = ir.VectorType(I16, LANES)


class _BFloatType(_BaseFloatType):
    """LLVM's `bfloat`, which llvmlite lacks; no constant of it is ever made."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloatType._create_instance()
BF16X = ir.VectorType(_BFloatType(), LANES)
BF16X2 = ir.VectorType(_BFloatType(), 2 * LANES)


class Vector(types.Type):
    """Numba type of a vector of 16 float32."""

    def __init__(self):
        super().__init__(name=f"vector<{LANES} x float32>")


float32x = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, F32X)


# ---- emitters: what the intrinsics here and the register tiles in _tile.py are made of --------------------------------


def splat_float(value: float) -> ir.Constant:
    return ir.Constant(F32X, [ir.Constant(F32, value)] * LANES)


def splat_int(value: int) -> ir.Constant:
    return ir.Constant(I32X, [ir.Constant(I32, value)] * LANES)


def emit_splat(builder, scalar, vector_type):
    undefined = ir.Constant(vector_type, ir.Undefined)
    one = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    lanes = ir.Constant(ir.VectorType(I32, vector_type.count), [0] * vector_type.count)
    return builder.shuffle_vector(one, undefined, lanes)


def emit_call(builder, name, result, args, **flags):
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args, **flags)


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


def emit_widen(builder, bits16):
    """bfloat16 bits -> float32; exact: the bits are the upper half."""
    return builder.bitcast(builder.shl(builder.zext(bits16, I32X), splat_int(16)), F32X)


def emit_round(builder, value):
    """float32 -> bfloat16 bits, to nearest even; a NaN stays a NaN."""
    if _target.HAS_AVX512_BF16:
        return builder.bitcast(builder.fptrunc(value, BF16X), I16X)
    # elsewhere fptrunc would call a function of the C compiler's library, which is not there
    bits = builder.bitcast(value, I32X)
    odd = builder.and_(builder.lshr(bits, splat_int(16)), splat_int(1))
    rounded = builder.add(bits, builder.add(odd, splat_int(0x7FFF)))
    quiet = builder.or_(bits, splat_int(0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, splat_int(16)), I16X)


def _polynomial(builder, x, coefficients):
    """Horner's scheme, highest power first."""
    result = splat_float(coefficients[0])
    for coefficient in coefficients[1:]:
        result = emit_fma(builder, result, x, splat_float(coefficient))
    return result


def _clamp(builder, x, low, high):
    """x within [low, high]; low for a NaN."""
    above = emit_call(builder, "llvm.maxnum.v16f32", F32X, [x, splat_float(low)])
    return emit_call(builder, "llvm.minnum.v16f32", F32X, [above, splat_float(high)])


_ROUND = 12582912.0  # 1.5 * 2^23: a float32 plus this has its nearest integer in its lowest bits


def emit_exp(builder, x):
    """e^x = 2^n e^r, |r| <= ln(2)/2, e^r by a minimax polynomial; 0 below -87.3, inf above 88.7, NaN kept."""
    shifted = emit_fence(builder, emit_fma(builder, x, splat_float(1.44269504088896341), splat_float(_ROUND)))
    n = builder.fsub(shifted, splat_float(_ROUND))
    r = emit_fma(builder, n, splat_float(-0.693359375), x)
    r = emit_fma(builder, n, splat_float(2.12194440e-4), r)
    p = _polynomial(
        builder,
        r,
        [
            1.381459878757596e-3,
            8.368716575205326e-3,
            4.166838899254799e-2,
            1.666652113199234e-1,
            4.999999403953552e-1,
            1.0,
            1.0,
        ],
    )
    # n is added to the exponent, which has room: where n is 128, p is below 1, and where it is -126, not
    exponent = builder.shl(builder.bitcast(shifted, I32X), splat_int(23))
    p = builder.bitcast(builder.add(builder.bitcast(p, I32X), exponent), F32X)
    p = builder.select(builder.fcmp_ordered("<", x, splat_float(-87.33)), splat_float(0.0), p)
    beyond = builder.fmul(x, splat_float(float("inf")))
    return builder.select(builder.fcmp_unordered(">", x, splat_float(88.72)), beyond, p)


def _rational(builder, x, numerator, denominator, limit):
    """x P(x^2) / Q(x^2) on |x| <= limit, NaN kept."""
    bounded = _clamp(builder, x, -limit, limit)
    square = builder.fmul(bounded, bounded)
    top = builder.fmul(bounded, _polynomial(builder, square, numerator))
    value = builder.fdiv(top, _polynomial(builder, square, denominator))
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


def emit_tanh(builder, x):
    """Cephes tanhf: 1 - 2 / (e^2|x| + 1) with the sign of x, and an odd polynomial below 0.625."""
    size = emit_call(builder, "llvm.fabs.v16f32", F32X, [x])
    grown = emit_exp(builder, builder.fmul(size, splat_float(2.0)))
    quotient = builder.fdiv(splat_float(2.0), builder.fadd(grown, splat_float(1.0)))
    far = builder.fsub(splat_float(1.0), quotient)
    far = emit_call(builder, "llvm.copysign.v16f32", F32X, [far, x])
    square = builder.fmul(x, x)
    p = _polynomial(
        builder,
        square,
        [-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1],
    )
    near = emit_fma(builder, builder.fmul(x, square), p, x)
    return builder.select(builder.fcmp_unordered("<", size, splat_float(0.625)), near, far)


_ERF_NUMERATOR = [
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
]
_ERF_DENOMINATOR = [
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
]


def emit_erf(builder, x):
    """Rational minimax approximation of Eigen (erf for float)."""
    return _rational(
        builder,
        x,
        _ERF_NUMERATOR,
        _ERF_DENOMINATOR,
        4.0,
    )


# ---- pointers ---------------------------------------------------------------------------------------------------------


@intrinsic
def pointer(typingctx, array):
    """Pointer to the first element of an array."""
    result = types.CPointer(array.dtype)

    def codegen(context, builder, sig, args):
        return context.make_array(sig.args[0])(context, builder, args[0]).data

    return result(array), codegen


@intrinsic
def address_as(typingctx, address, like):
    """Integer address as a pointer of the type of `like`."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return like(types.intp, like), codegen


def _pointer_at(dtype, doc):
    def typed(typingctx, address):
        result = types.CPointer(dtype)

        def codegen(context, builder, sig, args):
            return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

        return result(types.intp), codegen

    typed.__doc__ = doc
    return intrinsic(typed)


floats_at = _pointer_at(types.float32, "Integer address as a pointer to float32.")
integers_at = _pointer_at(types.int64, "Integer address as a pointer to int64.")


@intrinsic
def shifted(typingctx, p, count):
    """p + count elements."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return p(p, types.intp), codegen


@intrinsic
def as_units(typingctx, p, like):
    """The same address as a pointer to 32-bit units for elements of `like`: pairs of bfloat16 (uint32) or float32."""
    result = types.CPointer(types.uint32 if like.dtype is types.uint16 else types.float32)

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], context.get_value_type(sig.return_type))

    return result(p, like), codegen


@intrinsic
def pointer_as(typingctx, p, like):
    """The same address as a pointer of the type of `like`."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], context.get_value_type(sig.return_type))

    return like(p, like), codegen


# ---- loads and stores -------------------------------------------------------------------------------------------------


def _is_bits(p: types.CPointer) -> bool:
    return p.dtype is types.uint16


@intrinsic
def load(typingctx, p, index):
    """16 elements from p + index as float32."""

    def codegen(context, builder, sig, args):
        if _is_bits(sig.args[0]):
            return emit_widen(builder, emit_load(builder, args[0], args[1], I16X, 2))
        return emit_load(builder, args[0], args[1], F32X, 4)

    return float32x(p, types.intp), codegen


@intrinsic
def load_part(typingctx, p, index, count):
    """`count` (0 to 16) elements from p + index as float32, zeros behind them."""

    def codegen(context, builder, sig, args):
        if _is_bits(sig.args[0]):
            return emit_widen(builder, emit_load_masked(builder, args[0], args[1], args[2], I16X, 2))
        return emit_load_masked(builder, args[0], args[1], args[2], F32X, 4)

    return float32x(p, types.intp, types.intp), codegen


@intrinsic
def store(typingctx, p, index, value):
    """16 float32 to p + index, rounded to the element type of p."""

    def codegen(context, builder, sig, args):
        where, index, value = args
        bits = _is_bits(sig.args[0])
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
        bits = _is_bits(sig.args[0])
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
def load_two(typingctx, p, index):
    """32 elements from p + index as two vectors of float32, for `store_two` or for sums.

    Of bfloat16 one has the even elements and the other the odd ones, which are widened at half the cost of neighbours.
    """
    pair = types.UniTuple(float32x, 2)

    def codegen(context, builder, sig, args):
        where, index = args
        if _is_bits(sig.args[0]):
            units = emit_load(builder, where, index, I32X, 2)
            even, odd = builder.shl(units, splat_int(16)), builder.and_(units, splat_int(-65536))
            values = [builder.bitcast(even, F32X), builder.bitcast(odd, F32X)]
        else:
            places = [index, builder.add(index, ir.Constant(_INTP, LANES))]
            values = [emit_load(builder, where, place, F32X, 4) for place in places]
        return context.make_tuple(builder, pair, values)

    return pair(p, types.intp), codegen


@intrinsic
def store_two(typingctx, p, index, a, b):
    """32 float32 as `load_two` has them to p + index, rounded to the element type of p."""

    def codegen(context, builder, sig, args):
        where, index, a, b = args
        where = builder.gep(where, [index])
        if _is_bits(sig.args[0]):
            order = ir.Constant(
                ir.VectorType(I32, 2 * LANES), [k // 2 + k % 2 * LANES for k in range(2 * LANES)]
            )
            bits = builder.shuffle_vector(emit_round(builder, a), emit_round(builder, b), order)
            builder.store(bits, builder.bitcast(where, bits.type.as_pointer()), align=2)
        else:
            builder.store(a, builder.bitcast(where, F32X.as_pointer()), align=4)
            second = builder.gep(where, [ir.Constant(_INTP, LANES)])
            builder.store(b, builder.bitcast(second, F32X.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(p, types.intp, float32x, float32x), codegen


@intrinsic
def load_scalar(typingctx, p, index):
    """One element from p + index as float32."""

    def codegen(context, builder, sig, args):
        value = builder.load(builder.gep(args[0], [args[1]]))
        if _is_bits(sig.args[0]):
            return builder.bitcast(builder.shl(builder.zext(value, I32), ir.Constant(I32, 16)), F32)
        return value

    return types.float32(p, types.intp), codegen


@intrinsic
def store_scalar(typingctx, p, index, value):
    """One float32 to p + index, rounded to the element type of p."""

    def codegen(context, builder, sig, args):
        where, index, value = args
        if _is_bits(sig.args[0]):
            value = builder.extract_element(
                emit_round(builder, emit_splat(builder, value, F32X)), ir.Constant(I32, 0)
            )
        builder.store(value, builder.gep(where, [index]))
        return context.get_dummy_value()

    return types.void(p, types.intp, types.float32), codegen


# ---- arithmetic -------------------------------------------------------------------------------------------------------


def _unary(emit, doc):
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


exp = _unary(emit_exp, "e^x.")
tanh = _unary(emit_tanh, "Hyperbolic tangent.")
erf = _unary(emit_erf, "Error function.")
absolute = _unary(lambda b, x: emit_call(b, "llvm.fabs.v16f32", F32X, [x]), "|x|.")
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
        return builder.zext(builder.bitcast(reached, I16), _INTP)

    return types.intp(float32x, types.float32), codegen


@intrinsic
def where_part(typingctx, count, inside, outside):
    """`inside` in the first `count` lanes, `outside` in the others."""

    def codegen(context, builder, sig, args):
        return builder.select(emit_lane_mask(builder, args[0], LANES), args[1], args[2])

    return float32x(types.intp, float32x, float32x), codegen


@intrinsic
def lane(typingctx, x, index):
    """Lane `index` as a number."""

    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], builder.trunc(args[1], I32))

    return types.float32(float32x, types.intp), codegen


def emit_prefetch(builder, pointer, index):
    where = builder.bitcast(builder.gep(pointer, [index]), ir.IntType(8).as_pointer())
    hints = [ir.Constant(I32, value) for value in (0, 2, 1)]  # for reading, up to the L2 cache, data
    emit_call(builder, "llvm.prefetch.p0", ir.VoidType(), [where, *hints])


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
        if not _is_bits(sig.args[0]):
            emit_prefetch(builder, where, index)
            emit_prefetch(builder, where, builder.add(index, ir.Constant(_INTP, LANES)))
        return context.get_dummy_value()

    return types.void(p, types.intp), codegen


def _binary_operator(op, method):
    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args, kws):
            if args == (float32x, float32x):
                return signature(float32x, float32x, float32x)
            return None

    @lower_builtin(op, float32x, float32x)
    def lower(context, builder, sig, args):
        return getattr(builder, method)(*args)


for _op, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _binary_operator(_op, _method)


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


@intrinsic
def fence(typingctx, x):
    """x, as a whole: no operation is moved across it, so (a - b) - c stays what it says."""

    def codegen(context, builder, sig, args):
        return emit_fence(builder, args[0])

    return float32x(float32x), codegen
