"""The register tile of decode attention that multiplies queries and keys; see `elements`."""

from typing import Any, NamedTuple

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.attention.elements import (
    BLOCK,
    add_product,
    emit_again,
    emit_ahead,
    emit_block,
    emit_narrow,
    kind_of,
    line_elements,
    narrow_type,
)
from hfopt.kernels.attention.lanes import address_list
from hfopt.kernels.jit import compiler
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.emit import accumulators, intp, is_pairs, literal_ints, outlined
from hfopt.kernels.simd.integer_dot import emit_dot_bytes
from hfopt.kernels.simd.tile import add_lanes
from hfopt.kernels.simd.types import F32, F32X, I32, I32X, LANES

_SIGNS = simd.splat_int(0x80808080 - (1 << 32))


def _load_digits(builder, q, tile, n_turns, turn):
    """Upper and lower digits of 16 channels of four queries."""
    place = builder.mul(builder.add(builder.mul(n_turns, intp(tile)), turn), intp(2 * LANES))
    places = place, builder.add(place, intp(LANES))
    return [simd.emit_load(builder, q, each, I32X, 4) for each in places]


def _emit_bias(builder, q, tile, n_turns):
    """Slot of the sums of upper digits times -128, which takes back that codes are made unsigned by adding 128."""
    slot = compiler.alloca_once_value(builder, ir.Constant(I32X, None))
    with compiler.for_range(builder, n_turns) as loop:
        high, _ = _load_digits(builder, q, tile, n_turns, loop.index)
        builder.store(emit_dot_bytes(builder, builder.load(slot), _SIGNS, high), slot)
    builder.store(builder.sub(ir.Constant(I32X, None), builder.load(slot)), slot)
    return slot


class _Arguments(NamedTuple):
    """Arguments of a `score_tile`, as its code gets them."""

    q: Any
    factors: Any
    steps: Any
    keys: Any
    n_blocks: Any
    stride: Any
    ahead: Any
    out: Any
    out_stride: Any


class _Shape(NamedTuple):
    """What the literals of a `score_tile` and the types of its arguments say."""

    queries: int
    tiles: int
    pairs: bool
    narrow: ir.IntType | None  # see `narrow_type`

    @property
    def width(self) -> int:
        """Lanes of a query."""
        return LANES // self.queries

    @property
    def digits(self) -> bool:
        """Whether queries are digits of 8 bits."""
        return self.pairs and self.narrow is not None and self.queries == 4

    @property
    def keys(self) -> int:
        """Keys whose sums are in registers."""
        return (self.width if self.queries == 1 else 8) // (self.tiles if self.digits else 1)


class _Tile:
    """The code of a `score_tile`."""

    def __init__(self, shape: _Shape, builder, args):
        self.shape, self.builder, self.a = shape, builder, _Arguments(*args)
        self.unit, self.vector = (I32, I32X) if shape.pairs else (F32, F32X)
        self.kind = I32X if shape.pairs and shape.narrow else F32X
        self.slots = accumulators(builder, shape.tiles * shape.keys, self.kind)
        self.lower, self.biases = [], []
        self.stride = self.a.stride
        if shape.digits:
            self.lower = accumulators(builder, shape.tiles * shape.keys, I32X)
            self.n_turns = builder.lshr(self.a.steps, intp(1))
            self.biases = [_emit_bias(builder, self.a.q, t, self.n_turns) for t in range(shape.tiles)]
        if shape.narrow:
            self.stride = builder.mul(self.stride, intp(2 if shape.pairs else 1))

    def emit(self):
        """All blocks, some keys at a time."""
        builder, a, shape, n_keys = self.builder, self.a, self.shape, self.shape.keys
        add = self._add_digits if shape.digits else self._add_narrow if shape.narrow else self._add_units
        n_bytes = builder.mul(self.stride, intp(BLOCK * (shape.narrow or I32).width // 8))
        self.again = emit_again(builder, a.keys, a.n_blocks, n_bytes)
        with compiler.for_range(builder, a.n_blocks) as blocks:
            block = emit_block(builder, a.keys, blocks.index, shape.narrow or self.unit)
            with compiler.for_range(builder, intp(BLOCK // n_keys)) as parts:
                first = builder.mul(parts.index, intp(n_keys))
                part = builder.gep(block, [builder.mul(first, self.stride)])
                rows = [builder.gep(part, [builder.mul(self.stride, intp(j))]) for j in range(n_keys)]
                for slot in (*self.slots, *self.lower):
                    builder.store(ir.Constant(self.kind, None), slot)
                for t, bias in enumerate(self.biases):
                    for slot in self.slots[t * n_keys : (t + 1) * n_keys]:
                        builder.store(builder.load(bias), slot)
                add(part, rows)
                place = builder.add(builder.mul(blocks.index, intp(BLOCK)), first)
                self._store(builder.mul(place, intp(shape.queries)))

    def _store(self, place):
        """Sums of some keys."""
        builder, a, n_keys, width = self.builder, self.a, self.shape.keys, self.shape.width
        for t in range(self.shape.tiles):
            target = builder.gep(a.out, [builder.add(place, builder.mul(a.out_stride, intp(t)))])
            for group in range(n_keys // width):
                begin = t * n_keys + group * width
                sums = [builder.load(slot) for slot in self.slots[begin : begin + width]]
                there = builder.gep(target, [intp(group * LANES)])
                there = builder.bitcast(there, F32X.as_pointer())
                total = add_lanes(builder, sums)
                if self.kind == I32X:
                    factor = simd.emit_load(builder, a.factors, intp(t * LANES), F32X, 4)
                    total = builder.fmul(builder.sitofp(total, F32X), factor)
                builder.store(total, there, align=4)

    def _load_query(self, tile, step):
        builder = self.builder
        place = builder.mul(builder.add(builder.mul(self.a.steps, intp(tile)), step), intp(LANES))
        return simd.emit_load(builder, self.a.q, place, self.vector, 4)

    def _prefetch(self, part, turn, n_lines, of_line):
        """All lines of these rows, in order, whatever their number."""
        builder = self.builder
        for line in range(n_lines):
            place = builder.add(builder.mul(turn, intp(n_lines)), intp(line))
            emit_ahead(builder, part, builder.mul(place, intp(of_line)), self.a.ahead, self.again)

    def _add_digits(self, part, rows):
        builder, (_, tiles, *_), n_keys = self.builder, self.shape, self.shape.keys
        with compiler.for_range(builder, self.n_turns) as loop:
            q_values = [_load_digits(builder, self.a.q, t, self.n_turns, loop.index) for t in range(tiles)]
            self._prefetch(part, loop.index, n_keys // 4, 64)
            place = builder.mul(loop.index, intp(LANES))
            for j, row in enumerate(rows):
                value = simd.emit_load(builder, row, place, ir.VectorType(I32, 4), 1)
                spread = ir.Constant(ir.VectorType(I32, LANES), [k % 4 for k in range(LANES)])
                value = builder.shuffle_vector(value, value, spread)
                flipped = builder.xor(value, _SIGNS)
                for t, (high, low) in enumerate(q_values):
                    slot, other = self.slots[t * n_keys + j], self.lower[t * n_keys + j]
                    builder.store(emit_dot_bytes(builder, builder.load(slot), flipped, high), slot)
                    builder.store(emit_dot_bytes(builder, builder.load(other), low, value), other)
        for slot, other in zip(self.slots, self.lower, strict=True):
            total = builder.shl(builder.load(slot), simd.splat_int(8))
            builder.store(builder.add(total, builder.load(other)), slot)

    def _add_units(self, part, rows):
        builder, (_, tiles, *_), n_keys = self.builder, self.shape, self.shape.keys
        width = self.shape.width
        segment = ir.VectorType(self.unit, width)
        spread = ir.Constant(ir.VectorType(I32, LANES), [k % width for k in range(LANES)])
        with compiler.for_range(builder, self.a.steps) as loop:
            q_values = [self._load_query(t, loop.index) for t in range(tiles)]
            self._prefetch(part, loop.index, n_keys * width // LANES, LANES)
            place = builder.mul(loop.index, intp(width))
            for j, row in enumerate(rows):
                value = simd.emit_load(builder, row, place, segment, 4)
                value = builder.shuffle_vector(value, value, spread)
                for t, q_value in enumerate(q_values):
                    add_product(builder, self.slots[t * n_keys + j], q_value, value)

    def _add_narrow(self, part, rows):
        """As many segments at a time as a vector of units has."""
        builder, (queries, tiles, pairs, _), n_keys = self.builder, self.shape, self.shape.keys
        ratio, width = 2 if pairs else 1, self.shape.width
        of_line = line_elements(self.shape.narrow)
        with compiler.for_range(builder, builder.udiv(self.a.steps, intp(queries))) as loop:
            first = builder.mul(loop.index, intp(queries))
            places = [builder.add(first, intp(s)) for s in range(queries)]
            q_values = [[self._load_query(t, place) for place in places] for t in range(tiles)]
            self._prefetch(part, loop.index, n_keys * ratio * LANES // of_line, of_line)
            place = builder.mul(loop.index, intp(ratio * LANES))
            for j, row in enumerate(rows):
                units = emit_narrow(builder, row, place, pairs)
                for s in range(queries):
                    lanes = [s * width + k % width for k in range(LANES)]
                    lanes = ir.Constant(ir.VectorType(I32, LANES), lanes)
                    value = builder.shuffle_vector(units, units, lanes)
                    for t in range(tiles):
                        add_product(builder, self.slots[t * n_keys + j], q_values[t][s], value)


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
    queries, tiles = literal_ints(n_queries, n_tiles)
    index = types.intp
    signature = types.void(
        q, factors, index, like, address_list, index, index, index, out, index, n_queries, n_tiles
    )
    shape = _Shape(queries, tiles, is_pairs(q), narrow_type(like))

    def codegen(context, builder, sig, args):
        name = f"hfopt.score_tile.{queries}.{tiles}.{kind_of(shape.pairs, shape.narrow)}"
        values = [*args[:3], *args[4:10]]
        outlined(builder, name, values, lambda inner, args: _Tile(shape, inner, args).emit())
        return context.get_dummy_value()

    return signature, codegen
