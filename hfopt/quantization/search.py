"""Scales better than the nearest: of a few candidates for each group, the one with the smallest squared error.

    error(scale, zero) = sum over k of importance[k] * (w[k] - scale * u[k])²,  u = nearest value to w / scale

The best candidate is refined once by least squares, scale = sum(importance w u) / sum(importance u²), and the
result kept where it is better still. With importance = the mean square of the inputs seen in calibration, the sum is
the expected squared error of an output, as far as inputs are independent (GPTQ, arXiv:2210.17323, section 3, with a
diagonal Hessian; the search is that of llama.cpp's `make_qx_quants`).
"""

from collections.abc import Callable, Iterable

import torch

SMALLEST = 2.0**-80  # of a scale, where the largest weight of a row is between 1 and 2
Candidate = tuple[torch.Tensor, torch.Tensor | None]
# nearest(quotients, out): the representable values next to w / scale + zero
Nearest = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where the scale is 0: a group of zeros."""
    return torch.where(scale == 0, scale, 1 / scale)


def divide(
    groups: torch.Tensor, reciprocal_scale: torch.Tensor, zero: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """w / scale + zero."""
    torch.mul(groups, reciprocal_scale, out=out)
    return (
        out if zero is None else out.add_(zero)
    )  # addcmul is slower than both: it does not vectorise a broadcast


def search(
    groups: torch.Tensor,
    candidates: Iterable[Candidate],
    nearest: Nearest,
    importance: torch.Tensor | None,
) -> Candidate:
    """Scales [rows, n_groups, 1] and zero points (the same, or None) for weights [rows, n_groups, group] in (-2, 2).

    importance: [n_groups, group], or None for equal ones. Candidates must not be 0, for groups of zeros either.
    """
    quotients, values = torch.empty_like(groups), torch.empty_like(groups)
    root = None if importance is None else importance.sqrt()

    def evaluate(scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """The error; leaves in `values` what the weights become, in units of the scale, plus the zero point."""
        divide(groups, scale.reciprocal(), zero, out=quotients)
        nearest(quotients, values)
        quotients.sub_(values)
        if root is not None:
            quotients.mul_(root)
        return torch.linalg.vector_norm(quotients, dim=-1, keepdim=True).mul_(scale).square_()

    (best_scale, best_zero), *others = candidates
    error = evaluate(best_scale, best_zero)

    def keep(scale: torch.Tensor, zero: torch.Tensor | None) -> None:
        nonlocal error, best_scale, best_zero
        found = evaluate(scale, zero)
        better = found < error
        error = torch.where(better, found, error)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)

    for scale, zero in others:
        keep(scale, zero)
    evaluate(best_scale, best_zero)
    if best_zero is not None:
        values.sub_(best_zero)
    weighted = values if importance is None else values * importance
    product = torch.mul(weighted, groups, out=quotients).sum(-1, keepdim=True)
    size = torch.mul(weighted, values, out=quotients).sum(-1, keepdim=True)
    refined = product / size
    sound = (refined.abs() > SMALLEST) & (
        refined.abs() < 4
    )  # not so where all values, or their importance, are 0
    keep(torch.where(sound, refined, best_scale), best_zero)
    return best_scale, best_zero
