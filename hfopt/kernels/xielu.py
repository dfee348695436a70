"""xIELU (https://arxiv.org/abs/2411.13010), an activation whose numbers are trained."""

from typing import NamedTuple

import numpy as np

from hfopt.kernels.attention.tile import where_up_to
from hfopt.kernels.instruction import Instruction, read_fields
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.simd.constants import ONE, ZERO
from hfopt.kernels.simd.functions import exp
from hfopt.kernels.simd.memory import load_part, load_scalar, store_part
from hfopt.kernels.simd.pointer import address_as, pointer
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import fma, splat

_BLOCK = 1 << 12  # values that a thread takes at a time
_PARALLEL_SIZE = 1 << 15  # values; below, more threads cost more than they save
_LINEAR = 20.0  # from here on, softplus is its argument
_NEAR = np.float32(-0.5)  # above, e^x - 1 has a series
_SERIES = tuple(np.float32(1 / n) for n in (40320, 5040, 720, 120, 24, 6, 2))


@body
def _softplus(x):
    return x if x > _LINEAR else np.log(1.0 + np.exp(x))


@body
def _below_one(x):
    """e^x - 1 where x <= 0."""
    series = splat(_SERIES[0])
    for k in range(1, len(_SERIES)):
        series = fma(series, x, splat(_SERIES[k]))
    near = fma(series * x, x, x)
    return where_up_to(x, splat(_NEAR), exp(x) - splat(ONE), near)


@body
def _block(index, x, count, positive, negative, beta, eps, out):
    """positive, negative: factors of the two branches."""
    for k in range(index * _BLOCK, min((index + 1) * _BLOCK, count), LANES):
        n = min(count - k, LANES)
        value = load_part(x, k, n)
        rest = value * splat(beta)
        bounded = where_up_to(value, splat(eps), value, splat(eps))
        below = fma(_below_one(bounded) - value, splat(negative), rest)
        above = fma(value * splat(positive), value, rest)
        store_part(out, k, n, where_up_to(value, splat(ZERO), below, above))


@body
def _xielu(x, count, alpha_p, alpha_n, beta, eps, out):
    """Pointers to x, out [count], and to each of the four numbers."""
    beta, eps = load_scalar(beta, 0), load_scalar(eps, 0)
    positive = np.float32(_softplus(np.float64(load_scalar(alpha_p, 0))))
    negative = np.float32(np.float64(beta) + _softplus(np.float64(load_scalar(alpha_n, 0))))
    n_blocks = (count + _BLOCK - 1) // _BLOCK
    arguments = x, count, positive, negative, beta, eps, out
    parallel_for(_block, threads_for(n_blocks, count, _PARALLEL_SIZE), n_blocks, arguments)


@launch
def xielu(like, x, count, alpha_p, alpha_n, beta, eps, out):
    """softplus(alpha_p) x^2 + beta x where x > 0; elsewhere (e^min(x, eps) - 1 - x) (beta + softplus(alpha_n)) + beta x.

    Addresses of arrays [count], and of the four numbers, of the type of `like`; out may be x.
    """
    like = pointer(like)
    numbers = (
        address_as(alpha_p, like),
        address_as(alpha_n, like),
        address_as(beta, like),
        address_as(eps, like),
    )
    _xielu(address_as(x, like), count, *numbers, address_as(out, like))


class _Xielu(NamedTuple):
    alpha_p: int  # addresses
    alpha_n: int
    beta: int
    eps: int


@body
def _run(like, held, operands, step):
    own = read_fields(operands.own, _Xielu)
    numbers = (
        address_as(own.alpha_p, like),
        address_as(own.alpha_n, like),
        address_as(own.beta, like),
        address_as(own.eps, like),
    )
    x, out = address_as(operands.x, like), address_as(operands.out, like)
    _xielu(x, operands.n * operands.size, *numbers, out)


# IN and OUT may be the same
XIELU = Instruction("xielu", _Xielu._fields, _run)
