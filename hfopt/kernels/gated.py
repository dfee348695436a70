"""Products of two arrays, one of them activated, and activations alone: in float32, rounded once to the element type."""

from typing import NamedTuple

from hfopt.kernels.instruction import Instruction, read_fields
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.linear.activation import activate
from hfopt.kernels.simd.memory import load, load_part, store, store_part
from hfopt.kernels.simd.pointer import address_as, pointer, shifted
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import product

_BLOCK = 1 << 12  # values that a thread multiplies at a time
_PARALLEL_SIZE = 1 << 15  # values; below, more threads cost more than they save


@body
def _block(index, code, x, x_step, y, y_step, out, out_step, size):
    n_blocks = (size + _BLOCK - 1) // _BLOCK
    row = index // n_blocks
    x, y, out = shifted(x, row * x_step), shifted(y, row * y_step), shifted(out, row * out_step)
    k = (index - row * n_blocks) * _BLOCK
    end = min(k + _BLOCK, size)
    while k + LANES <= end:
        store(out, k, product(activate(load(x, k), code), load(y, k)))
        k += LANES
    if k < end:
        n = end - k
        store_part(out, k, n, product(activate(load_part(x, k, n), code), load_part(y, k, n)))


@body
def _multiply(rows, out, out_step, n_rows, size):
    n_blocks = n_rows * ((size + _BLOCK - 1) // _BLOCK)
    arguments = (*rows, out, out_step, size)
    parallel_for(_block, threads_for(n_blocks, n_rows * size, _PARALLEL_SIZE), n_blocks, arguments)


@launch
def gated_product(like, code, x, x_step, y, y_step, out, out_step, n_rows, size):
    """out = activation(x) * y in n_rows rows of `size` values; the activation by its code (`linear.activation`).

    Addresses of arrays of the type of `like`; steps are elements from a row to the next. out may be x or y.
    """
    rows = (code, address_as(x, pointer(like)), x_step, address_as(y, pointer(like)), y_step)
    _multiply(rows, address_as(out, pointer(like)), out_step, n_rows, size)


# ---- activations alone ------------------------------------------------------------------------------------------------


@body
def _activate_block(index, code, x, count, out):
    for k in range(index * _BLOCK, min((index + 1) * _BLOCK, count), LANES):
        n = min(count - k, LANES)
        store_part(out, k, n, activate(load_part(x, k, n), code))


@body
def _activate(code, x, count, out):
    n_blocks = (count + _BLOCK - 1) // _BLOCK
    threads = threads_for(n_blocks, count, _PARALLEL_SIZE)
    parallel_for(_activate_block, threads, n_blocks, (code, x, count, out))


@launch
def activated(like, code, x, count, out):
    """out = activation(x), in place too; addresses of arrays [count] of the type of `like`."""
    _activate(code, address_as(x, pointer(like)), count, address_as(out, pointer(like)))


class _Activated(NamedTuple):
    code: int
    gated: int


@body
def _run(like, held, operands, step):
    own, n, size = read_fields(operands.own, _Activated), operands.n, operands.size
    x, out = address_as(operands.x, like), address_as(operands.out, like)
    if own.gated != 0:
        _multiply((own.code, x, 2 * size, shifted(x, size), 2 * size), out, size, n, size)
    else:
        _activate(own.code, x, n * size, out)


# OUT, SIZE values a token, = activation(IN), which may be the same; or of its first half, times the second
ACTIVATE = Instruction("activation", _Activated._fields, _run)
