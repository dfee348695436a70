"""The register tile of decode attention that adds up weighted values; see `elements`."""

import functools
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
from hfopt.kernels.simd.types import F32, F32X, I16, I32, I32X, LANES

_CHAINS = 8  # sums that one query needs at least to add a product each cycle


def _sums(p, width):
    """Vectors of sums of each query of a `weigh_tile`: those of one vector of units, 4, or 8."""
    return (2 if is_pairs(p) else 1, 4, 8)[width]


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


class _Arguments(NamedTuple):
    """Arguments of a `weigh_tile`, as its code gets them."""

    p: Any
    factors: Any
    values: Any
    n_blocks: Any
    stride: Any
    column: Any
    aheads: Any
    out: Any
    out_stride: Any
    n_valid: Any
    more: Any


class _Shape(NamedTuple):
    """What the literals of a `weigh_tile` and the types of its arguments say."""

    queries: int
    vectors: int  # of sums of each query
    pairs: bool
    narrow: ir.IntType | None  # see `narrow_type`

    @property
    def width(self) -> int:
        """Lanes of a query in a vector of weights."""
        return LANES // self.queries

    @property
    def ratio(self) -> int:
        """Elements of a unit."""
        return 2 if self.pairs else 1

    @property
    def sets(self) -> int:
        """Sets of sums, for one key after the other."""
        return min(_CHAINS // self.vectors, 4 // self.ratio) if self.queries == 1 else 1


class _Tile:
    """The code of a `weigh_tile`."""

    def __init__(self, shape: _Shape, builder, args):
        self.shape, self.builder, self.a = shape, builder, _Arguments(*args)
        self.unit, self.vector = (I32, I32X) if shape.pairs else (F32, F32X)
        self.kind = I32X if shape.pairs and shape.narrow else F32X
        self.slots = accumulators(builder, shape.queries * shape.vectors * shape.sets, self.kind)
        self.stride, self.column = self.a.stride, self.a.column
        if shape.narrow:
            sizes = self.stride, self.column
            self.stride, self.column = (builder.mul(size, intp(shape.ratio)) for size in sizes)

    def emit(self):
        """All blocks, and the sums of all queries."""
        builder, a, (queries, *_) = self.builder, self.a, self.shape
        width, ratio = self.shape.width, self.shape.ratio
        n_bytes = builder.mul(self.stride, intp(BLOCK * (self.shape.narrow or I32).width // 8))
        self.again = emit_again(builder, a.values, a.n_blocks, n_bytes)
        with compiler.for_range(builder, a.n_blocks) as blocks:
            block = emit_block(builder, a.values, blocks.index, self.shape.narrow or self.unit)
            self.ahead = builder.load(builder.gep(a.aheads, [blocks.index]))
            with compiler.for_range(builder, intp(BLOCK // 4)) as fours:
                first = builder.mul(fours.index, intp(4))
                # 4 keys of the group of `width` to which they belong
                within = builder.and_(first, intp(width - 1))
                place = builder.mul(builder.sub(first, within), intp(queries))
                place = builder.add(place, within)
                place = builder.add(place, builder.mul(blocks.index, intp(BLOCK * queries)))
                weights = builder.gep(a.p, [builder.udiv(place, intp(ratio))])
                for key in range(0, 4, ratio):
                    self._add_keys(block, weights, first, key)
        for query in range(queries):
            with builder.if_then(builder.icmp_signed(">", a.n_valid, intp(query))):
                self._store(query)

    def _load(self, block, first, key):
        """Vectors of one row of values."""
        builder, (_, vectors, pairs, narrow) = self.builder, self.shape
        place = builder.mul(self.stride, builder.add(first, intp(key)))
        row = builder.gep(block, [builder.add(place, self.column)])
        if narrow:
            # a tile may have less than a line of a row
            of_line = line_elements(narrow)
            n = of_line // LANES
            for line in range(vectors // n) if vectors >= n else range(key % (n // vectors) == 0):
                emit_ahead(builder, row, intp(line * of_line), self.ahead, self.again)
        for c in range(vectors // self.shape.ratio):
            if narrow:
                yield emit_narrow(builder, row, intp(c * LANES * self.shape.ratio), pairs)
            else:
                emit_ahead(builder, row, intp(c * LANES), self.ahead, self.again)
                yield simd.emit_load(builder, row, intp(c * LANES), self.vector, 4)

    def _add_keys(self, block, weights, first, key):
        """One key, or a pair of them."""
        builder, (queries, vectors, pairs, _), ratio = self.builder, self.shape, self.shape.ratio
        loads = [list(self._load(block, first, key + k)) for k in range(ratio)]
        if pairs:
            columns = [v for low, high in zip(*loads, strict=True) for v in _interleaved(builder, low, high)]
        else:
            (columns,) = loads
        for g in range(queries):
            place = intp((g * self.shape.width + key) // ratio)
            weight = builder.load(builder.gep(weights, [place]), align=4)
            weight = simd.emit_splat(builder, weight, self.vector)
            first_slot = (key // ratio % self.shape.sets * queries + g) * vectors
            for c, value in enumerate(columns):
                add_product(builder, self.slots[first_slot + c], weight, value)

    def _store(self, query):
        """Sums of one query."""
        builder, a, (queries, vectors, pairs, _) = self.builder, self.a, self.shape
        target = builder.gep(a.out, [builder.mul(a.out_stride, intp(query))])
        parts = [
            [builder.load(slot) for slot in self.slots[query * vectors + c :: queries * vectors]]
            for c in range(vectors)
        ]
        sums = [functools.reduce(builder.fadd if self.kind == F32X else builder.add, part) for part in parts]
        if self.kind == I32X:
            factor = builder.load(builder.gep(a.factors, [intp(query * self.shape.width)]), align=4)
            factor = simd.emit_splat(builder, factor, F32X)
            sums = [builder.fmul(builder.sitofp(value, F32X), factor) for value in sums]
        if pairs:
            sums = [v for c in range(0, vectors, 2) for v in _in_order(builder, sums[c : c + 2])]
        for c, value in enumerate(sums):
            there = builder.bitcast(builder.gep(target, [intp(c * LANES)]), F32X.as_pointer())
            with builder.if_else(a.more) as (add, fresh):
                with add:
                    before = builder.load(there, align=4)
                    builder.store(builder.fadd(before, value), there, align=4)
                with fresh:
                    builder.store(value, there, align=4)


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
    aheads,
    out,
    out_stride,
    n_valid,
    more,
    n_queries,
    wide,
):
    """out[g * out_stride + c] (+)= sum over 16 n_blocks keys of p[key, g] value[key, c], g < n_valid.

    p: units of weights in the order of `score_tile`; like: as there, of values; factors: where `takes_integers`, of the
    weights, in the order of lanes; aheads: bytes from each block to memory that is asked for; c: channels from unit `column`
    on, as many as `tile_columns` says for the literal `wide`.
    """
    queries, breadth = literal_ints(n_queries, wide)
    index = types.intp
    signature = types.void(
        p,
        factors,
        like,
        address_list,
        index,
        index,
        index,
        address_list,
        out,
        index,
        index,
        types.boolean,
        n_queries,
        wide,
    )
    shape = _Shape(queries, _sums(p, breadth), is_pairs(p), narrow_type(like))

    def codegen(context, builder, sig, args):
        name = f"hfopt.weigh_tile.{queries}.{breadth}.{kind_of(shape.pairs, shape.narrow)}"
        values = [*args[:2], *args[3:12]]
        outlined(builder, name, values, lambda inner, args: _Tile(shape, inner, args).emit())
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def tile_columns(typingctx, p, wide):
    """Channels of a `weigh_tile`."""
    (breadth,) = literal_ints(wide)
    columns = _sums(p, breadth) * LANES
    return types.intp(p, wide), lambda context, builder, sig, args: intp(columns)


@intrinsic
def put_pairs(typingctx, first, second, even, odd):
    """The 32 bfloat16 at two addresses as pairs of one channel each: 16 units each at even and odd, see `put_in_order`."""

    def codegen(context, builder, sig, args):
        rows = [builder.inttoptr(each, I32.as_pointer()) for each in args[:2]]
        rows = [simd.emit_load(builder, row, intp(0), I32X, 2) for row in rows]
        for units, target in zip(_interleaved(builder, *rows), args[2:], strict=True):
            builder.store(units, builder.bitcast(target, I32X.as_pointer()), align=4)
        return context.get_dummy_value()

    floats = types.CPointer(types.float32)
    return types.void(types.intp, types.intp, floats, floats), codegen


@intrinsic
def put_in_order(typingctx, even, odd, out):
    """out[32] = sums of channels of which `put_pairs` has put some at even and some at odd."""

    def codegen(context, builder, sig, args):
        sums = [simd.emit_load(builder, each, intp(0), F32X, 4) for each in args[:2]]
        for place, value in enumerate(_in_order(builder, sums)):
            there = builder.gep(args[2], [intp(place * LANES)])
            builder.store(value, builder.bitcast(there, F32X.as_pointer()), align=4)
        return context.get_dummy_value()

    floats = types.CPointer(types.float32)
    return types.void(floats, floats, floats), codegen
