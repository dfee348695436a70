"""xIELU, an activation whose numbers are trained."""

from typing import NamedTuple

import torch
from torch import Tensor

from hfopt.kernels import xielu as kernels

from .checks import ELEMENTS, check_array, check_rows, prepare_threads


class Xielu(NamedTuple):
    """softplus(alpha_p) x^2 + beta x where x > 0; elsewhere (e^min(x, eps) - 1 - x) (beta + softplus(alpha_n)) + beta x
    (https://arxiv.org/abs/2411.13010). Tensors of one number each, of one dtype.
    """

    alpha_p: Tensor
    alpha_n: Tensor
    beta: Tensor
    eps: Tensor

    def addresses(self, dtype: torch.dtype) -> dict[str, int]:
        """Those of its numbers; raises `InvalidInput` unless they are of this dtype."""
        return {
            name: check_array(name, each.reshape(-1), (1,), dtype) for name, each in self._asdict().items()
        }


def xielu(x: Tensor, numbers: Xielu) -> Tensor:
    """The activation of x [..., size], the last dimension contiguous, of the dtype of its numbers. Raises `InvalidInput`."""
    x, address = check_rows("x", x)
    addresses = numbers.addresses(x.dtype)
    out = torch.empty_like(x)
    if out.numel():
        prepare_threads()
        kernels.xielu(ELEMENTS[x.dtype], address, out.numel(), *addresses.values(), out.data_ptr())
    return out
