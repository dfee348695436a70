"""What the threads can do at most: read memory, multiply and add, start and stop. Limits to compare kernels with."""

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import compiler
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, usable_threads
from hfopt.kernels.simd.emit import outlined
from hfopt.kernels.simd.integer_dot import emit_dot_bytes
from hfopt.kernels.simd.memory import load, prefetch, store_scalar
from hfopt.kernels.simd.pointer import pointer, shifted
from hfopt.kernels.simd.tile import outer_tile
from hfopt.kernels.simd.types import I32X, INTP, LANES, emit_load, emit_splat
from hfopt.kernels.simd.vector import splat, sum_lanes

# 32-bit units of one round of `multiply_add`; with 14 rows and 2 vectors all operands stay in an L1 cache
DEPTH, ROWS, COLUMNS = 128, 14, 2 * LANES
# Memory in pages of 4 KB is read 15 % slower in one stream: the hardware's prefetcher starts anew at each page.
_STREAMS = 4
_AHEAD = 1024  # elements, a page
_STEP = 4 * LANES


@body
def _read_share(worker, n_workers, x, size, sums):
    """sums[worker] = sum of the worker's contiguous share of x."""
    length = size // (n_workers * _STREAMS * _STEP) * _STEP  # of a stream
    x = shifted(x, worker * _STREAMS * length)
    a = b = c = d = splat(0.0)
    for step in range(0, length, _STEP):
        for stream in range(_STREAMS):
            k = stream * length + step
            prefetch(x, k + _AHEAD)
            prefetch(x, k + _AHEAD + LANES)
            prefetch(x, k + _AHEAD + 2 * LANES)
            prefetch(x, k + _AHEAD + 3 * LANES)
            a = a + load(x, k)
            b = b + load(x, k + LANES)
            c = c + load(x, k + 2 * LANES)
            d = d + load(x, k + 3 * LANES)
    store_scalar(sums, worker, sum_lanes((a + b) + (c + d)))


@launch
def read(x, sums):
    """Read x, float32 [n], once, up to 256 values a thread left out; sums float32 [>= threads]."""
    threads = usable_threads()
    parallel_for(_read_share, threads, threads, (threads, pointer(x), x.size, pointer(sums)))


@body
def _multiply_add_task(worker, a, b, out, rounds):
    mine = shifted(out, worker * ROWS * COLUMNS)
    for _ in range(rounds):
        outer_tile(a, b, DEPTH, mine, ROWS, 2, False)


@launch
def multiply_add(a, b, out, rounds):
    """out[t] = a^T b on every thread t, `rounds` times: rounds * threads * DEPTH * ROWS * COLUMNS multiply-adds.

    a [DEPTH, ROWS], b [DEPTH, COLUMNS] float32, or uint32 for pairs of bfloat16 (twice the multiply-adds); out float32
    [>= threads, ROWS, COLUMNS].
    """
    threads = usable_threads()
    parallel_for(_multiply_add_task, threads, threads, (pointer(a), pointer(b), pointer(out), rounds))


@intrinsic
def _integer_tile(typingctx, a, b, out):
    """out [ROWS, COLUMNS] = a^T b of unsigned by signed 8-bit integers, four of each in a unit of a and b."""

    def emit(builder, args):
        a, b, out = args
        slots = [compiler.alloca_once(builder, I32X) for _ in range(ROWS * COLUMNS // LANES)]
        for slot in slots:
            builder.store(ir.Constant(I32X, None), slot)

        def place(row, width, column):
            return builder.add(builder.mul(row, ir.Constant(INTP, width)), ir.Constant(INTP, column))

        with compiler.for_range(builder, ir.Constant(INTP, DEPTH)) as loop:
            columns = range(0, COLUMNS, LANES)
            codes = [emit_load(builder, b, place(loop.index, COLUMNS, j), I32X, 4) for j in columns]
            for i in range(ROWS):
                value = builder.load(builder.gep(a, [place(loop.index, ROWS, i)]), align=4)
                x = emit_splat(builder, value, I32X)
                for j, code in enumerate(codes):
                    slot = slots[i * len(codes) + j]
                    builder.store(emit_dot_bytes(builder, builder.load(slot), code, x), slot)
        for index, slot in enumerate(slots):
            there = builder.gep(out, [ir.Constant(INTP, index * LANES)])
            builder.store(builder.load(slot), builder.bitcast(there, I32X.as_pointer()), align=4)

    def codegen(context, builder, sig, args):
        outlined(builder, "hfopt.integer_tile", args, emit)
        return context.get_dummy_value()

    return types.void(a, b, out), codegen


@body
def _multiply_codes_task(worker, a, b, out, rounds):
    mine = shifted(out, worker * ROWS * COLUMNS)
    for _ in range(rounds):
        _integer_tile(a, b, mine)


@launch
def multiply_codes(a, b, out, rounds):
    """As `multiply_add` for 8-bit integers, with four times the multiply-adds: sums are int32.

    a [DEPTH, ROWS] int32, four signed ones in each; b [DEPTH, COLUMNS] int32, four unsigned ones in each; out int32
    [>= threads, ROWS, COLUMNS].
    """
    threads = usable_threads()
    parallel_for(_multiply_codes_task, threads, threads, (pointer(a), pointer(b), pointer(out), rounds))


@body
def _nothing(index, argument):
    pass


@launch
def start(x):
    """Nothing, on the calling thread."""
    return 0


@launch
def start_threads(x):
    """Nothing, on every thread."""
    threads = usable_threads()
    parallel_for(_nothing, threads, threads, (0,))
