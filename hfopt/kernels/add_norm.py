"""A norm over the sum of two arrays, which is rounded first, as the models of transformers do it."""

import numpy as np

from hfopt.kernels.elementwise import add_row
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.norm import PARALLEL_SIZE, Vectors, affine_row, inverse_rms, layer_norm_row, rms_norm_row
from hfopt.kernels.simd.constants import ZERO
from hfopt.kernels.simd.pointer import address_as, pointer, shifted
from hfopt.kernels.simd.vector import splat


@body
def _row(row, is_layer, x, x_step, residual, residual_step, total, total_step, size, vectors, out):
    weight, bias, offset, eps = vectors.weight, vectors.bias, vectors.offset, vectors.eps
    x, out = shifted(x, row * x_step), shifted(out, row * size)
    if residual != 0:
        other, total = shifted(address_as(residual, x), row * residual_step), shifted(total, row * total_step)
        add_row(x, other, size, total)
        x = total
    if is_layer:
        layer_norm_row(x, weight, bias, offset, eps, size, out)
    elif bias != 0:
        affine_row(x, splat(ZERO), inverse_rms(x, splat(ZERO), eps, size), weight, bias, offset, size, out)
    else:
        rms_norm_row(x, weight, offset, eps, size, out)


@launch
def add_norm(
    like,
    is_layer,
    x,
    x_step,
    residual,
    residual_step,
    total,
    total_step,
    n_rows,
    size,
    weight,
    bias,
    eps,
    out,
):
    """total = x + residual, rounded; out = weight * total / sqrt(mean(total^2) + eps) + bias; total - mean(total) in place
    of total if `is_layer`. Without a residual (0), total is x, and nothing is written to it.

    Addresses of arrays of the type of `like`: x, residual, total, rows of `size` elements, steps from one to the next;
    out [n_rows, size]; weight, bias [size], or 0. total may be residual or out.
    """
    vectors = Vectors(weight, bias, np.float32(0), np.float32(eps))
    arguments = (
        *(is_layer, address_as(x, pointer(like)), x_step, residual, residual_step),
        *(address_as(total, pointer(like)), total_step, size, vectors, address_as(out, pointer(like))),
    )
    parallel_for(_row, threads_for(n_rows, n_rows * size, PARALLEL_SIZE), n_rows, arguments)
