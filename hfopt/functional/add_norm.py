"""A residual connection and the norm behind it in one kernel, each of its inputs read once."""

import torch
from torch import Tensor

from hfopt.kernels import add_norm as kernels

from .checks import ELEMENTS, prepare_threads
from .gradients import without_gradients
from .scalars import finite, flag
from .strided import Output, dense, read_rows


@without_gradients
def add_rms_norm(
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add_back: bool = False,
) -> Tensor:
    """Compute `weight * h / sqrt(mean(h^2) + eps) + bias` for `h = x + residual` (RMSNorm, https://arxiv.org/abs/1910.07467).

    The sum is rounded to its dtype before the norm sees it, as in the models of transformers; the norm is float32, rounded
    once. It carries no gradient.

    Args:
        residual: of the shape and dtype of x; or None, and h is x.
        x: [..., size], float32, bfloat16 or float16, of any strides.
        weight: [size] of that dtype, or None.
        bias: the same; most models have none.
        eps: what is added to the mean, from 0 on.
        add_back: write the sum to `residual`, in place. Without one, nothing.

    Returns:
        A new tensor of the shape of x.

    Raises:
        InvalidInput: for any other dtype, shape, layout or device, and a residual to write to that is expanded.

    >>> import torch
    >>> from hfopt.functional import add_rms_norm
    >>> residual, x = torch.zeros(2, 5, 64), torch.ones(2, 5, 64)
    >>> add_rms_norm(residual, x, torch.ones(64), None, 1e-6, add_back=True).shape
    torch.Size([2, 5, 64])
    >>> residual.unique()
    tensor([1.])
    """
    return _add_norm(False, residual, x, weight, bias, eps, add_back)


@without_gradients
def add_layer_norm(
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add_back: bool = False,
) -> Tensor:
    """Compute `weight * (h - mean(h)) / sqrt(var(h) + eps) + bias` for `h = x + residual`.

    A layer norm (https://arxiv.org/abs/1607.06450); arguments, rounding and errors are those of `add_rms_norm`.

    >>> import torch
    >>> from hfopt.functional import add_layer_norm
    >>> x, weight, bias = torch.randn(2, 5, 64), torch.ones(64), torch.zeros(64)
    >>> torch.allclose(
    ...     add_layer_norm(None, x, weight, bias, 1e-5),
    ...     torch.nn.functional.layer_norm(x, (64,), weight, bias, 1e-5),
    ...     atol=1e-5,
    ... )
    True
    """
    return _add_norm(True, residual, x, weight, bias, eps, add_back)


def _add_norm(
    is_layer: bool,
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add_back: bool,
) -> Tensor:
    rows, rows_at, step = read_rows("x", x)
    given, dtype = x.shape, x.dtype
    size = given[-1]
    weight_at = bias_at = 0
    if weight is not None:
        weight, weight_at = dense("weight", weight, dtype, (size,))
    if bias is not None:
        bias, bias_at = dense("bias", bias, dtype, (size,))
    eps, add_back = finite("eps", eps, 0), flag("add_back", add_back)
    out = torch.empty_like(rows) if rows is x else torch.empty_like(x, memory_format=torch.contiguous_format)
    out_at = out.data_ptr()
    total_at, total_step, other_at, other_step = out_at, size, 0, 0
    output = _copy = None
    if residual is not None:
        if add_back:
            output = Output("residual", residual, given, dtype, x, weight, bias)
            total_at, total_step = other_at, other_step = output.address, output.step
        else:
            _copy, other_at, other_step = read_rows("residual", residual, dtype, shape=given)
    n = out.numel()
    if n:
        prepare_threads()
        kernels.add_norm(
            ELEMENTS[dtype],
            is_layer,
            rows_at,
            step,
            other_at,
            other_step,
            total_at,
            total_step,
            n // size,
            size,
            weight_at,
            bias_at,
            eps,
            out_at,
        )
    if output is not None:
        output.finish()
    return out
