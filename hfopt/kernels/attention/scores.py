"""The register tile of decode attention that multiplies queries and keys; see `_decode_elements`."""

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import compiler
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.integer_dot import emit_dot_bytes
from hfopt.kernels.simd.pointer import _is_codes
from hfopt.kernels.simd.tile import _accumulators, _constant, _is_pairs, _literal_ints, _outlined, add_lanes
from hfopt.kernels.simd.types import F32, F32X, I8, I32, I32X, LANES

from .elements import BLOCK, _add_product, _emit_ahead, _emit_block, _emit_codes, _kind
from .lanes import address_list

_SIGNS = simd.splat_int(0x80808080 - (1 << 32))


def _load_digits(builder, q, tile, n_turns, turn):
    """Upper and lower digits of 16 channels of four queries."""
    place = builder.mul(builder.add(builder.mul(n_turns, _constant(tile)), turn), _constant(2 * LANES))
    places = place, builder.add(place, _constant(LANES))
    return [simd.emit_load(builder, q, each, I32X, 4) for each in places]


def _emit_bias(builder, q, tile, n_turns):
    """Slot of the sums of upper digits times -128, which takes back that codes are made unsigned by adding 128."""
    slot = compiler.alloca_once_value(builder, ir.Constant(I32X, None))
    with compiler.for_range(builder, n_turns) as loop:
        high, _ = _load_digits(builder, q, tile, n_turns, loop.index)
        builder.store(emit_dot_bytes(builder, builder.load(slot), _SIGNS, high), slot)
    builder.store(builder.sub(ir.Constant(I32X, None), builder.load(slot)), slot)
    return slot


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
            return simd.emit_load(builder, q, place, vector, 4)

        def ask(part, turn, n_lines, of_line):
            # all lines of these rows, in order, whatever their number
            for line in range(n_lines):
                place = builder.add(builder.mul(turn, _constant(n_lines)), _constant(line))
                _emit_ahead(builder, part, builder.mul(place, _constant(of_line)), ahead)

        def add_digits(part, rows):
            with compiler.for_range(builder, n_turns) as loop:
                q_values = [_load_digits(builder, q, t, n_turns, loop.index) for t in range(tiles)]
                ask(part, loop.index, together // 4, 64)
                place = builder.mul(loop.index, _constant(LANES))
                for j, row in enumerate(rows):
                    value = simd.emit_load(builder, row, place, ir.VectorType(I32, 4), 1)
                    spread = ir.Constant(ir.VectorType(I32, LANES), [k % 4 for k in range(LANES)])
                    value = builder.shuffle_vector(value, value, spread)
                    flipped = builder.xor(value, _SIGNS)
                    for t, (high, low) in enumerate(q_values):
                        slot, other = slots[t * together + j], lower[t * together + j]
                        builder.store(emit_dot_bytes(builder, builder.load(slot), flipped, high), slot)
                        builder.store(emit_dot_bytes(builder, builder.load(other), low, value), other)
            for slot, other in zip(slots, lower, strict=True):
                total = builder.shl(builder.load(slot), simd.splat_int(8))
                builder.store(builder.add(total, builder.load(other)), slot)

        def add_elements(part, rows):
            segment = ir.VectorType(unit, width)
            spread = ir.Constant(ir.VectorType(I32, LANES), [k % width for k in range(LANES)])
            with compiler.for_range(builder, steps) as loop:
                q_values = [load_query(t, loop.index) for t in range(tiles)]
                ask(part, loop.index, together * width // LANES, LANES)
                place = builder.mul(loop.index, _constant(width))
                for j, row in enumerate(rows):
                    value = simd.emit_load(builder, row, place, segment, 4)
                    value = builder.shuffle_vector(value, value, spread)
                    for t, q_value in enumerate(q_values):
                        _add_product(builder, slots[t * together + j], q_value, value)

        def add_codes(part, rows):
            # as many segments at a time as a vector of units has
            with compiler.for_range(builder, builder.udiv(steps, _constant(queries))) as loop:
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

        with compiler.for_range(builder, n_blocks) as blocks:
            block = _emit_block(builder, keys, blocks.index, I8 if codes else unit)
            with compiler.for_range(builder, _constant(BLOCK // together)) as parts:
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
                            factor = simd.emit_load(builder, factors, _constant(t * LANES), F32X, 4)
                            total = builder.fmul(builder.sitofp(total, F32X), factor)
                        builder.store(total, there, align=4)

    def codegen(context, builder, sig, args):
        name = f"hfopt.score_tile.{queries}.{tiles}.{_kind(pairs, codes)}"
        _outlined(builder, name, [*args[:3], *args[4:10]], emit)
        return context.get_dummy_value()

    return signature, codegen
