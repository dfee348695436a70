"""What waiting needs of the system: a clock, and sleep until a word in shared memory changes (futex(2), Linux alone).

On other systems the clock stands still and sleep ends at once: no group is made there.
"""

import ctypes
import platform
import sys

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit.compiler import (
    BYTES,
    INTP,
    add_symbol,
    alloca_once_value,
    emit_call,
    gep_inbounds,
)

_CLOCK, _SYSCALL, _YIELD = "hfopt_clock_gettime", "hfopt_syscall", "hfopt_sched_yield"
_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(
    platform.machine(), 0
)  # its number as a system call
IS_KNOWN = sys.platform == "linux" and sys.byteorder == "little" and _FUTEX != 0
_WAIT, _WAKE = 0, 1
_ALL = 2**31 - 1
_MONOTONIC = 1
_SECOND = 1_000_000_000

if IS_KNOWN:
    _library = ctypes.CDLL(None)
    for _name in (_CLOCK, _SYSCALL, _YIELD):
        _address = ctypes.cast(getattr(_library, _name.removeprefix("hfopt_")), ctypes.c_void_p).value
        assert _address is not None
        add_symbol(_name, _address)


def _emit_time(builder, seconds, nanoseconds):
    """A pointer to a timespec."""
    pair = ir.Constant(ir.LiteralStructType([INTP, INTP]), ir.Undefined)
    pair = builder.insert_value(pair, seconds, 0)
    return alloca_once_value(builder, builder.insert_value(pair, nanoseconds, 1))


@intrinsic
def nanoseconds(typingctx):
    """Of a clock that only goes forward."""

    def codegen(context, builder, sig, args):
        zero = ir.Constant(INTP, 0)
        if not IS_KNOWN:
            return zero
        time = _emit_time(builder, zero, zero)
        clock = ir.Constant(ir.IntType(32), _MONOTONIC)
        emit_call(builder, _CLOCK, ir.IntType(32), [clock, builder.bitcast(time, BYTES)])
        seconds, rest = (builder.load(gep_inbounds(builder, time, 0, i)) for i in (0, 1))
        return builder.add(builder.mul(seconds, ir.Constant(INTP, _SECOND)), rest)

    return types.int64(), codegen


@intrinsic
def yield_core(typingctx):
    """Let another thread that waits for this core have it; at once back if there is none."""

    def codegen(context, builder, sig, args):
        if IS_KNOWN:
            emit_call(builder, _YIELD, ir.IntType(32), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def sleep_while(typingctx, p, value, span):
    """Sleep while p[0] is `value`, at most `span` nanoseconds (below a second); a signal ends it, too."""

    def codegen(context, builder, sig, args):
        if IS_KNOWN:
            word, value, span = args
            time = _emit_time(builder, ir.Constant(INTP, 0), span)
            lower = builder.and_(value, ir.Constant(INTP, 0xFFFFFFFF))  # a futex is of 32 bits
            numbers = [ir.Constant(INTP, n) for n in (_FUTEX, _WAIT, 0)]
            rest = [lower, builder.ptrtoint(time, INTP), numbers[2], numbers[2]]
            emit_call(builder, _SYSCALL, INTP, [numbers[0], builder.ptrtoint(word, INTP), numbers[1], *rest])
        return context.get_dummy_value()

    return types.void(types.CPointer(types.int64), types.int64, types.int64), codegen


@intrinsic
def wake_all(typingctx, p):
    """End the sleep of all who wait for p[0]."""

    def codegen(context, builder, sig, args):
        if IS_KNOWN:
            numbers = [ir.Constant(INTP, n) for n in (_FUTEX, _WAKE, _ALL, 0)]
            place = builder.ptrtoint(args[0], INTP)
            arguments = [numbers[0], place, *numbers[1:3], numbers[3], numbers[3], numbers[3]]
            emit_call(builder, _SYSCALL, INTP, arguments)
        return context.get_dummy_value()

    return types.void(types.CPointer(types.int64)), codegen
