"""Products of 8-bit codes by the best instructions that the target has.

`vpdpbusd` adds four products to a sum: 64 bytes at a time with AVX-512 VNNI, 32 with AVX-VNNI. Without it codes below 16
take `pmaddubsw`, whose sums of two products fit into 16 bits; those of larger codes do not, so they are widened for
`pmaddwd`.
"""

import llvmlite.ir as ir

from hfopt.kernels.jit import cpu
from hfopt.kernels.simd import types as simd
from hfopt.kernels.simd.types import I8, I16, I32, I32X, LANES

UNIT = 4 * LANES  # bytes
_BYTES = ir.VectorType(I8, UNIT)
_SHORTS = ir.VectorType(I16, 2 * LANES)
_EIGHT = ir.Constant(_SHORTS, [ir.Constant(I16, 8)] * _SHORTS.count)
_ONES = ir.Constant(_SHORTS, [ir.Constant(I16, 1)] * _SHORTS.count)


# ---- instructions -----------------------------------------------------------------------------------------------------


def _shuffle(builder, a, b, lanes):
    order = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, lane) for lane in lanes])
    return builder.shuffle_vector(a, b, order)


def _emit_halves(builder, name, result, args):
    """An instruction of 32 bytes on both halves of operands of 64."""
    half = ir.VectorType(result.element, result.count // 2)
    values = []
    for first in (0, 1):
        parts = [
            _shuffle(builder, arg, arg, range(first * size, (first + 1) * size))
            for arg in args
            for size in [arg.type.count // 2]
        ]
        values.append(simd.emit_call(builder, name, half, parts))
    return _shuffle(builder, values[0], values[1], range(result.count))


def _emit_bytes(builder, wide, narrow, result, args):
    """The instruction of AVX-512 or AVX2 for bytes or 16 bits."""
    if cpu.HAS_AVX512_BW:
        return simd.emit_call(builder, wide, result, args)
    return _emit_halves(builder, narrow, result, args)


# ---- products ---------------------------------------------------------------------------------------------------------


def _widen(builder, words, signed):
    """The even and the odd bytes of each 16 bits, widened to 16 bits."""
    shorts = builder.bitcast(words, _SHORTS)
    shift = builder.ashr if signed else builder.lshr
    return shift(builder.shl(shorts, _EIGHT), _EIGHT), shift(shorts, _EIGHT)


def emit_dot_shorts(builder, a, b):
    """Lane j = a[2j] b[2j] + a[2j + 1] b[2j + 1]; LLVM knows the pattern (`pmaddwd`)."""
    wide = ir.VectorType(I32, 2 * LANES)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    return builder.add(*(_shuffle(builder, product, product, range(odd, 2 * LANES, 2)) for odd in (0, 1)))


def _dot_small(builder, codes, x):
    """Sums of four products of codes below 16 in each lane."""
    sums = _emit_bytes(
        builder,
        "llvm.x86.avx512.pmaddubs.w.512",
        "llvm.x86.avx2.pmadd.ub.sw",
        _SHORTS,
        [builder.bitcast(value, _BYTES) for value in (codes, x)],
    )
    return _emit_bytes(builder, "llvm.x86.avx512.pmaddw.d.512", "llvm.x86.avx2.pmadd.wd", I32X, [sums, _ONES])


def emit_dot_bytes(builder, total, codes, x, small=False):
    """total + the products of 4 unsigned codes, with `small` below 16, with 4 signed ones in each lane."""
    if cpu.HAS_AVX512_VNNI:
        # since LLVM 22 the operands are bytes; it upgrades this older form when it parses it
        return simd.emit_call(builder, "llvm.x86.avx512.vpdpbusd.512", I32X, [total, codes, x])
    if cpu.HAS_AVX_VNNI:
        return _emit_halves(builder, "llvm.x86.avx512.vpdpbusd.256", I32X, [total, codes, x])
    if small and cpu.HAS_AVX2:
        return builder.add(total, _dot_small(builder, codes, x))
    for a, b in zip(_widen(builder, codes, False), _widen(builder, x, True), strict=True):
        total = builder.add(total, emit_dot_shorts(builder, a, b))
    return total


# ---- lookup -----------------------------------------------------------------------------------------------------------


def emit_look_up(builder, levels, indices):
    """levels[i] for 64 indices below 16; levels are 16 bytes, repeated in each quarter."""
    table, index = (builder.bitcast(value, _BYTES) for value in (levels, indices))
    if cpu.HAS_AVX2:
        names = "llvm.x86.avx512.pshuf.b.512", "llvm.x86.avx2.pshuf.b"
        return builder.bitcast(_emit_bytes(builder, *names, _BYTES, [table, index]), I32X)
    # a tree of selects on the bits of the index, from pairs of levels to the one that is left
    values = [_shuffle(builder, table, table, [k] * UNIT) for k in range(LANES)]
    for bit in range(4):
        mask = ir.Constant(_BYTES, [ir.Constant(I8, 1 << bit)] * UNIT)
        is_set = builder.icmp_unsigned("!=", builder.and_(index, mask), ir.Constant(_BYTES, None))
        values = [builder.select(is_set, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return builder.bitcast(values[0], I32X)
