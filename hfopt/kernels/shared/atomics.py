"""Words that several processes read and write: loads, stores and sums in an order that all of them see."""

import platform

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit.compiler import BYTES, I32, emit_call

_WORDS = types.CPointer(types.int64)


@intrinsic
def load_acquire(typingctx, p):
    """p[0], and all that was written before the store that it came from can be read from now on."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(args[0], "acquire", 8)

    return types.int64(_WORDS), codegen


@intrinsic
def store_release(typingctx, p, value):
    """p[0] = value, behind all that this thread has written before."""

    def codegen(context, builder, sig, args):
        builder.store_atomic(args[1], args[0], "release", 8)
        return context.get_dummy_value()

    return types.void(_WORDS, types.int64), codegen


@intrinsic
def add_atomic(typingctx, p, value):
    """p[0] += value; all processes see such sums, and `fence_all`, in one order."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", args[0], args[1], "seq_cst")

    return types.int64(_WORDS, types.int64), codegen


@intrinsic
def fence_all(typingctx):
    """What is stored before is seen by all before anything behind is loaded."""

    def codegen(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def pause(typingctx):
    """Tells the core that this is a loop of waiting."""

    def codegen(context, builder, sig, args):
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            emit_call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif machine in ("aarch64", "arm64"):
            emit_call(builder, "llvm.aarch64.hint", ir.VoidType(), [ir.Constant(I32, 1)])  # yield
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def copy_block(typingctx, source, n_bytes, target):
    """n_bytes from one address to another; they do not overlap."""

    def codegen(context, builder, sig, args):
        source, n_bytes, target = args
        places = [builder.inttoptr(address, BYTES) for address in (target, source)]
        is_volatile = ir.Constant(ir.IntType(1), 0)
        emit_call(builder, "llvm.memcpy.p0.p0.i64", ir.VoidType(), [*places, n_bytes, is_volatile])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
