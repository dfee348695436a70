"""Rounding that makes up for its own errors: GPTQ (arXiv:2210.17323) within blocks of inputs.

With H = mean(x x^T) over the inputs seen in calibration, (w - q) H (w - q)^T is the expected squared error of an output.
Weights are rounded one after the other, those of the largest inputs first; what is not rounded yet takes a share of each
error, such that the sum is least for what has been rounded. Scales are those of the search.

Only products of inputs in the same block are known, so that memory grows with the number of inputs, not its square.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hfopt.errors import InvalidInput
from hfopt.quantization.search import divide, reciprocal

# Inputs of a block at most: 2 KB of products for each input
BLOCK_INPUTS = 512
_COLUMNS = 32  # rounded one by one before the rest of a block is brought up to date
Tensor = torch.Tensor


def block_inputs(in_features: int) -> int:
    """Inputs of a block: the largest divisor of their number that is no more than `BLOCK_INPUTS`."""
    return max(n for n in range(1, min(in_features, BLOCK_INPUTS) + 1) if in_features % n == 0)


def damping(block: int, n_tokens: int) -> float:
    """Share of its mean that is added to the diagonal of H: GPTQ's 1 %, and more where few tokens were seen.

    The second part is what was best on the embedded model for 64 to 4,096 tokens.
    """
    return 0.01 + block / (3 * n_tokens)


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Inputs of a linear layer, as far as packing depends on them.

    mean_squares: float32 [in]. order: int64 [n_blocks, block], the inputs of each block in the order in which their weights
    are rounded. factor: float32 [n_blocks, block, block], in that order the upper Cholesky factor of the inverse of H.
    """

    mean_squares: Tensor
    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, products: Tensor, n_tokens: int) -> "InputStatistics":
        """From sums of x x^T over tokens, [n_blocks, block, block]; NaN and Inf raise InvalidInput."""
        if not products.isfinite().all():
            raise InvalidInput("inputs must be finite")
        n_blocks, block, _ = products.shape
        squares = products.diagonal(dim1=1, dim2=2) / n_tokens
        order = squares.argsort(dim=1, descending=True, stable=True)
        factor = torch.empty_like(products)
        for index, inputs in enumerate(order):
            matrix = products[index, inputs][:, inputs].double()
            level = matrix.diagonal().mean()
            matrix.div_(torch.where(level > 0, level, 1)).diagonal().add_(damping(block, n_tokens))
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
            factor[index] = torch.linalg.cholesky(inverse, upper=True)
        first = torch.arange(0, n_blocks * block, block)
        return cls(squares.reshape(-1), order + first[:, None], factor)


def compensate(
    groups: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nearest: Callable[[Tensor, Tensor], Tensor],
    inputs: InputStatistics,
) -> Tensor:
    """What to round in place of the weights [rows, n_groups, group]; arguments as in `search.search`."""
    rows, n_groups, group = groups.shape
    n_blocks, block = inputs.order.shape
    # a column of weights for all rows, and its scale, are contiguous
    weights = groups.view(rows, -1).T.index_select(0, inputs.order.view(-1)).view(n_blocks, block, rows)
    scales, group_of = scale[:, :, 0].T.contiguous(), inputs.order // group
    reciprocals = reciprocal(scales)
    zeros = None if zero is None else zero[:, :, 0].T.contiguous()
    factor: Any = inputs.factor
    for first in range(0, block, _COLUMNS):
        last = min(first + _COLUMNS, block)
        errors = torch.empty(n_blocks, last - first, rows)
        for column in range(first, last):
            before = column - first
            if before:
                shares = factor[:, None, first:column, column]
                weights[:, column, None].baddbmm_(shares, errors[:, :before], alpha=-1)
            own, places = weights[:, column], group_of[:, column]
            zero_points = None if zeros is None else zeros[places]
            quotients = divide(own, reciprocals[places], zero_points, out=torch.empty(n_blocks, rows))
            values = nearest(quotients, torch.empty_like(quotients))
            if zero_points is not None:
                values.sub_(zero_points)
            error = torch.sub(own, values.mul_(scales[places]), out=errors[:, before])
            error.div_(factor[:, column, column, None])
        if last < block:
            weights[:, last:].baddbmm_(factor[:, first:last, last:].mT, errors, alpha=-1)
    result = torch.empty(n_groups * group, rows)
    result[inputs.order.view(-1)] = weights.view(-1, rows)
    return result.T.contiguous().view(groups.shape)
