"""What intrinsics that unroll a register tile are made of.

`emit_dot` is one step of a product on 32-bit units: a multiply-add of float32, or of pairs of bfloat16
(`vdpbf16ps` where the target has it, two widened multiply-adds elsewhere), always into float32 sums.
"""

import llvmlite.ir as ir
from numba import errors, types

from hfopt.kernels.jit import compiler, cpu
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.types import BF16X2, F32X, INTP


def intp(value: int) -> ir.Constant:
    """A number of elements, or an index, as code."""
    return ir.Constant(INTP, value)


def is_pairs(pointer: types.CPointer) -> bool:
    return pointer.dtype in (types.uint16, types.uint32)


def _halves(builder, units):
    """Both bfloat16 of each 32-bit unit, widened: (low, high)."""
    low = builder.bitcast(builder.shl(units, simd.splat_int(16)), F32X)
    high = builder.bitcast(builder.and_(units, simd.splat_int(-65536)), F32X)
    return low, high


def emit_dot(builder, total, a, b):
    """total + a * b lane by lane; int32 operands are pairs of bfloat16, whose products are added."""
    if a.type == F32X:
        return simd.emit_fma(builder, a, b, total)
    if cpu.HAS_AVX512_BF16:
        pairs = [builder.bitcast(x, BF16X2) for x in (a, b)]
        return simd.emit_call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32X, [total, *pairs])
    (a_low, a_high), (b_low, b_high) = _halves(builder, a), _halves(builder, b)
    return simd.emit_fma(builder, a_high, b_high, simd.emit_fma(builder, a_low, b_low, total))


def literal_ints(*values) -> list[int]:
    for value in values:
        if not isinstance(value, types.IntegerLiteral):
            raise errors.RequireLiteralValue("tile sizes are literals")
    return [value.literal_value for value in values]


def accumulators(builder, count, vector=F32X):
    zero = ir.Constant(vector, None)
    slots = [compiler.alloca_once(builder, vector) for _ in range(count)]
    for slot in slots:
        builder.store(zero, slot)
    return slots


def outlined(builder, name, args, emit):
    """Calls a function of its own for `emit(builder, args)`, one a module.

    Numba optimises the code of a kernel again for every caller that it is linked into; a large unrolled block in a
    function that is not inlined is copied nowhere, and a call of it costs nothing against its loop.
    """
    function_type = ir.FunctionType(ir.VoidType(), [a.type for a in args])
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, function_type, name)
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        function.attributes.add("nounwind")
        inner = ir.IRBuilder(function.append_basic_block("entry"))
        emit(inner, function.args)
        inner.ret_void()
    builder.call(function, args)


def add_into(builder, slot, a, b):
    builder.store(emit_dot(builder, builder.load(slot), a, b), slot)


def stack_block(builder, element, count):
    # not alloca_once, which fills with zeros at every call
    with builder.goto_entry_block():
        return builder.alloca(ir.ArrayType(element, count))
