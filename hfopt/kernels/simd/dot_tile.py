"""The register tile of matrix products of few rows, unrolled by one intrinsic."""

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
)
from hfopt.kernels.simd.memory import emit_halves
from hfopt.kernels.simd.pointer import is_halves
from hfopt.kernels.simd.types import F32X, I16, I16X, I32X, LANES


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


def _begin(builder, slots, places, chain):
    with builder.if_then(chain.goes_on):
        for slot, place in zip(slots, places, strict=True):
            builder.store(simd.emit_load(builder, chain.links, place, F32X, 4), slot)


def _end(builder, slots, places, chain):
    # what is there is added last: short chains of additions round less
    with builder.if_then(chain.has_sums):
        for slot, place in zip(slots, places, strict=True):
            before = simd.emit_load(builder, chain.sums, place, F32X, 4)
            builder.store(builder.fadd(before, builder.load(slot)), slot)
    results = builder.select(chain.stays_open, chain.links, chain.sums)
    for slot, place in zip(slots, places, strict=True):
        target = builder.bitcast(builder.gep(results, [place]), F32X.as_pointer())
        builder.store(builder.load(slot), target, align=4)


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
        x, x_step, w, w_stride, chunks, tail, ahead, near, turn, jump, *fields = args
        chain = Chain(*fields)
        vector = I32X if pairs else F32X
        slots = accumulators(builder, rows * columns)
        places = [intp((i * LANES + j) * LANES) for i in range(rows) for j in range(columns)]
        _begin(builder, slots, places, chain)
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
        _end(builder, slots, places, chain)

    def codegen(context, builder, sig, args):
        name = f"hfopt.dot_tile.{rows}.{columns}.{n_far}.{n_soon}.{w.dtype}"
        fields = [builder.extract_value(args[10], place) for place in range(len(Chain._fields))]
        outlined(builder, name, [*args[:10], *fields], emit)
        return context.get_dummy_value()

    return signature, codegen
