"""Register tiles of decode attention, each unrolled by one intrinsic.

A tile is 1, 2 or 4 queries, side by side in a vector of 16 units (float32, or pairs of bfloat16): each has
`width` = 16 / queries lanes. A key goes through them in segments of `width` units, broadcast to all queries,
so that little is left to be added across lanes, and a vector of results holds `width` keys of each query.

Keys and values come in blocks of 16 rows, `stride` units apart, at addresses that a list names.

Codes meet queries and weights of bfloat16 models as 16-bit integers, in pairs as bfloat16 does, or meet four queries as two
8-bit digits of these, for which nothing is widened: that takes fewer instructions than making bfloat16 of codes, and
rounding to 16 bits costs less than rounding to bfloat16 does. With float32 they are widened to that. Either way their scales
are left to the caller. float16 is *narrow* too: its keys and values are widened to float32, as queries are before.
"""

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import cpu
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.emit import emit_dot, intp, is_pairs
from hfopt.kernels.simd.integer_dot import emit_dot_shorts
from hfopt.kernels.simd.memory import emit_halves, emit_integers
from hfopt.kernels.simd.pointer import is_codes, is_halves
from hfopt.kernels.simd.types import F32X, I8, I16, I32X, LANES

BLOCK = LANES  # rows of a block
_SHORTS = ir.VectorType(I16, 2 * LANES)
_AGAIN = 4096  # bytes; measured: 2048 and 8192 are worse


def emit_ahead(builder, row, index, ahead, again):
    """Asks for the line `ahead` bytes behind unit `index` of a row, and again for the one `again` bytes behind it.

    A core has room for few requests and drops those that find none; the second asks for what was dropped.
    """
    here = builder.bitcast(builder.gep(row, [index]), ir.IntType(8).as_pointer())
    simd.emit_prefetch(builder, here, ahead)
    simd.emit_prefetch(builder, here, again)


def emit_again(builder, addresses, n_blocks, n_bytes):
    """Bytes from a line of a block of n_bytes to the one that is asked for again: 4 KiB where blocks follow each other.

    Else 0: what lies behind a block that may be anywhere is not read next.
    """
    second = builder.select(builder.icmp_signed(">", n_blocks, intp(1)), intp(1), intp(0))
    first, other = (builder.load(builder.gep(addresses, [i])) for i in (intp(0), second))
    apart = builder.sub(other, first)
    follow = builder.icmp_signed("==", apart, builder.mul(n_bytes, second))
    return builder.select(follow, intp(_AGAIN), intp(0))


def emit_block(builder, addresses, index, unit):
    address = builder.load(builder.gep(addresses, [index]))
    return builder.inttoptr(address, unit.as_pointer())


def narrow_type(like):
    """Type of elements that are widened as they are read: codes, or the bits of float16; None if they are units."""
    return I8 if is_codes(like) else I16 if is_halves(like) else None


def line_elements(narrow):
    """Narrow elements in 64 bytes."""
    return 512 // narrow.width


def emit_narrow(builder, row, place, pairs):
    """16 units of the narrow elements from row + place on."""
    if row.type.pointee == I16:
        return emit_halves(builder, simd.emit_load(builder, row, place, simd.I16X, 2))
    if not pairs:
        return emit_integers(builder, simd.emit_load(builder, row, place, simd.I8X, 1))
    codes = simd.emit_load(builder, row, place, ir.VectorType(I8, 2 * LANES), 1)
    return builder.bitcast(builder.sext(codes, _SHORTS), I32X)


def add_product(builder, slot, a, b):
    """`add_into`, or for sums of integers that of pairs of them."""
    total = builder.load(slot)
    if total.type == F32X:
        builder.store(emit_dot(builder, total, a, b), slot)
    elif cpu.HAS_AVX512_VNNI:
        # since LLVM 22 the operands are of 16 bits; it upgrades this older form when it parses it
        total = simd.emit_call(builder, "llvm.x86.avx512.vpdpwssd.512", I32X, [total, a, b])
        builder.store(total, slot)
    else:
        products = emit_dot_shorts(builder, *(builder.bitcast(x, _SHORTS) for x in (a, b)))
        builder.store(builder.add(total, products), slot)


def kind_of(pairs, narrow):
    return f"{'pairs' if pairs else 'floats'}{f'.{narrow}' if narrow else ''}"


@intrinsic
def takes_integers(typingctx, like, codes):
    """Whether codes meet queries and weights of this type as integers."""
    yes = ir.Constant(ir.IntType(1), is_pairs(like) and is_codes(codes))
    return types.boolean(like, codes), lambda context, builder, sig, args: yes


@intrinsic
def again_of(typingctx, addresses, n_blocks, n_bytes):
    """See `emit_again`."""

    def codegen(context, builder, sig, args):
        return emit_again(builder, *args)

    return types.intp(types.CPointer(types.int64), types.intp, types.intp), codegen


@intrinsic
def ask_ahead(typingctx, address, ahead, again):
    """See `emit_ahead`."""

    def codegen(context, builder, sig, args):
        emit_ahead(builder, builder.inttoptr(args[0], I8.as_pointer()), intp(0), *args[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen
