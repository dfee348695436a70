"""What the threads can do at most: read memory, multiply and add, start and stop. Limits to compare kernels with."""

from ._jit import launch
from ._parallel import body, parallel_for, usable_threads
from ._pointer import load, pointer, prefetch, shifted, store_scalar
from ._simd import LANES
from ._tile import outer_tile
from ._vector import splat, sum_lanes

# units of one round of `multiply_add`; with 14 rows and 2 vectors all operands stay in an L1 cache
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
