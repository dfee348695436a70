"""Register tiles of decode attention, each unrolled by one intrinsic.

A tile is 1, 2 or 4 queries, side by side in a vector of 16 units (float32, or pairs of bfloat16): each has
`width` = 16 / queries lanes. A key goes through them in segments of `width` units, broadcast to all queries,
so that little is left to be added across lanes, and a vector of results holds `width` keys of each query.

Keys and values come in blocks of 16 rows, `stride` units apart, at addresses that a list names.
"""

import functools

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import _simd, _target
from ._pointer import _is_codes, emit_integers
from ._simd import BF16X2, F32, F32X, I8, I16, I32, I32X, LANES
from ._tile import (
    _INTP,
    _accumulators,
    _add_into,
    _constant,
    _is_pairs,
    _literal_ints,
    _outlined,
    _stack_block,
    add_lanes,
)

BLOCK = LANES  # rows of a block

_AGAIN = 4096  # bytes; measured: 2048 and 8192 are worse

address_list = types.CPointer(types.int64)


@intrinsic
def address_of(typingctx, p):
    """The address as a number."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(args[0], _INTP)

    return types.int64(p), codegen


@intrinsic(prefer_literal=True)
def stack_addresses(typingctx, count):
    """Uninitialised addresses on the stack of the calling body; `count` is a literal."""
    (size,) = _literal_ints(count)

    def codegen(context, builder, sig, args):
        return builder.bitcast(_stack_block(builder, _INTP, size), _INTP.as_pointer())

    return address_list(count), codegen


@intrinsic
def set_address(typingctx, addresses, index, address):
    """addresses[index] = address."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(address_list, types.intp, types.int64), codegen


@intrinsic
def seen_keys(typingctx, mask, index, count):
    """Bit j: whether the byte at mask + index + j is not zero, for j < count <= 16."""

    def codegen(context, builder, sig, args):
        mask, index, count = args
        lanes = ir.VectorType(ir.IntType(8), LANES)
        values = _simd.emit_load_masked(builder, mask, index, count, lanes, 1)
        seen = builder.icmp_signed("!=", values, ir.Constant(lanes, None))
        return builder.zext(builder.bitcast(seen, I16), _INTP)

    return types.int64(types.CPointer(types.uint8), types.intp, types.intp), codegen


@intrinsic
def where_keys(typingctx, count, width, inside, outside):
    """`inside` in the lanes of the first `count` of `width` keys, `outside` in the others."""

    def codegen(context, builder, sig, args):
        count, width, inside, outside = args
        last = _simd.emit_splat(builder, builder.sub(builder.trunc(width, I32), ir.Constant(I32, 1)), I32X)
        key = builder.and_(ir.Constant(I32X, list(range(LANES))), last)
        limit = _simd.emit_splat(builder, builder.trunc(count, I32), I32X)
        return builder.select(builder.icmp_signed("<", key, limit), inside, outside)

    return _simd.float32x(types.intp, types.intp, inside, outside), codegen


@intrinsic(prefer_literal=True)
def partner(typingctx, x, span):
    """Lane k is lane k ^ span of x, for a literal span."""
    (distance,) = _literal_ints(span)

    def codegen(context, builder, sig, args):
        order = ir.Constant(ir.VectorType(I32, LANES), [k ^ distance for k in range(LANES)])
        return builder.shuffle_vector(args[0], args[0], order)

    return _simd.float32x(_simd.float32x, span), codegen


@intrinsic
def load_key_factors(typingctx, factors, first, width):
    """Numbers of `width` (4 or 16) keys, for each query of a vector of scores."""

    def codegen(context, builder, sig, args):
        factors, first, width = args
        spread = ir.Constant(ir.VectorType(I32, LANES), [k % 4 for k in range(LANES)])
        few = _simd.emit_load(builder, factors, first, ir.VectorType(F32, 4), 4)
        few = builder.shuffle_vector(few, few, spread)
        result = cgutils.alloca_once_value(builder, few)
        with builder.if_then(builder.icmp_signed("==", width, _constant(LANES))):
            builder.store(_simd.emit_load(builder, factors, first, F32X, 4), result)
        return builder.load(result)

    return _simd.float32x(factors, types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def pack_query(typingctx, source, steps, target, place, queries):
    """Query number `place` of a packed tile: segment s goes to lanes place * width ... of target[s, 16]."""
    (n_queries,) = _literal_ints(queries)
    segment = ir.VectorType(I32, LANES // n_queries)

    def codegen(context, builder, sig, args):
        source, steps, target, place, _ = args
        source = builder.bitcast(source, I32.as_pointer())
        target = builder.bitcast(target, I32.as_pointer())
        first = builder.mul(place, _constant(segment.count))
        with cgutils.for_range(builder, steps) as loop:
            here = builder.mul(loop.index, _constant(segment.count))
            value = _simd.emit_load(builder, source, here, segment, 2)
            there = builder.add(builder.mul(loop.index, _constant(LANES)), first)
            there = builder.bitcast(builder.gep(target, [there]), segment.as_pointer())
            builder.store(value, there, align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp, queries), codegen


def _emit_ahead(builder, row, index, ahead):
    """Asks for the line `ahead` bytes behind unit `index` of a row, and again for the one 4 KiB behind it.

    A core has room for few requests and drops those that find none; the second asks for what was dropped.
    """
    here = builder.bitcast(builder.gep(row, [index]), ir.IntType(8).as_pointer())
    _simd.emit_prefetch(builder, here, ahead)
    _simd.emit_prefetch(builder, here, _constant(_AGAIN))


def _emit_block(builder, addresses, index, unit):
    address = builder.load(builder.gep(addresses, [index]))
    return builder.inttoptr(address, unit.as_pointer())


def _emit_units(builder, row, place, pairs):
    """16 units of the codes from row + place on."""
    if not pairs:
        return emit_integers(builder, _simd.emit_load(builder, row, place, _simd.I8X, 1))
    if _target.HAS_AVX512_BF16:
        places = builder.add(place, _constant(LANES)), place
        halves = [emit_integers(builder, _simd.emit_load(builder, row, at, _simd.I8X, 1)) for at in places]
        units = _simd.emit_call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", BF16X2, halves)
        return builder.bitcast(units, I32X)
    codes = builder.sext(_simd.emit_load(builder, row, place, _simd.I16X, 1), I32X)
    odd, even = builder.ashr(codes, _simd.splat_int(8)), builder.shl(codes, _simd.splat_int(24))
    even = builder.ashr(even, _simd.splat_int(24))
    return _emit_pairs(builder, builder.sitofp(even, F32X), builder.sitofp(odd, F32X))


def _emit_pairs(builder, low, high):
    """Units of two vectors of float32 that are bfloat16 too, as integers up to 256 are."""
    low, high = builder.bitcast(low, I32X), builder.bitcast(high, I32X)
    return builder.or_(builder.lshr(low, _simd.splat_int(16)), high)


def _kind(pairs, codes):
    return f"{'pairs' if pairs else 'floats'}{'.codes' if codes else ''}"


@intrinsic(prefer_literal=True)
def score_tile(typingctx, q, steps, like, keys, n_blocks, stride, ahead, out, out_stride, n_queries, n_tiles):
    """Products of each query of n_tiles tiles (literals) with 16 n_blocks keys.

    q: packed tiles [n_tiles, steps, 16] units; like: a pointer to elements of keys, those of q or codes, which are taken as
    integers; out [n_tiles, keys / width, queries, width], `out_stride` a tile. Memory `ahead` bytes behind the keys is asked
    for.
    """
    queries, tiles = _literal_ints(n_queries, n_tiles)
    index = types.intp
    signature = types.void(q, index, like, address_list, index, index, index, out, index, n_queries, n_tiles)
    pairs, codes = _is_pairs(q), _is_codes(like)
    ratio = 2 if pairs else 1
    width = LANES // queries
    together = width if queries == 1 else 8  # keys whose sums are in registers

    def emit(builder, args):
        q, steps, keys, n_blocks, stride, ahead, out, out_stride = args
        unit, vector = (I32, I32X) if pairs else (F32, F32X)
        slots = _accumulators(builder, tiles * together)
        if codes:
            stride = builder.mul(stride, _constant(ratio))

        def load_query(tile, step):
            place = builder.mul(builder.add(builder.mul(steps, _constant(tile)), step), _constant(LANES))
            return _simd.emit_load(builder, q, place, vector, 4)

        def ask(part, turn, n_lines, of_line):
            # all lines of these rows, in order, whatever their number
            for line in range(n_lines):
                place = builder.add(builder.mul(turn, _constant(n_lines)), _constant(line))
                _emit_ahead(builder, part, builder.mul(place, _constant(of_line)), ahead)

        def add_elements(part, rows):
            segment = ir.VectorType(unit, width)
            spread = ir.Constant(ir.VectorType(I32, LANES), [k % width for k in range(LANES)])
            with cgutils.for_range(builder, steps) as loop:
                q_values = [load_query(t, loop.index) for t in range(tiles)]
                ask(part, loop.index, together * width // LANES, LANES)
                place = builder.mul(loop.index, _constant(width))
                for j, row in enumerate(rows):
                    value = _simd.emit_load(builder, row, place, segment, 4)
                    value = builder.shuffle_vector(value, value, spread)
                    for t, q_value in enumerate(q_values):
                        _add_into(builder, slots[t * together + j], q_value, value)

        def add_codes(part, rows):
            # as many segments at a time as a vector of units has
            with cgutils.for_range(builder, builder.udiv(steps, _constant(queries))) as loop:
                first = builder.mul(loop.index, _constant(queries))
                places = [builder.add(first, _constant(s)) for s in range(queries)]
                q_values = [[load_query(t, place) for place in places] for t in range(tiles)]
                ask(part, loop.index, together * ratio * LANES // 64, 64)
                place = builder.mul(loop.index, _constant(ratio * LANES))
                for j, row in enumerate(rows):
                    units = _emit_units(builder, row, place, pairs)
                    for s in range(queries):
                        lanes = [s * width + k % width for k in range(LANES)]
                        lanes = ir.Constant(ir.VectorType(I32, LANES), lanes)
                        value = builder.shuffle_vector(units, units, lanes)
                        for t in range(tiles):
                            _add_into(builder, slots[t * together + j], q_values[t][s], value)

        with cgutils.for_range(builder, n_blocks) as blocks:
            block = _emit_block(builder, keys, blocks.index, I8 if codes else unit)
            with cgutils.for_range(builder, _constant(BLOCK // together)) as parts:
                first = builder.mul(parts.index, _constant(together))
                part = builder.gep(block, [builder.mul(first, stride)])
                rows = [builder.gep(part, [builder.mul(stride, _constant(j))]) for j in range(together)]
                for slot in slots:
                    builder.store(ir.Constant(F32X, None), slot)
                (add_codes if codes else add_elements)(part, rows)
                place = builder.add(builder.mul(blocks.index, _constant(BLOCK)), first)
                place = builder.mul(place, _constant(queries))
                for t in range(tiles):
                    target = builder.gep(out, [builder.add(place, builder.mul(out_stride, _constant(t)))])
                    for group in range(together // width):
                        begin = t * together + group * width
                        sums = [builder.load(slot) for slot in slots[begin : begin + width]]
                        there = builder.gep(target, [_constant(group * LANES)])
                        there = builder.bitcast(there, F32X.as_pointer())
                        builder.store(add_lanes(builder, sums), there, align=4)

    def codegen(context, builder, sig, args):
        name = f"hfopt.score_tile.{queries}.{tiles}.{_kind(pairs, codes)}"
        _outlined(builder, name, [*args[:2], *args[3:9]], emit)
        return context.get_dummy_value()

    return signature, codegen


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

    p: units of weights in the order of `score_tile`; like: as there, of values; c: channels from unit `column` on, as many
    as `tile_columns` says for the literal `wide`.
    """
    queries, breadth = _literal_ints(n_queries, wide)
    index = types.intp
    signature = types.void(
        p, like, address_list, index, index, index, index, out, index, index, types.boolean, n_queries, wide
    )
    pairs, codes = _is_pairs(p), _is_codes(like)
    width = LANES // queries
    ratio = 2 if pairs else 1
    vectors = _sums(p, breadth)
    sets = min(_CHAINS // vectors, 4 // ratio) if queries == 1 else 1  # of sums, for one key after the other

    def emit(builder, args):
        p, values, n_blocks, stride, column, ahead, out, out_stride, n_valid, more = args
        unit, vector = (I32, I32X) if pairs else (F32, F32X)
        slots = _accumulators(builder, queries * vectors * sets)
        if codes:
            stride, column = (builder.mul(size, _constant(ratio)) for size in (stride, column))

        def row_of(first, key):
            place = builder.mul(stride, builder.add(first, _constant(key)))
            return builder.gep(block, [builder.add(place, column)])

        def load_row(row):
            for c in range(vectors // ratio):
                _emit_ahead(builder, row, _constant(c * LANES), ahead)
                yield _simd.emit_load(builder, row, _constant(c * LANES), vector, 4)

        def load_codes(row, key):
            # a tile may have less than a line of a row
            for line in range(vectors // 4) if vectors >= 4 else range(key % (4 // vectors) == 0):
                _emit_ahead(builder, row, _constant(line * 64), ahead)
            for c in range(vectors):
                bytes16 = _simd.emit_load(builder, row, _constant(c * LANES), _simd.I8X, 1)
                yield emit_integers(builder, bytes16)

        def add_keys(weights, first, key):
            load = load_codes if codes else lambda row, key: load_row(row)
            loads = [list(load(row_of(first, key + k), key + k)) for k in range(ratio)]
            if pairs and codes:
                columns = [_emit_pairs(builder, low, high) for low, high in zip(*loads, strict=True)]
            elif pairs:
                columns = [
                    v for low, high in zip(*loads, strict=True) for v in _interleaved(builder, low, high)
                ]
            else:
                (columns,) = loads
            for g in range(queries):
                weight = builder.load(builder.gep(weights, [_constant((g * width + key) // ratio)]), align=4)
                weight = _simd.emit_splat(builder, weight, vector)
                first_slot = (key // ratio % sets * queries + g) * vectors
                for c, value in enumerate(columns):
                    _add_into(builder, slots[first_slot + c], weight, value)

        with cgutils.for_range(builder, n_blocks) as blocks:
            block = _emit_block(builder, values, blocks.index, I8 if codes else unit)
            with cgutils.for_range(builder, _constant(BLOCK // 4)) as fours:
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
                sums = [functools.reduce(builder.fadd, part) for part in parts]
                if pairs and not codes:
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
        _outlined(builder, name, [args[0], *args[2:11]], emit)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def tile_columns(typingctx, p, wide):
    """Channels of a `weigh_tile`."""
    (breadth,) = _literal_ints(wide)
    columns = _sums(p, breadth) * LANES
    return types.intp(p, wide), lambda context, builder, sig, args: _constant(columns)
