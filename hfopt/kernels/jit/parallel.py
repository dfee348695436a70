"""Bodies that compile fast, and the parallel loop of a launch.

Numba's `prange` compiles its loop body, and all that is linked into it, three times; and each jitted
function is optimised and turned into machine code by itself before it is linked into its callers. Here a
body only becomes code of the launch that calls it, and `parallel_for` hands a body straight to the threads:
those of `openmp`, or of Numba's threading layer without it.
"""

from collections.abc import Callable

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import compiler, openmp
from hfopt.kernels.jit import launch as jit
from hfopt.kernels.jit.compiler import BYTES, I32, INTP, emit_call


def body(py_func: Callable):
    """Decorator of a function on one tile of work, for launches and other bodies to call (not for Python)."""
    return compiler.linked(py_func, inline=False, **jit.OPTIONS)


def inlined(py_func: Callable):
    """The same for what is called in one place, with records of which a call would hand over every number."""
    return compiler.linked(py_func, inline=True, **jit.OPTIONS)


@intrinsic
def usable_threads(typingctx):
    """Threads that `parallel_for` may use."""

    def codegen(context, builder, sig, args):
        # Numba's own function of this name holds a pointer, which keeps its callers out of the disk cache
        name = openmp.LIMIT if openmp.RUNTIME else compiler.NUMBA_THREADS
        return builder.sext(emit_call(builder, name, I32, args), INTP)

    return types.intp(), codegen


def _range_function(context, builder, compiled, argument_types, record_type):
    """A function of (arguments, first, count): the body on `count` indices from `first`.

    It is there once, for one thread and for several: copies of it would be optimised each for its surroundings, and sums
    that LLVM may take in any order would have other bits in each.
    """
    name = builder.module.get_unique_name("hfopt.range")
    function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [BYTES, INTP, INTP]), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    inner = ir.IRBuilder(function.append_basic_block("entry"))
    data, first, count = function.args
    record = inner.load(inner.bitcast(data, record_type.as_pointer()))
    values = [inner.extract_value(record, i) for i in range(len(record_type.elements))]
    with compiler.for_range(inner, count) as loop:
        index = inner.add(first, loop.index)
        compiler.call_body(context, inner, compiled, argument_types, [index, *values])
    inner.ret_void()
    return function


def _emit_share(builder, counter, total, team):
    """Takes the next share of the indices below `total`: (first, end); empty when none is left.

    A share is an equal part of half of what is left (at least one index), so the first ones are long runs through memory
    and the last ones short: a thread that others hold up takes fewer, and no thread waits long for the last
    (guided self-scheduling, https://doi.org/10.1109/TC.1987.5009495).
    """
    zero, one = ir.Constant(INTP, 0), ir.Constant(INTP, 1)
    start = builder.load_atomic(counter, "monotonic", 8)
    entry, loop, done = (
        builder.block,
        builder.append_basic_block("share"),
        builder.append_basic_block("taken"),
    )
    builder.branch(loop)
    builder.position_at_end(loop)
    first = builder.phi(INTP)
    first.add_incoming(start, entry)
    left = builder.sub(total, first)
    part = builder.sdiv(left, builder.shl(team, one))
    size = builder.select(builder.icmp_signed(">", part, one), part, one)
    size = builder.select(builder.icmp_signed(">", left, zero), size, zero)
    end = builder.add(first, size)
    outcome = builder.cmpxchg(counter, first, end, "monotonic", "monotonic")
    first.add_incoming(builder.extract_value(outcome, 0), loop)
    builder.cbranch(builder.extract_value(outcome, 1), done, loop)
    builder.position_at_end(done)
    return first, end


def _emit_openmp_loop(builder, name, run, record_type, record, n_threads, n):
    """`n` indices in shares on a team of OpenMP threads."""
    # what the threads are given: the first index that is not taken, n, and the arguments
    whole = ir.LiteralStructType([INTP, INTP, record_type])
    task = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [BYTES]), name)
    task.linkage = "internal"
    inner = ir.IRBuilder(task.append_basic_block("entry"))
    shared = inner.bitcast(task.args[0], whole.as_pointer())
    counter = compiler.gep_inbounds(inner, shared, 0, 0)
    total = inner.load(compiler.gep_inbounds(inner, shared, 0, 1))
    arguments = inner.bitcast(compiler.gep_inbounds(inner, shared, 0, 2), BYTES)
    team = inner.sext(emit_call(inner, openmp.TEAM, I32, []), INTP)
    take, work, done = (inner.append_basic_block(label) for label in ("take", "work", "done"))
    inner.branch(take)
    inner.position_at_end(take)
    first, end = _emit_share(inner, counter, total, team)
    inner.cbranch(inner.icmp_signed("<", first, end), work, done)
    inner.position_at_end(work)
    inner.call(run, [arguments, first, inner.sub(end, first)])
    inner.branch(take)
    inner.position_at_end(done)
    inner.ret_void()

    values = builder.insert_value(ir.Constant(whole, ir.Undefined), ir.Constant(INTP, 0), 0)
    values = builder.insert_value(values, n, 1)
    values = builder.insert_value(values, record, 2)
    data = builder.bitcast(compiler.alloca_once_value(builder, values), BYTES)
    threads = builder.trunc(n_threads, I32)
    emit_call(
        builder,
        openmp.PARALLEL,
        ir.VoidType(),
        [builder.bitcast(task, BYTES), data, threads, ir.Constant(I32, 0)],
    )


@intrinsic
def parallel_for(typingctx, task, n_threads, n, arguments):
    """task(i, *arguments) for i < n, in order on one thread, in shares on n_threads; a task returns nothing."""
    argument_types = (types.intp, *arguments)
    compiler.infer_body(typingctx, task, argument_types)

    def codegen(context, builder, sig, args):
        _, n_threads, n, packed = args
        compiled = compiler.link_body(context, task, argument_types)
        values = compiler.unpack_tuple(builder, packed, len(arguments))
        record_type = ir.LiteralStructType([value.type for value in values])
        record = ir.Constant(record_type, ir.Undefined)
        for place, value in enumerate(values):
            record = builder.insert_value(record, value, place)

        run = _range_function(context, builder, compiled, argument_types, record_type)
        name = builder.module.get_unique_name("hfopt.task")
        with builder.if_else(builder.icmp_signed(">", n_threads, ir.Constant(INTP, 1))) as (several, alone):
            with several:
                if openmp.RUNTIME:
                    _emit_openmp_loop(builder, name, run, record_type, record, n_threads, n)
                else:
                    compiler.emit_numba_loop(builder, name, run, record, n_threads, n)
            with alone:
                data = builder.bitcast(compiler.alloca_once_value(builder, record), BYTES)
                builder.call(run, [data, ir.Constant(INTP, 0), n])
        return context.get_dummy_value()

    return types.void(task, types.intp, types.intp, arguments), codegen


@intrinsic
def next_share(typingctx, counter, total, n_threads):
    """(first, end) of the next share of the indices below `total`, empty when none is left; counter[0] starts at 0.

    For workers that keep something from share to share; otherwise `parallel_for` does the same.
    """

    def codegen(context, builder, sig, args):
        return context.make_tuple(builder, sig.return_type, _emit_share(builder, *args))

    pair = types.UniTuple(types.intp, 2)
    return pair(types.CPointer(types.int64), types.intp, types.intp), codegen


@intrinsic
def next_index(typingctx, counter):
    """counter[0], which grows by 1: each thread that asks gets another number."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", args[0], ir.Constant(INTP, 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), codegen


@intrinsic
def arrive(typingctx, counter, count):
    """Adds to counter[0]; what the thread wrote before can be read by those that find it there with `arrived`."""

    def codegen(context, builder, sig, args):
        builder.atomic_rmw("add", args[0], args[1], "acq_rel")
        return context.get_dummy_value()

    return types.void(types.CPointer(types.int64), types.int64), codegen


@intrinsic
def arrived(typingctx, counter):
    """counter[0]; see `arrive`."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(args[0], "acquire", 8)

    return types.int64(types.CPointer(types.int64)), codegen


@body
def threads_for(n_tiles, work, enough):
    """Threads for n_tiles tiles: one if `work` is below `enough`. Results must not depend on it."""
    return 1 if work < enough else max(min(usable_threads(), n_tiles), 1)
