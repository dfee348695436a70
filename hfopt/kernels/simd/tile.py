"""Register tiles of matrix products, each unrolled by one intrinsic."""

from typing import Any, NamedTuple

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
from hfopt.kernels.simd.types import F32, F32X, I16, I16X, I32, I32X, INTP, LANES

# A sum is carried over at most this many units before it is added to the total: the rounding errors of one long
# chain of adds grow with its length.
_SUM_DEPTH = 128


class Chain(NamedTuple):
    """Additions one after the other, over as many chunks whatever the number of rows: so sums have the same bits for all.

    A call makes some of them. sums: of the chains that are complete; links: where the next call finds the sum of one that
    stays open, and may be anything where calls make whole chains.
    """

    sums: Any
    links: Any
    has_sums: Any  # whether this call ends a chain behind another one
    goes_on: Any  # whether it begins with links
    stays_open: Any  # whether it ends there


@intrinsic(prefer_literal=True)
def dot_tile(
    typingctx, x, x_step, w, w_stride, chunks, tail, ahead, near, turn, jump, chain, n_x, n_w, n_ahead, n_near
):  # fmt: skip
    """Products of x row i and w row j, added to chain[i, j] as 16 partial sums a pair, for literal n_x and n_w.

    A chunk is 16 units (16 float32 or float16, or 32 bfloat16). x is packed: chunk c of row i at x + c * x_step + 16 i
    units, padded with zeros. w is row-major, w_stride elements a row; of the chunk after the last whole one `tail`
    elements are read. The arrays of the `Chain` are float32 [n_x, 16, 16]. Beside each chunk, that of n_ahead rows
    (literal) from `ahead` on is asked for, and of n_near from `near` on: a core drops requests when it waits for many
    lines, so what comes soon is asked for again. From chunk `turn` on, those ahead are `jump` elements further on: the
    rows end there.
    """
    rows, columns, n_far, n_soon = literal_ints(n_x, n_w, n_ahead, n_near)
    index, literals = types.intp, (n_x, n_w, n_ahead, n_near)
    signature = types.void(x, index, w, index, index, index, w, w, index, index, chain, *literals)
    pairs, halves = is_pairs(w), is_halves(w)
    width = 2 * LANES if pairs else LANES

    def emit(builder, args):
        (
            x,
            x_step,
            w,
            w_stride,
            chunks,
            tail,
            ahead,
            near,
            turn,
            jump,
            sums,
            links,
            has_sums,
            goes_on,
            stays_open,
        ) = args
        vector = I32X if pairs else F32X
        slots = accumulators(builder, rows * columns)
        places = [intp((i * LANES + j) * LANES) for i in range(rows) for j in range(columns)]
        with builder.if_then(goes_on):
            for slot, place in zip(slots, places, strict=True):
                builder.store(simd.emit_load(builder, links, place, F32X, 4), slot)
        strides = [builder.mul(w_stride, intp(j)) for j in range(max(columns, n_far, n_soon))]
        w_rows = [builder.gep(w, [stride]) for stride in strides[:columns]]
        far_rows = [builder.gep(ahead, [stride]) for stride in strides[:n_far]]
        soon_rows = [builder.gep(near, [stride]) for stride in strides[:n_soon]]

        def add_chunk(chunk, load):
            start = builder.mul(chunk, intp(width))
            w_values = [load(row, start) for row in w_rows]
            x_chunk = builder.mul(chunk, x_step)
            for i in range(rows):
                x_place = builder.add(x_chunk, intp(i * LANES))
                x_value = simd.emit_load(builder, x, x_place, vector, 4)
                for j, w_value in enumerate(w_values):
                    add_into(builder, slots[i * columns + j], x_value, w_value)

        def whole(row, start):
            if halves:
                return emit_halves(builder, simd.emit_load(builder, row, start, I16X, 2))
            return simd.emit_load(builder, row, start, vector, 2 if pairs else 4)

        def part(row, start):
            if pairs:
                bits = ir.VectorType(I16, 2 * LANES)
                return builder.bitcast(simd.emit_load_masked(builder, row, start, tail, bits, 2), I32X)
            if halves:
                return emit_halves(builder, simd.emit_load_masked(builder, row, start, tail, I16X, 2))
            return simd.emit_load_masked(builder, row, start, tail, F32X, 4)

        def add_chunks(first, count):
            places = [builder.add(first, intp(i)) for i in range(count)]
            # two chunks of float16 are one line
            asked = [builder.mul(chunk, intp(width)) for chunk in places[: 1 if halves else count]]
            beyond = builder.select(builder.icmp_signed(">=", first, turn), jump, intp(0))
            for row in far_rows:
                for start in asked:
                    simd.emit_prefetch(builder, row, builder.add(start, beyond))
            for row in soon_rows:
                for start in asked:
                    simd.emit_prefetch(builder, row, start)
            for chunk in places:
                add_chunk(chunk, whole)

        # two cache lines of a row at a time are neighbours in memory
        with compiler.for_range(builder, builder.lshr(chunks, intp(1))) as loop:
            add_chunks(builder.shl(loop.index, intp(1)), 2)
        with builder.if_then(builder.trunc(chunks, ir.IntType(1))):
            add_chunks(builder.sub(chunks, intp(1)), 1)
        with builder.if_then(builder.icmp_signed(">", tail, intp(0)), likely=False):
            add_chunk(chunks, part)
        # what is there is added last: short chains of additions round less
        with builder.if_then(has_sums):
            for slot, place in zip(slots, places, strict=True):
                before = simd.emit_load(builder, sums, place, F32X, 4)
                builder.store(builder.fadd(before, builder.load(slot)), slot)
        results = builder.select(stays_open, links, sums)
        for slot, place in zip(slots, places, strict=True):
            target = builder.bitcast(builder.gep(results, [place]), F32X.as_pointer())
            builder.store(builder.load(slot), target, align=4)

    def codegen(context, builder, sig, args):
        name = f"hfopt.dot_tile.{rows}.{columns}.{n_far}.{n_soon}.{w.dtype}"
        fields = [builder.extract_value(args[10], place) for place in range(len(Chain._fields))]
        outlined(builder, name, [*args[:10], *fields], emit)
        return context.get_dummy_value()

    return signature, codegen


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
