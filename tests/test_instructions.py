"""Single instructions, as programs of one row over memory of the test's own."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hfopt import functional
from hfopt.functional import Norm
from hfopt.functional.checks import prepare_threads
from hfopt.kernels import step as kernels
from hfopt.kernels.instruction import LOGITS, NONE, Instruction
from tests.reference import DTYPES, Guarded, like

SLOT = 256  # bytes a token of each of the slots in an arena
N_ROWS, N_NEW = 3, 2


def run(
    instruction: Instruction,
    slots: list[Tensor],
    logits: Tensor | None = None,
    scalar: float = 0.0,
    **columns: int,
) -> None:
    """The instruction over slots 0, SLOT ..., tensors [N_ROWS N_NEW, size], which become what it makes of them."""
    dtype = (logits if logits is not None else slots[0]).dtype
    n_tokens = N_ROWS * N_NEW
    arena = Guarded(torch.uint8, len(slots) * SLOT * n_tokens)
    first = [place * SLOT * n_tokens for place in range(len(slots))]
    parts = [arena.tensor[at : at + x.numel() * x.itemsize] for at, x in zip(first, slots, strict=True)]
    for part, x in zip(parts, slots, strict=True):
        part.copy_(x.view(torch.uint8).flatten())
    code = kernels.row_of(instruction, **columns)[None]
    empty, none = np.empty((0, 0), np.uint8), np.empty((0, N_ROWS), np.int64)
    prepare_threads()
    outcome = kernels.run_step(
        *(like(dtype), like(dtype), code, None, np.array([scalar]), N_ROWS, N_NEW, 1),
        *(arena.array.ctypes.data, 0, 1, np.zeros((0, 2), np.int64), np.zeros((2, n_tokens), np.int64)),
        *(np.zeros((0, 10), np.int64), N_NEW, 0, False, np.zeros(N_ROWS, np.int32)),
        *(np.zeros((N_ROWS, 0), np.int32), 0, empty),
        *(
            0 if logits is None else logits.data_ptr(),
            0,
            none,
            np.zeros(N_ROWS, np.bool_),
            0,
            np.empty(0, np.int64),
            np.zeros(4, np.int64),
            None,
        ),
    )
    assert outcome == 1
    arena.check()
    for part, x in zip(parts, slots, strict=True):
        x.view(torch.uint8).copy_(part.view(x.view(torch.uint8).shape))


def tokens(dtype: torch.dtype, size: int) -> Tensor:
    return torch.randn(N_ROWS * N_NEW, size).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (1, 15, 33, 64))
def test_scale(dtype: torch.dtype, size: int) -> None:
    x, out, residual = (tokens(dtype, size) for _ in range(3))
    expected = functional.scale(x, 0.3), functional.scale(x, 0.3, divide=True, residual=residual)
    kept = x.clone()
    run(kernels.SCALE, [x, out], scalar=0.3, IN=0, OUT=SLOT, SIZE=size, divide=0, residual=NONE)
    assert torch.equal(out, expected[0]) and torch.equal(x, kept)
    operands = [x, residual]
    run(kernels.SCALE, operands, scalar=0.3, IN=0, OUT=0, SIZE=size, divide=1, residual=SLOT)
    assert torch.equal(x, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_of_logits(dtype: torch.dtype) -> None:
    """One token a row."""
    guarded = Guarded(dtype, N_ROWS, 1003)
    guarded.tensor.copy_(torch.randn(N_ROWS, 1003))
    expected = functional.scale(guarded.tensor, 8.0, divide=True)
    columns: dict[str, Any] = {
        "IN": LOGITS,
        "OUT": LOGITS,
        "SIZE": 1003,
        "PER_ROW": 1,
        "divide": 1,
        "residual": NONE,
    }
    run(kernels.SCALE, [], guarded.tensor, 8.0, **columns)
    assert torch.equal(guarded.tensor, expected)
    guarded.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (1, 5, 16, 24, 31, 32, 33, 47, 60))
def test_norms(dtype: torch.dtype, size: int) -> None:
    """In a program they have the bits of the kernels alone, whatever is left behind whole vectors."""
    x, weight, bias = tokens(dtype, size), torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    places: dict[str, Any] = {"scalar": 1e-5, "IN": 0, "OUT": SLOT, "SIZE": size, "weight": weight.data_ptr()}
    out = tokens(dtype, size)
    for offset in (0, 1):
        run(kernels.RMS_NORM, [x, out], **places, bias=0, offset=offset)
        assert torch.equal(out, functional.norm(x, Norm("rms", weight, None, 1e-5, bool(offset))))
        for each in (bias, None):
            address = 0 if each is None else each.data_ptr()
            run(kernels.LAYER_NORM, [x, out], **places, bias=address, offset=offset)
            assert torch.equal(out, functional.norm(x, Norm("layer", weight, each, 1e-5, bool(offset))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (1, 7, 12))
def test_norm_of_heads(dtype: torch.dtype, size: int) -> None:
    qkv, weight = tokens(dtype, 5 * size), torch.randn(size).to(dtype)
    expected = qkv.clone()
    functional.norm_heads(expected, Norm("layer", weight, None, 1e-6, unit_offset=True), size, 3, size)
    columns: dict[str, Any] = {"weight": weight.data_ptr(), "bias": 0, "offset": 1, "step": 0, "is_layer": 1}
    columns |= {"width": 5 * size, "first": size, "n_heads": 3}
    run(kernels.HEAD_NORM, [qkv], scalar=1e-6, IN=0, OUT=0, SIZE=size, **columns)
    assert torch.equal(qkv, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("smooth", "operation"), ((0, functional.clamp), (1, functional.softcap)))
def test_limit(dtype: torch.dtype, smooth: int, operation: Callable[..., Tensor]) -> None:
    x, out = tokens(dtype, 41), tokens(dtype, 41)
    run(kernels.LIMIT, [x, out], scalar=0.7, IN=0, OUT=SLOT, SIZE=41, smooth=smooth)
    assert torch.equal(out, operation(x, 0.7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_row", (0, 1))
def test_multiply(dtype: torch.dtype, per_row: int) -> None:
    x, out = tokens(dtype, 41), tokens(dtype, 41)
    expected, n = out.clone(), N_ROWS if per_row else N_ROWS * N_NEW
    expected[:n] *= x[:n]
    run(kernels.MULTIPLY, [x, out], IN=0, OUT=SLOT, SIZE=41, PER_ROW=per_row, width=41, first=0)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiply_by_some_of_the_values(dtype: torch.dtype) -> None:
    x, out = tokens(dtype, 41), tokens(dtype, 20)
    expected = out * x[:, 7:27]
    run(kernels.MULTIPLY, [x, out], IN=0, OUT=SLOT, SIZE=20, width=41, first=7)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_permute(dtype: torch.dtype) -> None:
    x, out, order = tokens(dtype, 41), tokens(dtype, 41), torch.randperm(41)
    run(kernels.PERMUTE, [x, out], IN=0, OUT=SLOT, SIZE=41, order=order.data_ptr())
    assert torch.equal(out, x[:, order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_take_last(dtype: torch.dtype) -> None:
    x = tokens(dtype, 41)
    expected = x[N_NEW - 1 :: N_NEW].clone()
    run(kernels.TAKE_LAST, [x], IN=0, OUT=0, SIZE=41 * dtype.itemsize)
    assert torch.equal(x[:N_ROWS], expected)
