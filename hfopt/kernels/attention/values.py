"""The register tile of decode attention that adds up weighted values; see `_decode_elements`."""

import functools

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import compiler
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.pointer import _is_codes
from hfopt.kernels.simd.tile import _accumulators, _constant, _is_pairs, _literal_ints, _outlined
from hfopt.kernels.simd.types import F32, F32X, I8, I16, I32, I32X, LANES

from .elements import BLOCK, _add_product, _emit_ahead, _emit_block, _emit_codes, _kind
from .lanes import address_list

_CHAINS = 8  # sums that one query needs at least to add a product each cycle


def _sums(p, width):
    """Vectors of sums of each query of a `weigh_tile`: those of one vector of units, 4, or 8."""
    return (2 if _is_pairs(p) else 1, 4, 8)[width]


def _interleaved(builder, low, high):
    """Two rows of 32 bfloat16 as pairs of one channel each: channels 0-3 and 4-7 of every 8."""
    halves = ir.VectorType(I16, 2 * LANES)
    low, high = builder.bitcast(low, halves), builder.bitcast(high, halves)
    for first in (0, 4):
        order = [
            8 * lane + first + k + which * 2 * LANES
            for lane in range(4)
            for k in range(4)
            for which in (0, 1)
        ]
        order = ir.Constant(ir.VectorType(I32, 2 * LANES), order)
        yield builder.bitcast(builder.shuffle_vector(low, high, order), I32X)


def _in_order(builder, sums):
    """Sums of channels as `_interleaved` has them, in order."""
    for first in (0, 8):
        order = [
            first + 4 * half + which * LANES + k for half in (0, 1) for which in (0, 1) for k in range(4)
        ]
        yield builder.shuffle_vector(*sums, ir.Constant(ir.VectorType(I32, LANES), order))


@intrinsic(prefer_literal=True)
def weigh_tile(
    typingctx,
    p,
    factors,
    like,
    values,
    n_blocks,
    stride,
    column,
    ahead,
    out,
    out_stride,
    n_valid,
    more,
    n_queries,
    wide,
):
    """out[g * out_stride + c] (+)= sum over 16 n_blocks keys of p[key, g] value[key, c], g < n_valid.

    p: units of weights in the order of `score_tile`; like: as there, of values; factors: where `takes_integers`, of the
    weights, in the order of lanes; c: channels from unit `column` on, as many as `tile_columns` says for the literal `wide`.
    """
    queries, breadth = _literal_ints(n_queries, wide)
    index = types.intp
    signature = types.void(
        p,
        factors,
        like,
        address_list,
        index,
        index,
        index,
        index,
        out,
        index,
        index,
        types.boolean,
        n_queries,
        wide,
    )
    pairs, codes = _is_pairs(p), _is_codes(like)
    width = LANES // queries
    ratio = 2 if pairs else 1
    vectors = _sums(p, breadth)
    sets = min(_CHAINS // vectors, 4 // ratio) if queries == 1 else 1  # of sums, for one key after the other

    def emit(builder, args):
        p, factors, values, n_blocks, stride, column, ahead, out, out_stride, n_valid, more = args
        unit, vector = (I32, I32X) if pairs else (F32, F32X)
        kind = I32X if pairs and codes else F32X
        slots = _accumulators(builder, queries * vectors * sets, kind)
        if codes:
            stride, column = (builder.mul(size, _constant(ratio)) for size in (stride, column))

        def row_of(first, key):
            place = builder.mul(stride, builder.add(first, _constant(key)))
            return builder.gep(block, [builder.add(place, column)])

        def load_row(row):
            for c in range(vectors // ratio):
                _emit_ahead(builder, row, _constant(c * LANES), ahead)
                yield simd.emit_load(builder, row, _constant(c * LANES), vector, 4)

        def load_codes(row, key):
            # a tile may have less than a line of a row
            for line in range(vectors // 4) if vectors >= 4 else range(key % (4 // vectors) == 0):
                _emit_ahead(builder, row, _constant(line * 64), ahead)
            for c in range(vectors // ratio):
                yield _emit_codes(builder, row, _constant(c * LANES * ratio), pairs)

        def add_keys(weights, first, key):
            load = load_codes if codes else lambda row, key: load_row(row)
            loads = [list(load(row_of(first, key + k), key + k)) for k in range(ratio)]
            if pairs:
                columns = [
                    v for low, high in zip(*loads, strict=True) for v in _interleaved(builder, low, high)
                ]
            else:
                (columns,) = loads
            for g in range(queries):
                weight = builder.load(builder.gep(weights, [_constant((g * width + key) // ratio)]), align=4)
                weight = simd.emit_splat(builder, weight, vector)
                first_slot = (key // ratio % sets * queries + g) * vectors
                for c, value in enumerate(columns):
                    _add_product(builder, slots[first_slot + c], weight, value)

        with compiler.for_range(builder, n_blocks) as blocks:
            block = _emit_block(builder, values, blocks.index, I8 if codes else unit)
            with compiler.for_range(builder, _constant(BLOCK // 4)) as fours:
                first = builder.mul(fours.index, _constant(4))
                # 4 keys of the group of `width` to which they belong
                within = builder.and_(first, _constant(width - 1))
                place = builder.mul(builder.sub(first, within), _constant(queries))
                place = builder.add(place, within)
                place = builder.add(place, builder.mul(blocks.index, _constant(BLOCK * queries)))
                weights = builder.gep(p, [builder.udiv(place, _constant(ratio))])
                for key in range(0, 4, ratio):
                    add_keys(weights, first, key)
        for g in range(queries):
            with builder.if_then(builder.icmp_signed(">", n_valid, _constant(g))):
                target = builder.gep(out, [builder.mul(out_stride, _constant(g))])
                parts = [
                    [builder.load(slot) for slot in slots[g * vectors + c :: queries * vectors]]
                    for c in range(vectors)
                ]
                sums = [
                    functools.reduce(builder.fadd if kind == F32X else builder.add, part) for part in parts
                ]
                if kind == I32X:
                    factor = builder.load(builder.gep(factors, [_constant(g * width)]), align=4)
                    factor = simd.emit_splat(builder, factor, F32X)
                    sums = [builder.fmul(builder.sitofp(value, F32X), factor) for value in sums]
                if pairs:
                    sums = [v for c in range(0, vectors, 2) for v in _in_order(builder, sums[c : c + 2])]
                for c, value in enumerate(sums):
                    there = builder.bitcast(builder.gep(target, [_constant(c * LANES)]), F32X.as_pointer())
                    with builder.if_else(more) as (add, fresh):
                        with add:
                            before = builder.load(there, align=4)
                            builder.store(builder.fadd(before, value), there, align=4)
                        with fresh:
                            builder.store(value, there, align=4)

    def codegen(context, builder, sig, args):
        name = f"hfopt.weigh_tile.{queries}.{breadth}.{_kind(pairs, codes)}"
        _outlined(builder, name, [*args[:2], *args[3:12]], emit)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def tile_columns(typingctx, p, wide):
    """Channels of a `weigh_tile`."""
    (breadth,) = _literal_ints(wide)
    columns = _sums(p, breadth) * LANES
    return types.intp(p, wide), lambda context, builder, sig, args: _constant(columns)
