"""Register tiles of decode attention, each unrolled by one intrinsic.

A tile is 1, 2 or 4 queries, side by side in a vector of 16 units (float32, or pairs of bfloat16): each has
`width` = 16 / queries lanes. A key goes through them in segments of `width` units, broadcast to all queries,
so that little is left to be added across lanes, and a vector of results holds `width` keys of each query.

Keys and values come in blocks of 16 rows, `stride` units apart, at addresses that a list names.

Codes meet queries and weights of bfloat16 models as 16-bit integers, in pairs as bfloat16 does, or meet four queries as two
8-bit digits of these, for which nothing is widened: that takes fewer instructions than making bfloat16 of codes, and
rounding to 16 bits costs less than rounding to bfloat16 does. With float32 they are widened to that. Either way their scales
are left to the caller.
"""

import functools

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import _simd, _target
from ._integer_dot import emit_dot_bytes, emit_dot_shorts
from ._pointer import INTEGERS, _is_codes, emit_integers
from ._simd import F32, F32X, I8, I16, I32, I32X, LANES
from ._tile import (
    _INTP,
    _accumulators,
    _constant,
    _dot,
    _is_pairs,
    _literal_ints,
    _outlined,
    _stack_block,
    add_lanes,
)

BLOCK = LANES  # rows of a block

_SHORTS = ir.VectorType(I16, 2 * LANES)
_SIGNS = _simd.splat_int(0x80808080 - (1 << 32))
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


@intrinsic
def largest_weight(typingctx, a, b):
    """Larger of each lane, of numbers that are not negative; NaN if either is."""

    def codegen(context, builder, sig, args):
        # in the order of their bits, NaN is the largest, with and without a sign
        a, b = (builder.bitcast(x, I32X) for x in args)
        return builder.bitcast(builder.select(builder.icmp_unsigned(">", a, b), a, b), F32X)

    return _simd.float32x(_simd.float32x, _simd.float32x), codegen


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


@intrinsic
def pack_digits(typingctx, source, steps, target, place):
    """Query number `place` of a tile of four, of 16-bit integers, as digits: 16 channels of each query, the upper 8 bits
    (signed) and then the lower ones (unsigned), and so on."""
    channels = ir.VectorType(I16, LANES)

    def codegen(context, builder, sig, args):
        source, steps, target, place = args
        target = builder.bitcast(target, I8.as_pointer())
        first = builder.mul(place, _constant(LANES))
        with cgutils.for_range(builder, builder.lshr(steps, _constant(1))) as loop:
            value = _simd.emit_load(builder, source, builder.mul(loop.index, _constant(LANES)), channels, 2)
            upper = builder.lshr(value, ir.Constant(channels, [8] * LANES))
            for digit, at in ((upper, 0), (value, 4 * LANES)):
                there = builder.add(builder.mul(loop.index, _constant(8 * LANES)), first)
                there = builder.gep(target, [builder.add(there, _constant(at))])
                digit = builder.trunc(digit, _simd.I8X)
                builder.store(digit, builder.bitcast(there, _simd.I8X.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), codegen


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


def _emit_codes(builder, row, place, pairs):
    """16 units of the codes from row + place on."""
    if not pairs:
        return emit_integers(builder, _simd.emit_load(builder, row, place, _simd.I8X, 1))
    codes = _simd.emit_load(builder, row, place, ir.VectorType(I8, 2 * LANES), 1)
    return builder.bitcast(builder.sext(codes, _SHORTS), I32X)


def _add_product(builder, slot, a, b):
    """`_add_into`, or for sums of integers that of pairs of them."""
    total = builder.load(slot)
    if total.type == F32X:
        builder.store(_dot(builder, total, a, b), slot)
    elif _target.HAS_AVX512_VNNI:
        # since LLVM 22 the operands are of 16 bits; it upgrades this older form when it parses it
        total = _simd.emit_call(builder, "llvm.x86.avx512.vpdpwssd.512", I32X, [total, a, b])
        builder.store(total, slot)
    else:
        products = emit_dot_shorts(builder, *(builder.bitcast(x, _SHORTS) for x in (a, b)))
        builder.store(builder.add(total, products), slot)


def _load_digits(builder, q, tile, n_turns, turn):
    """Upper and lower digits of 16 channels of four queries."""
    place = builder.mul(builder.add(builder.mul(n_turns, _constant(tile)), turn), _constant(2 * LANES))
    places = place, builder.add(place, _constant(LANES))
    return [_simd.emit_load(builder, q, each, I32X, 4) for each in places]


def _emit_bias(builder, q, tile, n_turns):
    """Slot of the sums of upper digits times -128, which takes back that codes are made unsigned by adding 128."""
    slot = cgutils.alloca_once_value(builder, ir.Constant(I32X, None))
    with cgutils.for_range(builder, n_turns) as loop:
        high, _ = _load_digits(builder, q, tile, n_turns, loop.index)
        builder.store(emit_dot_bytes(builder, builder.load(slot), _SIGNS, high), slot)
    builder.store(builder.sub(ir.Constant(I32X, None), builder.load(slot)), slot)
    return slot


def _kind(pairs, codes):
    return f"{'pairs' if pairs else 'floats'}{'.codes' if codes else ''}"


@intrinsic
def takes_integers(typingctx, like, codes):
    """Whether codes meet queries and weights of this type as integers."""
    yes = ir.Constant(ir.IntType(1), _is_pairs(like) and _is_codes(codes))
    return types.boolean(like, codes), lambda context, builder, sig, args: yes


@intrinsic
def store_integers(typingctx, p, index, value):
    """16 numbers from -32768 to 32767 to p + index, 16-bit elements, rounded to nearest even."""

    def codegen(context, builder, sig, args):
        where, index, value = args
        # the lowest bits of the sum are the integer
        value = builder.fadd(_simd.emit_fence(builder, value), _simd.splat_float(INTEGERS))
        shorts = builder.trunc(builder.bitcast(value, I32X), _simd.I16X)
        target = builder.bitcast(builder.gep(where, [index]), shorts.type.as_pointer())
        builder.store(shorts, target, align=2)
        return context.get_dummy_value()

    return types.void(p, types.intp, _simd.float32x), codegen


@intrinsic(prefer_literal=True)
def score_tile(
    typingctx, q, factors, steps, like, keys, n_blocks, stride, ahead, out, out_stride, n_queries, n_tiles
):
    """Products of each query of n_tiles tiles (literals) with 16 n_blocks keys.

    q: packed tiles [n_tiles, steps, 16] units, of four as `pack_digits` does it where `takes_integers`; like: a pointer to
    elements of keys, those of q or codes; factors: where `takes_integers`, of the queries, [n_tiles, 16] in the order of
    lanes; out [n_tiles, keys / width, queries, width],
    `out_stride` a tile. Memory `ahead` bytes behind the keys is asked for.
    """
    queries, tiles = _literal_ints(n_queries, n_tiles)
    index = types.intp
    signature = types.void(
        q, factors, index, like, address_list, index, index, index, out, index, n_queries, n_tiles
    )
    pairs, codes = _is_pairs(q), _is_codes(like)
    ratio = 2 if pairs else 1
    width = LANES // queries
    digits = pairs and codes and queries == 4
    together = width if queries == 1 else 8  # keys whose sums are in registers
    if digits:
        together //= tiles

    def emit(builder, args):
        q, factors, steps, keys, n_blocks, stride, ahead, out, out_stride = args
        unit, vector = (I32, I32X) if pairs else (F32, F32X)
        kind = I32X if pairs and codes else F32X
        slots = _accumulators(builder, tiles * together, kind)
        if digits:
            lower = _accumulators(builder, tiles * together, I32X)
            n_turns = builder.lshr(steps, _constant(1))
            biases = [_emit_bias(builder, q, t, n_turns) for t in range(tiles)]
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

        def add_digits(part, rows):
            with cgutils.for_range(builder, n_turns) as loop:
                q_values = [_load_digits(builder, q, t, n_turns, loop.index) for t in range(tiles)]
                ask(part, loop.index, together // 4, 64)
                place = builder.mul(loop.index, _constant(LANES))
                for j, row in enumerate(rows):
                    value = _simd.emit_load(builder, row, place, ir.VectorType(I32, 4), 1)
                    spread = ir.Constant(ir.VectorType(I32, LANES), [k % 4 for k in range(LANES)])
                    value = builder.shuffle_vector(value, value, spread)
                    flipped = builder.xor(value, _SIGNS)
                    for t, (high, low) in enumerate(q_values):
                        slot, other = slots[t * together + j], lower[t * together + j]
                        builder.store(emit_dot_bytes(builder, builder.load(slot), flipped, high), slot)
                        builder.store(emit_dot_bytes(builder, builder.load(other), low, value), other)
            for slot, other in zip(slots, lower, strict=True):
                total = builder.shl(builder.load(slot), _simd.splat_int(8))
                builder.store(builder.add(total, builder.load(other)), slot)

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
                        _add_product(builder, slots[t * together + j], q_value, value)

        def add_codes(part, rows):
            # as many segments at a time as a vector of units has
            with cgutils.for_range(builder, builder.udiv(steps, _constant(queries))) as loop:
                first = builder.mul(loop.index, _constant(queries))
                places = [builder.add(first, _constant(s)) for s in range(queries)]
                q_values = [[load_query(t, place) for place in places] for t in range(tiles)]
                ask(part, loop.index, together * ratio * LANES // 64, 64)
                place = builder.mul(loop.index, _constant(ratio * LANES))
                for j, row in enumerate(rows):
                    units = _emit_codes(builder, row, place, pairs)
                    for s in range(queries):
                        lanes = [s * width + k % width for k in range(LANES)]
                        lanes = ir.Constant(ir.VectorType(I32, LANES), lanes)
                        value = builder.shuffle_vector(units, units, lanes)
                        for t in range(tiles):
                            _add_product(builder, slots[t * together + j], q_values[t][s], value)

        with cgutils.for_range(builder, n_blocks) as blocks:
            block = _emit_block(builder, keys, blocks.index, I8 if codes else unit)
            with cgutils.for_range(builder, _constant(BLOCK // together)) as parts:
                first = builder.mul(parts.index, _constant(together))
                part = builder.gep(block, [builder.mul(first, stride)])
                rows = [builder.gep(part, [builder.mul(stride, _constant(j))]) for j in range(together)]
                for slot in (*slots, *lower) if digits else slots:
                    builder.store(ir.Constant(kind, None), slot)
                if digits:
                    for t, bias in enumerate(biases):
                        for slot in slots[t * together : (t + 1) * together]:
                            builder.store(builder.load(bias), slot)
                add = add_digits if digits else add_codes if codes else add_elements
                add(part, rows)
                place = builder.add(builder.mul(blocks.index, _constant(BLOCK)), first)
                place = builder.mul(place, _constant(queries))
                for t in range(tiles):
                    target = builder.gep(out, [builder.add(place, builder.mul(out_stride, _constant(t)))])
                    for group in range(together // width):
                        begin = t * together + group * width
                        sums = [builder.load(slot) for slot in slots[begin : begin + width]]
                        there = builder.gep(target, [_constant(group * LANES)])
                        there = builder.bitcast(there, F32X.as_pointer())
                        total = add_lanes(builder, sums)
                        if kind == I32X:
                            factor = _simd.emit_load(builder, factors, _constant(t * LANES), F32X, 4)
                            total = builder.fmul(builder.sitofp(total, F32X), factor)
                        builder.store(total, there, align=4)

    def codegen(context, builder, sig, args):
        name = f"hfopt.score_tile.{queries}.{tiles}.{_kind(pairs, codes)}"
        _outlined(builder, name, [*args[:3], *args[4:10]], emit)
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
                yield _simd.emit_load(builder, row, _constant(c * LANES), vector, 4)

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
                weight = _simd.emit_splat(builder, weight, vector)
                first_slot = (key // ratio % sets * queries + g) * vectors
                for c, value in enumerate(columns):
                    _add_product(builder, slots[first_slot + c], weight, value)

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
                sums = [
                    functools.reduce(builder.fadd if kind == F32X else builder.add, part) for part in parts
                ]
                if kind == I32X:
                    factor = builder.load(builder.gep(factors, [_constant(g * width)]), align=4)
                    factor = _simd.emit_splat(builder, factor, F32X)
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
