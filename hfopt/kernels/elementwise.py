"""Arithmetic on each value by itself."""

from hfopt.kernels.instruction import Instruction
from hfopt.kernels.jit.parallel import body, inlined
from hfopt.kernels.simd.pointer import address_as, load_part, store_part
from hfopt.kernels.simd.types import LANES


@body
def _multiply(x, count, out):
    """out *= x, rounded."""
    k = 0
    while k < count:
        n = min(count - k, LANES)
        store_part(out, k, n, load_part(out, k, n) * load_part(x, k, n))
        k += LANES


@inlined
def _run_multiply(like, held, operands, step):
    _multiply(address_as(operands.x, like), operands.n * operands.size, address_as(operands.out, like))


# OUT *= IN
MULTIPLY = Instruction("multiply", (), _run_multiply)
