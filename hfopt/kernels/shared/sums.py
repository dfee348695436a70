"""Sums of what ranks have written, one value after the other in the order of ranks, in float32, rounded once.

Where instructions of AVX-512 round to bfloat16, what is smaller than its normal numbers becomes 0.
"""

from hfopt.kernels.jit.parallel import body
from hfopt.kernels.shared.member import INPUT, buffer
from hfopt.kernels.simd.memory import load_part, load_two, store_part, store_two
from hfopt.kernels.simd.pointer import address_as, item_bytes, shifted
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import added


@body
def sum_inputs(like, m, sequence, first, count, out):
    """out[k] = sum over ranks of element first + k of their inputs; out, a pointer like `like`."""
    step = (buffer(m, 1, INPUT, sequence) - buffer(m, 0, INPUT, sequence)) // item_bytes(like)
    x = shifted(address_as(buffer(m, 0, INPUT, sequence), like), first)
    k = 0
    while k + 2 * LANES <= count:
        a, b = load_two(x, k)
        for rank in range(1, m.size):
            c, d = load_two(x, rank * step + k)
            a, b = added(a, c), added(b, d)
        store_two(out, k, a, b)
        k += 2 * LANES
    while k < count:
        n = min(count - k, LANES)
        a = load_part(x, k, n)
        for rank in range(1, m.size):
            a = added(a, load_part(x, rank * step + k, n))
        store_part(out, k, n, a)
        k += LANES
