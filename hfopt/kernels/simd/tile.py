"""Register tiles of matrix products, each unrolled by one intrinsic."""

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import compiler
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.emit import (
    accumulators,
    add_into,
    intp,
    is_pairs,
    literal_ints,
    outlined,
    stack_block,
)
from hfopt.kernels.simd.memory import emit_half, emit_halves
from hfopt.kernels.simd.pointer import is_halves
from hfopt.kernels.simd.types import F32, F32X, I16X, I32, I32X, INTP, LANES

# A sum is carried over at most this many units before it is added to the total: the rounding errors of one long
# chain of adds grow with its length.
_SUM_DEPTH = 128


def _transpose(builder, rows):
    """16 vectors of 16 lanes, transposed: a butterfly that swaps off-diagonal blocks of 1, 2, 4 and 8 lanes."""
    rows = list(rows)
    span = 1
    while span < LANES:
        first = [k if not k & span else LANES + k - span for k in range(LANES)]
        second = [k + span if not k & span else LANES + k for k in range(LANES)]
        lanes = [ir.Constant(ir.VectorType(I32, LANES), order) for order in (first, second)]
        for j in range(LANES):
            if not j & span:
                pair = rows[j], rows[j + span]
                rows[j] = builder.shuffle_vector(*pair, lanes[0])
                rows[j + span] = builder.shuffle_vector(*pair, lanes[1])
        span *= 2
    return rows


def add_lanes(builder, vectors):
    """Lane g * n + j = sum of the lanes of segment g of vector j, for n vectors: 16 of whole vectors, or fewer of
    16 / n segments.

    Halves are folded together until one vector is left.
    """
    add = builder.fadd if vectors[0].type == F32X else builder.add
    span = len(vectors) // 2
    while span:
        # lanes with bit `span` clear take the first vector of a pair, the others the second
        own = [k if not k & span else LANES + k for k in range(LANES)]
        other = [k + span if not k & span else LANES + k - span for k in range(LANES)]
        lanes = [ir.Constant(ir.VectorType(I32, LANES), order) for order in (own, other)]
        half = len(vectors) // 2
        vectors = [
            add(*(builder.shuffle_vector(a, b, order) for order in lanes))
            for a, b in zip(vectors[:half], vectors[half:], strict=True)
        ]
        span //= 2
    return vectors[0]


@intrinsic
def sum_rows(typingctx, p):
    """16 sums of 16 float32 each: lane j is the sum of p[16 j] ... p[16 j + 15]."""

    def emit(builder, args):
        source, target = args
        rows = [simd.emit_load(builder, source, intp(j * LANES), F32X, 4) for j in range(LANES)]
        builder.store(add_lanes(builder, rows), target)

    def codegen(context, builder, sig, args):
        result = compiler.alloca_once(builder, F32X)
        outlined(builder, "hfopt.sum_rows", [args[0], result], emit)
        return builder.load(result)

    return simd.float32x(p), codegen


@intrinsic(prefer_literal=True)
def outer_tile(typingctx, a, b, size, out, n_rows, n_vectors, accumulate):
    """out[i, :] (+)= sum over k < size of a[k * n_rows + i] b[k, :], rows of 16 * n_vectors (literals).

    a and b are packed 32-bit units (`CPointer(float32)` or pairs of bfloat16 as `CPointer(uint32)`), out is float32.
    """
    rows, vectors = literal_ints(n_rows, n_vectors)
    signature = types.void(a, b, types.intp, out, n_rows, n_vectors, types.boolean)

    pairs = is_pairs(a)

    def emit(builder, args):
        a, b, size, out, accumulated = args
        vector = I32X if pairs else F32X
        zero, depth = intp(0), intp(_SUM_DEPTH)
        slots = accumulators(builder, rows * vectors)
        places = [intp(p * LANES) for p in range(rows * vectors)]

        def add_unit(unit):
            a_row = builder.mul(unit, intp(rows))
            b_row = builder.mul(unit, intp(vectors * LANES))
            b_values = [
                simd.emit_load(builder, b, builder.add(b_row, intp(j * LANES)), vector, 4)
                for j in range(vectors)
            ]
            for i in range(rows):
                value = builder.load(builder.gep(a, [builder.add(a_row, intp(i))]), align=4)
                a_value = simd.emit_splat(builder, value, vector)
                for j, b_value in enumerate(b_values):
                    add_into(builder, slots[i * vectors + j], a_value, b_value)

        rounds = builder.udiv(builder.add(size, intp(_SUM_DEPTH - 1)), depth)
        with compiler.for_range(builder, rounds) as blocks:
            first = builder.mul(blocks.index, depth)
            left = builder.sub(size, first)
            count = builder.select(builder.icmp_signed("<", left, depth), left, depth)
            for slot in slots:
                builder.store(ir.Constant(F32X, None), slot)
            with compiler.for_range(builder, count) as loop:
                add_unit(builder.add(first, loop.index))
            fresh = builder.and_(builder.icmp_signed("==", first, zero), builder.not_(accumulated))
            with builder.if_else(fresh) as (is_fresh, is_more):
                for case, more in ((is_fresh, False), (is_more, True)):
                    with case:
                        for slot, place in zip(slots, places, strict=True):
                            value = builder.load(slot)
                            if more:
                                value = builder.fadd(value, simd.emit_load(builder, out, place, F32X, 4))
                            target = builder.bitcast(builder.gep(out, [place]), F32X.as_pointer())
                            builder.store(value, target, align=4)

    def codegen(context, builder, sig, args):
        name = f"hfopt.outer_tile.{rows}.{vectors}.{'pairs' if pairs else 'floats'}"
        outlined(builder, name, [*args[:4], args[6]], emit)
        return context.get_dummy_value()

    return signature, codegen


def _load_units(builder, kind, source, index):
    """16 units from source[index], an element of a pointer of this type, as int32."""
    if is_halves(kind):
        values = emit_halves(builder, simd.emit_load(builder, source, index, I16X, 2))
        return builder.bitcast(values, I32X)
    return simd.emit_load(builder, source, index, I32X, 2)


@intrinsic
def transpose_block(typingctx, source, source_stride, target, target_stride):
    """target[k * target_stride + j] = source[j * source_stride + k] for 16 x 16 32-bit units.

    `source_stride` counts elements of `source` (bits of bfloat16 or of float16, which are widened, or float32),
    `target_stride` units.
    """
    signature = types.void(source, types.intp, target, types.intp)

    def emit(builder, args):
        source, source_stride, target, target_stride = args
        places = [builder.mul(source_stride, intp(j)) for j in range(LANES)]
        rows = _transpose(builder, [_load_units(builder, signature.args[0], source, j) for j in places])
        for k, row in enumerate(rows):
            place = builder.gep(target, [builder.mul(target_stride, intp(k))])
            builder.store(row, builder.bitcast(place, I32X.as_pointer()), align=4)

    def codegen(context, builder, sig, args):
        name = f"hfopt.transpose_block.{sig.args[0].dtype}"
        outlined(builder, name, args, emit)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def stack_floats(typingctx, count):
    """Uninitialised float32 on the stack of the calling body, 64-byte aligned; `count` is a literal."""
    (size,) = literal_ints(count)

    def codegen(context, builder, sig, args):
        block = stack_block(builder, F32, size)
        block.align = 64
        return builder.bitcast(block, F32.as_pointer())

    return types.CPointer(types.float32)(count), codegen


@intrinsic(prefer_literal=True)
def stack_addresses(typingctx, count):
    """Uninitialised addresses on the stack of the calling body; `count` is a literal."""
    (size,) = literal_ints(count)

    def codegen(context, builder, sig, args):
        return builder.bitcast(stack_block(builder, INTP, size), INTP.as_pointer())

    return types.CPointer(types.int64)(count), codegen


@intrinsic
def copy_unit(typingctx, source, index, valid, target, place):
    """target[place] = the 32-bit unit that starts at source[index], of which `valid` elements exist; zero elsewhere."""
    signature = types.void(source, types.intp, types.intp, target, types.intp)

    def codegen(context, builder, sig, args):
        source, index, valid, target, place = args
        pairs = is_pairs(sig.args[0])
        there = builder.gep(target, [place])
        builder.store(ir.Constant(there.type.pointee, None if not pairs else 0), there)
        with builder.if_then(builder.icmp_signed(">", valid, intp(0))):
            value = builder.load(builder.gep(source, [index]))
            value = emit_half(builder, value) if is_halves(sig.args[0]) else value
            builder.store(builder.zext(value, I32) if pairs else value, there)
            if pairs:
                with builder.if_then(builder.icmp_signed(">", valid, intp(1))):
                    second = builder.gep(source, [builder.add(index, intp(1))])
                    upper = builder.shl(builder.zext(builder.load(second), I32), ir.Constant(I32, 16))
                    builder.store(builder.or_(builder.load(there), upper), there)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def copy_chunk(typingctx, source, index, target, place):
    """16 units from source[index] (elements) to target[place] (units)."""

    def codegen(context, builder, sig, args):
        source, index, target, place = args
        value = _load_units(builder, sig.args[0], source, index)
        where = builder.bitcast(builder.gep(target, [place]), I32X.as_pointer())
        builder.store(value, where, align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), codegen


@intrinsic
def units_ratio(typingctx, p):
    """Elements of p in a 32-bit unit: 2 for bfloat16, 1 for float32, and for float16, which is packed as that."""
    ratio = 2 if is_pairs(p) else 1
    return types.intp(p), lambda context, builder, sig, args: intp(ratio)


@intrinsic
def to_cache_line(typingctx, p):
    """Elements from p to the next 64-byte boundary, for 4-byte elements on a 4-byte boundary."""

    def codegen(context, builder, sig, args):
        address = builder.ptrtoint(args[0], INTP)
        missing = builder.and_(builder.neg(address), intp(63))
        return builder.lshr(missing, intp(2))

    return types.intp(p), codegen
