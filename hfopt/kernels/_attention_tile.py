"""Register tiles of attention, each unrolled by one intrinsic.

Keys and values that lie scattered are reached through a list of offsets (int64, in elements).
"""

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import _simd
from ._simd import F32X, I16X, I32X, LANES
from ._tile import _INTP, _accumulators, _add_into, _is_pairs, _literal_ints, add_lanes

offset_pointer = types.CPointer(types.int64)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_INTP, value)


@intrinsic(prefer_literal=True)
def stack_offsets(typingctx, count):
    """Uninitialised int64 on the stack of the calling body; `count` is a literal."""
    (size,) = _literal_ints(count)

    def codegen(context, builder, sig, args):
        array = cgutils.alloca_once(builder, ir.ArrayType(_INTP, size))
        return builder.bitcast(array, _INTP.as_pointer())

    return offset_pointer(count), codegen


@intrinsic
def get_offset(typingctx, offsets, index):
    """offsets[index]."""

    def codegen(context, builder, sig, args):
        return builder.load(builder.gep(args[0], [args[1]]))

    return types.int64(offset_pointer, types.intp), codegen


@intrinsic
def set_offset(typingctx, offsets, index, value):
    """offsets[index] = value."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(offset_pointer, types.intp, types.int64), codegen


@intrinsic
def where_bytes(typingctx, p, index, count, inside, outside):
    """`inside` in those of the first `count` lanes whose byte at p + index is not zero, else `outside`."""

    def codegen(context, builder, sig, args):
        p, index, count, inside, outside = args
        lanes = ir.VectorType(ir.IntType(8), LANES)
        values = _simd.emit_load_masked(builder, p, index, count, lanes, 1)
        chosen = builder.icmp_signed("!=", values, ir.Constant(lanes, None))
        return builder.select(chosen, inside, outside)

    return _simd.float32x(types.CPointer(types.uint8), types.intp, types.intp, inside, outside), codegen


@intrinsic
def dot_scattered(typingctx, q, keys, offsets, size):
    """Lane j = sum over i < size of q[i] keys[offsets[j] + i], for 16 offsets; q and keys of one type."""

    def codegen(context, builder, sig, args):
        q, keys, offsets, size = args
        pairs = _is_pairs(sig.args[0])
        width = 2 * LANES if pairs else LANES
        vector, alignment = (I32X, 2) if pairs else (F32X, 4)
        sums = _accumulators(builder, LANES)
        rows = [builder.gep(keys, [builder.load(builder.gep(offsets, [_constant(j)]))]) for j in range(LANES)]
        steps = builder.udiv(size, _constant(width))
        with cgutils.for_range(builder, steps) as loop:
            index = builder.mul(loop.index, _constant(width))
            q_value = _simd.emit_load(builder, q, index, vector, alignment)
            for slot, row in zip(sums, rows, strict=True):
                _add_into(builder, slot, q_value, _simd.emit_load(builder, row, index, vector, alignment))
        done = builder.mul(steps, _constant(width))
        left = builder.sub(size, done)
        with builder.if_then(builder.icmp_signed(">", left, _constant(0)), likely=False):
            bits = ir.VectorType(ir.IntType(16), 2 * LANES) if pairs else F32X

            def part(row):
                value = _simd.emit_load_masked(builder, row, done, left, bits, alignment)
                return builder.bitcast(value, vector) if pairs else value

            q_value = part(q)
            for slot, row in zip(sums, rows, strict=True):
                _add_into(builder, slot, q_value, part(row))
        return add_lanes(builder, [builder.load(slot) for slot in sums])

    return _simd.float32x(q, keys, offset_pointer, types.intp), codegen


@intrinsic(prefer_literal=True)
def weigh_scattered(typingctx, p, p_stride, values, offsets, n, count, out, n_rows, n_vectors):
    """out[i * 16 * n_vectors + c] = sum over j < n of p[i * p_stride + j] values[offsets[j] + c], literal
    n_rows, n_vectors.

    The last of the vectors has `count` columns.
    """
    rows, vectors = _literal_ints(n_rows, n_vectors)
    signature = types.void(
        p, types.intp, values, offset_pointer, types.intp, types.intp, out, n_rows, n_vectors
    )

    def codegen(context, builder, sig, args):
        p, p_stride, values, offsets, n, count, out = args[:7]
        bits = sig.args[2].dtype is types.uint16
        vector, alignment = (I16X, 2) if bits else (F32X, 4)
        sums = _accumulators(builder, rows * vectors)
        p_rows = [builder.gep(p, [builder.mul(p_stride, _constant(i))]) for i in range(rows)]

        def add_all(partial):
            with cgutils.for_range(builder, n) as loop:
                row = builder.gep(values, [builder.load(builder.gep(offsets, [loop.index]))])
                columns = []
                for c in range(vectors):
                    place = _constant(c * LANES)
                    if partial and c == vectors - 1:
                        value = _simd.emit_load_masked(builder, row, place, count, vector, alignment)
                    else:
                        value = _simd.emit_load(builder, row, place, vector, alignment)
                    columns.append(_simd.emit_widen(builder, value) if bits else value)
                for i, p_row in enumerate(p_rows):
                    weight = builder.load(builder.gep(p_row, [loop.index]))
                    weight = _simd.emit_splat(builder, weight, F32X)
                    for c, value in enumerate(columns):
                        _add_into(builder, sums[i * vectors + c], weight, value)

        with builder.if_else(builder.icmp_signed(">=", count, _constant(LANES))) as (whole, part):
            with whole:
                add_all(False)
            with part:
                add_all(True)
        for place, slot in enumerate(sums):
            target = builder.gep(out, [_constant(place * LANES)])
            builder.store(builder.load(slot), builder.bitcast(target, F32X.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def multiply_tile(typingctx, a, a_stride, b, b_stride, size, out, out_stride, n_rows, n_vectors, accumulate):
    """out[i * out_stride + c] (+)= sum over k < size of a[i * a_stride + k] b[k * b_stride + c], all float32.

    16 * n_vectors columns c of n_rows rows i (literals).
    """
    rows, vectors = _literal_ints(n_rows, n_vectors)
    stride = types.intp
    signature = types.void(a, stride, b, stride, stride, out, stride, n_rows, n_vectors, types.boolean)

    def codegen(context, builder, sig, args):
        a, a_stride, b, b_stride, size, out, out_stride = args[:7]
        sums = _accumulators(builder, rows * vectors)
        a_rows = [builder.gep(a, [builder.mul(a_stride, _constant(i))]) for i in range(rows)]
        places = [
            builder.add(builder.mul(out_stride, _constant(i)), _constant(c * LANES))
            for i in range(rows)
            for c in range(vectors)
        ]
        with cgutils.for_range(builder, size) as loop:
            b_row = builder.gep(b, [builder.mul(loop.index, b_stride)])
            b_values = [
                _simd.emit_load(builder, b_row, _constant(c * LANES), F32X, 4) for c in range(vectors)
            ]
            for i, a_row in enumerate(a_rows):
                a_value = builder.load(builder.gep(a_row, [loop.index]), align=4)
                a_value = _simd.emit_splat(builder, a_value, F32X)
                for c, b_value in enumerate(b_values):
                    _add_into(builder, sums[i * vectors + c], a_value, b_value)
        # what is there is added last: short chains of additions round less
        with builder.if_then(args[9]):
            for slot, place in zip(sums, places, strict=True):
                before = _simd.emit_load(builder, out, place, F32X, 4)
                builder.store(builder.fadd(before, builder.load(slot)), slot)
        for slot, place in zip(sums, places, strict=True):
            target = builder.bitcast(builder.gep(out, [place]), F32X.as_pointer())
            builder.store(builder.load(slot), target, align=4)
        return context.get_dummy_value()

    return signature, codegen
