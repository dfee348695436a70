"""Tile registers of AMX: products of 16 rows of weights and up to 16 of x in one instruction.

A tile has up to 16 rows of 64 bytes. `multiply` adds to a tile of sums [rows of weights, rows of x], float32, the products
of a tile of weights [rows, 32 bfloat16] and one of x, whose rows are pairs of features: [16 pairs, rows of x, 2]. Each sum
is a matter of its own row and column, so that its bits are the same however many there are beside it. (Intel 64 and IA-32
Architectures Software Developer's Manual, volume 2, TDPBF16PS.)

A thread has no tiles until `configure`, and `release` gives them back. On targets without AMX nothing is emitted.
"""

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import cpu
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.emit import is_pairs, literal_ints
from hfopt.kernels.simd.pointer import bytes_at
from hfopt.kernels.simd.types import I8

ROWS = 16  # most rows of a tile
LINE = 64  # bytes of a row
CONFIG_BYTES = 64  # of what `configure` reads
_PALETTE, _ROW_BYTES, _ROW_COUNTS = 0, 16, 48  # places there
N_TILES = 8


def _emit(name, builder, numbers=(), args=()):
    if cpu.HAS_AMX_BF16:
        constants = [ir.Constant(I8, number) for number in numbers]
        simd.emit_call(builder, f"llvm.x86.{name}", ir.VoidType(), [*constants, *args])


def _address(builder, value):
    return builder.inttoptr(value, I8.as_pointer())


@intrinsic
def has_tiles(typingctx, p):
    """Whether products of elements of p are made in tile registers: of bfloat16, where the target has them."""
    flag = cpu.HAS_AMX_BF16 and is_pairs(p)
    return types.boolean(p), lambda context, builder, sig, args: ir.Constant(ir.IntType(1), flag)


@intrinsic
def _load_config(typingctx, address):
    def codegen(context, builder, sig, args):
        _emit("ldtilecfg", builder, (), [_address(builder, args[0])])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def release(typingctx):
    """Give the tiles back."""

    def codegen(context, builder, sig, args):
        _emit("tilerelease", builder)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def clear(typingctx, tile):
    """tile (a literal) = 0."""
    numbers = literal_ints(tile)

    def codegen(context, builder, sig, args):
        _emit("tilezero", builder, numbers)
        return context.get_dummy_value()

    return types.void(tile), codegen


@intrinsic(prefer_literal=True)
def load(typingctx, tile, address, stride):
    """tile (a literal) = rows at an address, `stride` bytes from one to the next."""
    numbers = literal_ints(tile)

    def codegen(context, builder, sig, args):
        _emit("tileloadd64", builder, numbers, [_address(builder, args[1]), args[2]])
        return context.get_dummy_value()

    return types.void(tile, types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def store(typingctx, tile, address, stride):
    """Write the rows of a tile (a literal), `stride` bytes from one to the next."""
    numbers = literal_ints(tile)

    def codegen(context, builder, sig, args):
        _emit("tilestored64", builder, numbers, [_address(builder, args[1]), args[2]])
        return context.get_dummy_value()

    return types.void(tile, types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def multiply(typingctx, sums, weights, x):
    """sums += weights x, all numbers of tiles (literals)."""
    numbers = literal_ints(sums, weights, x)

    def codegen(context, builder, sig, args):
        _emit("tdpbf16ps", builder, numbers)
        return context.get_dummy_value()

    return types.void(sums, weights, x), codegen


@body
def configure(room, n_even, n_odd, n_columns, sums, x):
    """Tiles of n_even or n_odd rows of weights, by the number of the tile.

    Those whose bits are set in `sums` have n_columns float32 in each row, those in `x` 16 rows of n_columns pairs, and the
    others 64 bytes in each row. room: address of `CONFIG_BYTES`.
    """
    config = bytes_at(room)
    for place in range(CONFIG_BYTES):
        config[place] = np.uint8(0)
    config[_PALETTE] = np.uint8(1)
    for tile in range(N_TILES):
        is_x = x >> tile & 1
        n_rows = n_odd if tile & 1 else n_even
        config[_ROW_COUNTS + tile] = np.uint8(ROWS if is_x else n_rows)
        config[_ROW_BYTES + 2 * tile] = np.uint8(4 * n_columns if is_x or sums >> tile & 1 else LINE)
    _load_config(room)
