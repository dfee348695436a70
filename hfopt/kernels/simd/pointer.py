"""Pointers, through which bodies reach memory; `memory` has what they do there.

They are made from arrays by `pointer` and from integer addresses by `address_as`: `CPointer(float32)`,
`CPointer(uint16)` for the bits of bfloat16, or `CPointer(int16)` for those of float16. The element type decides how `load`
widens and how `store` rounds, so a body is written once and specialised by the types of its arguments. `CPointer(int8)` is
for codes of the cache: `load` gives the integers, and what is stored is told its scale. `CPointer(uint8)` is for bytes, and
for float8_e5m2 where a cache is of it, `CPointer(E4M3)` for float8_e4m3fn: `load` widens both.

*Units* are the 32 bits that products are made of: a float32, or a pair of bfloat16. float16 has none of its own, as there is
no instruction for its products: it is packed as float32, and where it is read in place, widened as it is read.

*Witnesses of types*: addresses are numbers, by which Numba cannot specialise. So a launch gets an empty array of the
element type besides, `like`, and where it reads a cache one of that of its elements, `held`, which may be codes; bodies
get pointers of these types by the same names. Nothing is ever read through them.
"""

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import compiler
from hfopt.kernels.simd.types import (
    INTP,
)


def is_bits(p: types.CPointer) -> bool:
    return p.dtype is types.uint16


def is_halves(p: types.CPointer) -> bool:
    return p.dtype is types.int16


def is_codes(p: types.CPointer) -> bool:
    return p.dtype is types.int8


E4M3 = types.Integer(
    "float8_e4m3fn", 8, False
)  # arrays that stand for it are of bool: numpy has no other type of a byte


def is_e5m2(p: types.CPointer) -> bool:
    return p.dtype is types.uint8


def is_e4m3(p: types.CPointer) -> bool:
    return p.dtype is E4M3


def is_float8(p: types.CPointer) -> bool:
    return is_e5m2(p) or is_e4m3(p)


@intrinsic
def pointer(typingctx, array):
    """Pointer to the first element of an array."""
    result = types.CPointer(E4M3 if array.dtype is types.boolean else array.dtype)

    def codegen(context, builder, sig, args):
        return compiler.array_data(context, builder, sig.args[0], args[0])

    return result(array), codegen


@intrinsic
def address_of(typingctx, p):
    """The address as a number."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(args[0], INTP)

    return types.int64(p), codegen


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
bytes_at = _pointer_at(types.uint8, "Integer address as a pointer to bytes.")
integers_at = _pointer_at(types.int64, "Integer address as a pointer to int64.")


@intrinsic
def scales_at(typingctx, address, like):
    """Integer address as a pointer to the float32 scales of codes; None if a pointer like this is to no codes."""
    result = types.CPointer(types.float32) if is_codes(like) else types.none

    def codegen(context, builder, sig, args):
        if sig.return_type is types.none:
            return context.get_dummy_value()
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return result(types.intp, like), codegen


@intrinsic
def item_bytes(typingctx, p):
    """Bytes of an element."""
    size = p.dtype.bitwidth // 8
    return types.intp(p), lambda context, builder, sig, args: ir.Constant(INTP, size)


@intrinsic
def shifted(typingctx, p, count):
    """p + count elements."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return p(p, types.intp), codegen


@intrinsic
def as_packed(typingctx, p, like):
    """The same address as a pointer to elements of `like` as they are packed: float32 for float16, else as they are."""
    result = types.CPointer(types.float32) if is_halves(like) else like

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], context.get_value_type(sig.return_type))

    return result(p, like), codegen


@intrinsic
def as_gathered(typingctx, packed, like):
    """The same address as a pointer to what elements of `like` are where decode attention has copied them: packed for
    float8, else as they are."""
    result = packed if is_float8(like) else like

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], context.get_value_type(sig.return_type))

    return result(packed, like), codegen


@intrinsic
def as_units(typingctx, p, like):
    """The same address as a pointer to 32-bit units for elements of `like`: pairs of bfloat16 (uint32) or float32."""
    result = types.CPointer(types.uint32 if is_bits(like) else types.float32)

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], context.get_value_type(sig.return_type))

    return result(p, like), codegen


@intrinsic
def pointer_as(typingctx, p, like):
    """The same address as a pointer of the type of `like`."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], context.get_value_type(sig.return_type))

    return like(p, like), codegen
