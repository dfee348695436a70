"""Gated products: one array, activated, times another, each of them read once."""

import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import gated as kernels

from .activation import CODES
from .checks import ELEMENTS, prepare_threads
from .gradients import without_gradients
from .strided import Output, read_rows

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


@without_gradients
def silu_mul(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute `silu(x) * y`, where `silu(x) = x / (1 + e^-x)` (SwiGLU, https://arxiv.org/abs/2002.05202).

    In float32, rounded once. It carries no gradient.

    Args:
        x: [..., size], float32, bfloat16 or float16, of any strides.
        y: of the same shape and dtype.
        out: a tensor of that shape and dtype to write to, which may be x or y; None makes a new one.

    Returns:
        out.

    Raises:
        InvalidInput: for any other dtype, shape, layout or device, and an out that is expanded.

    >>> import torch
    >>> from hfopt.functional import silu_mul
    >>> gate, up = torch.randn(2, 3, 128).chunk(2, dim=-1)
    >>> silu_mul(gate, up).shape
    torch.Size([2, 3, 64])
    """
    return activated_product("silu", x, y, out)


@without_gradients
def gelu_mul(x: Tensor, y: Tensor, out: Tensor | None = None, approximate: str = "none") -> Tensor:
    """Compute `gelu(x) * y` (GEGLU, https://arxiv.org/abs/2002.05202), where `gelu(x) = x (1 + erf(x / sqrt(2))) / 2`.

    With `approximate="tanh"`: `gelu(x) = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`. In float32, rounded once. It
    carries no gradient.

    Args:
        x: [..., size], float32, bfloat16 or float16, of any strides.
        y: of the same shape and dtype.
        out: a tensor of that shape and dtype to write to, which may be x or y; None makes a new one.
        approximate: "none" or "tanh", as in `torch.nn.functional.gelu`.

    Returns:
        out.

    Raises:
        InvalidInput: for any other dtype, shape, layout, device or name, and an out that is expanded.

    >>> import torch
    >>> from hfopt.functional import gelu_mul
    >>> x, y = torch.randn(2, 4, 64)
    >>> gelu_mul(x, y, out=x, approximate="tanh") is x
    True
    """
    if not isinstance(approximate, str) or approximate not in _GELU:
        raise InvalidInput(f"approximate is {approximate!r}: 'none' or 'tanh' is allowed")
    return activated_product(_GELU[approximate], x, y, out)


def activated_product(activation: str | None, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """`activation(x) * y` for None or a key of `ACTIVATIONS`; see `silu_mul`."""
    rows, rows_at, step = read_rows("x", x)
    given, dtype = x.shape, x.dtype
    _others, others_at, other_step = read_rows("y", y, dtype, shape=given)
    output = None
    size, n = given[-1], x.numel()
    if out is None:
        out = (
            torch.empty_like(rows)
            if rows is x
            else torch.empty_like(x, memory_format=torch.contiguous_format)
        )
        target_at, target_step = out.data_ptr(), size
    else:
        output = Output("out", out, given, dtype, x, y)
        target_at, target_step = output.address, output.step
    if n:
        if step == other_step == target_step == size:
            size = n
        prepare_threads()
        kernels.gated_product(
            ELEMENTS[dtype],
            CODES[activation],
            rows_at,
            step,
            others_at,
            other_step,
            target_at,
            target_step,
            n // size,
            size,
        )
    if output is not None:
        output.finish()
    return out
