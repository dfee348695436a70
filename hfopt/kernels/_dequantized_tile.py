"""Quantised weights as numbers, for register tiles of `_tile`."""

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import _simd
from ._pointer import emit_round
from ._quantized_tile import (
    LEVELS,
    UNIT,
    _load_at,
    _load_bytes,
    _load_halves,
    _load_levels,
    _prefetch_at,
    _unpack,
)
from ._simd import F32X, I32X, LANES
from ._tile import _constant, _is_pairs, _literal_ints, _outlined

_AHEAD = 4096  # bytes by which codes are asked for in advance; measured


@intrinsic(prefer_literal=True)
def dequantize(typingctx, w, part, target, zero, kind):
    """target = (code - zero point) * scale for some units of a block, as `_tile.outer_tile` takes them.

    w: as in `quantized_tile`. part: (first unit, end, units of a group). target: pointer to 32-bit units, float32
    [inputs, 32] or pairs of bfloat16 [inputs / 2, 32], of which 16 columns are written. zero: zero point where w has none
    of its own.
    """
    (kind_,) = _literal_ints(kind)
    signature = types.void(w, part, target, types.int64, kind)
    pairs = _is_pairs(target)

    def emit(builder, args):
        w, scales, zeros, levels, first, last, length, target, zero = args
        table = _load_levels(builder, levels) if kind_ == LEVELS else None
        none = _constant(0)
        place = cgutils.alloca_once_value(builder, none)
        scale_slot = cgutils.alloca_once_value(builder, _simd.splat_float(1.0))
        constant = _simd.emit_splat(builder, builder.sitofp(zero, _simd.F32), F32X)
        zero_slot = cgutils.alloca_once_value(builder, constant)
        has_zeros = builder.icmp_signed("!=", zeros, none)
        has_scales = builder.icmp_signed("!=", scales, none)
        byte = _simd.splat_int(0xFF)

        def put(value):
            at = builder.gep(target, [builder.load(place)])
            builder.store(value, builder.bitcast(at, value.type.as_pointer()), align=4)
            builder.store(builder.add(builder.load(place), _constant(2 * LANES)), place)

        with cgutils.for_range(builder, builder.sub(last, first)) as units:
            unit = builder.add(first, units.index)
            group = builder.mul(builder.udiv(unit, length), _constant(LANES))
            with builder.if_then(has_zeros):
                builder.store(builder.sitofp(_load_bytes(builder, zeros, group), F32X), zero_slot)
            with builder.if_then(has_scales):
                offset = builder.shl(group, _constant(1))
                builder.store(_load_halves(builder, scales, offset), scale_slot)
            offset = builder.mul(unit, _constant(UNIT))
            _prefetch_at(builder, w, builder.add(offset, _constant(_AHEAD)))
            for codes in _unpack(builder, _load_at(builder, w, offset, I32X), kind_, table):
                values = []
                for k in range(4):
                    code = builder.and_(builder.lshr(codes, _simd.splat_int(8 * k)), byte)
                    centred = builder.fsub(builder.sitofp(code, F32X), builder.load(zero_slot))
                    values.append(builder.fmul(centred, builder.load(scale_slot)))
                if not pairs:
                    for value in values:
                        put(value)
                    continue
                for low, high in zip(values[::2], values[1::2], strict=True):
                    low, high = (builder.zext(emit_round(builder, value), I32X) for value in (low, high))
                    put(builder.or_(low, builder.shl(high, _simd.splat_int(16))))

    def codegen(context, builder, sig, args):
        values = [value for packed in args[:2] for value in cgutils.unpack_tuple(builder, packed)]
        name = f"hfopt.dequantize.{kind_}.{'pairs' if pairs else 'floats'}"
        _outlined(builder, name, [*values, args[2], args[3]], emit)
        return context.get_dummy_value()

    return signature, codegen
