"""What adapters add to linear layers, against float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hfopt import functional
from hfopt.errors import InvalidInput
from hfopt.functional import ACTIVATIONS, Delta, add_deltas, check_deltas, pieces_of
from tests.pairs import pairs_of
from tests.reference import DTYPES


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {}
    torch.testing.assert_close(found, expected.to(dtype), **tolerance)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "is_wide", "rank", "n_inputs", "n_tokens"),
    pairs_of(DTYPES, [False, True], [1, 3, 16, 300], [40, 96], [1, 5]),
)
def test_rows_of_several_adapters(
    dtype: torch.dtype, is_wide: bool, rank: int, n_inputs: int, n_tokens: int
) -> None:
    """Two matrices side by side; rows have one adapter, none, two, or one around the second matrix alone."""
    sizes, kind = [37, 16], torch.float32 if is_wide else dtype
    matrices = [
        [
            (torch.randn(each, n_inputs).to(kind) / n_inputs**0.5, torch.randn(n, each).to(kind) / each**0.5)
            for n in sizes
        ]
        for each in (rank, 7)
    ]
    scalings = 0.5, -2.0
    which = [[0], [], [0, 1], [1]]
    deltas = [
        [Delta.of(a, b, scalings[adapter], dtype, part) for part, (a, b) in enumerate(matrices[adapter])]
        for adapter in (0, 1)
    ]
    rows = [[each for adapter in row for each in deltas[adapter]] for row in which]
    rows[3] = rows[3][1:]
    x = torch.randn(len(rows), n_tokens, n_inputs).to(dtype)
    out, residual = (torch.randn(len(rows), n_tokens, sum(sizes)).to(dtype) for _ in range(2))
    expected = out.double() + residual.double()
    for row, adapters in enumerate(which):
        for adapter in adapters:
            for part, (a, b) in enumerate(matrices[adapter]):
                if (row, part) != (3, 0):
                    first = sum(sizes[:part])
                    added = scalings[adapter] * (x[row].double() @ a.double().T) @ b.double().T
                    expected[row, :, first : first + sizes[part]] += added
    add_deltas(x, out, rows, pieces_of(sizes), [residual])
    close(out, expected, dtype)


def test_rows_of_one_matrix_in_another_order() -> None:
    a, b = torch.randn(4, 24), torch.randn(48, 4)
    pieces = ((32, 16), (0, 20))
    x, out = torch.randn(2, 1, 24), torch.zeros(2, 1, 36)
    add_deltas(x, out, [[Delta.of(a, b, 1.0, torch.float32)]] * 2, pieces_of([16, 20], pieces))
    whole = x.double() @ a.double().T @ b.double().T
    close(out, torch.cat([whole[..., 32:], whole[..., :20]], -1), torch.float32)


def test_rows_do_not_depend_on_each_other() -> None:
    """The bits of a row are the same alone, beside others and on several threads."""
    a, b = torch.randn(16, 512), torch.randn(700, 16)
    delta = [Delta.of(a, b, 0.7, torch.float32)]
    x, y = torch.randn(9, 3, 512), torch.randn(9, 3, 700)
    whole = y.clone()
    add_deltas(x, whole, [delta] * 9, pieces_of([700]))
    torch.set_num_threads(1)
    for row in range(9):
        one = y[row : row + 1].clone()
        add_deltas(x[row : row + 1].contiguous(), one, [delta], pieces_of([700]))
        assert torch.equal(one[0], whole[row])


@pytest.mark.parametrize(
    ("dtype", "activation", "gated"), pairs_of(DTYPES, [None, *ACTIVATIONS], [False, True])
)
def test_activations(dtype: torch.dtype, activation: str | None, gated: bool) -> None:
    x = 3 * torch.randn(3, 2, 70).to(dtype)
    halves = x.double().chunk(2, -1) if gated else (x.double(), None)
    expected = halves[0] if activation is None else ACTIVATIONS[activation](halves[0])
    expected = expected if halves[1] is None else expected * halves[1]
    close(functional.activate(x, activation, gated=gated), expected, dtype)


def test_what_does_not_fit() -> None:
    a, b = torch.randn(4, 24), torch.randn(48, 4)
    wrong: list[tuple[Any, str]] = [
        (lambda: Delta.of(a, b.T, 1.0, torch.float32), "contiguous"),
        (lambda: Delta.of(a, torch.randn(48, 5), 1.0, torch.float32), r"\[outputs, 4\]"),
        (lambda: Delta.of(a[0], b, 1.0, torch.float32), "a matrix is needed"),
        (lambda: Delta.of(a.double(), b.double(), 1.0, torch.float32), "float64"),
        (lambda: Delta.of(a.bfloat16(), b.bfloat16(), 1.0, torch.float32), "a has dtype"),
        (lambda: Delta.of(a, b.bfloat16(), 1.0, torch.float32), "b has dtype"),
        (lambda: check_deltas([Delta.of(a, b, 1.0, torch.float32)], 24, [47]), "an adapter is"),
        (lambda: check_deltas([Delta.of(a, b, 1.0, torch.float32, 1)], 24, [48]), "an adapter is"),
        (lambda: add_deltas(torch.ones(3, 24), torch.ones(3, 48), [[], []], pieces_of([48])), "rows has 2"),
        (lambda: add_deltas(torch.ones(3, 24), torch.ones(2, 48), [[]], pieces_of([48])), "out has shape"),
        (lambda: functional.activate(torch.ones(3, 5), None, gated=True), "gated needs"),
        (lambda: functional.activate(torch.ones(3, 5), "swish"), "activation is 'swish'"),
    ]
    for call, words in wrong:
        with pytest.raises(InvalidInput, match=words):
            call()
    assert np.array_equal(pieces_of([3, 4]), [[0, 3, 0, 0], [3, 4, 1, 0]])
