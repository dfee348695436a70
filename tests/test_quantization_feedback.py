"""Rounding errors that make up for each other, against GPTQ as its paper writes it, in float64."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hfopt.errors import InvalidInput
from hfopt.quantization import NF4, Format, InputStatistics, Int4, Int8, block_inputs
from hfopt.quantization import format as format_module
from hfopt.quantization.feedback import compensate, damping
from hfopt.quantization.layout import blocks_to_groups

Array = NDArray[np.float64]
FORMATS: list[Format] = [
    Int8(),
    Int8(group=32, symmetric=False),
    Int4(group=64),
    Int4(group=32, symmetric=False),
    Int4(group=None),
    NF4(group=32),
]
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)


def correlated(n_inputs: int, n_tokens: int = 500) -> torch.Tensor:
    """Inputs [tokens, in] that depend on each other, of sizes between 1/10 and 10."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(n_tokens, 12, generator=generator) @ torch.randn(12, n_inputs, generator=generator)
    x = mixed + torch.randn(n_tokens, n_inputs, generator=generator)
    return x * 10 ** torch.linspace(-1, 1, n_inputs)[torch.randperm(n_inputs, generator=generator)]


def statistics(x: torch.Tensor, n_blocks: int = 1) -> InputStatistics:
    blocks = x.view(len(x), n_blocks, -1).transpose(0, 1)
    return InputStatistics.of(blocks.mT @ blocks, len(x))


def gptq(weight: Array, x: Array, n_blocks: int, scale: Array, zero: Array | None, levels: Array) -> Array:
    """What is rounded: after each weight, the inverse of H is updated and its error shared out (GPTQ, equations 2, 3).

    scale, zero: [out, in]. levels: the values of codes without their zero point.
    """
    weight, found = weight.copy(), np.empty_like(weight)
    size = weight.shape[1] // n_blocks
    for first in range(0, weight.shape[1], size):
        part = x[:, first : first + size]
        matrix = part.T @ part / len(x)
        order = list(np.argsort(-np.diag(matrix), kind="stable"))
        inverse = np.linalg.inv(matrix + damping(size, len(x)) * np.diag(matrix).mean() * np.eye(size))
        while order:
            k = order.pop(0)
            column = weight[:, first + k]
            found[:, first + k] = column
            points = 0 if zero is None else zero[:, first + k]
            quotients = column / scale[:, first + k] + points
            value = (levels[np.abs(quotients[:, None] - levels).argmin(1)] - points) * scale[:, first + k]
            weight[:, first : first + size] -= np.outer((column - value) / inverse[k, k], inverse[k])
            inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return found


@every_format
@pytest.mark.parametrize("n_blocks", [1, 2])
def test_weights_are_those_of_gptq(format: Format, n_blocks: int) -> None:
    n_inputs = 128
    weight, x = torch.randn(40, n_inputs), correlated(n_inputs)
    packed = format.pack(weight)
    scale = packed.row_scales.view(-1, 1)[:40]
    if packed.scales is not None:
        scale = scale * blocks_to_groups(packed.scales)[:40].float()
    zero = None if packed.zeros is None else blocks_to_groups(packed.zeros)[:40].float()
    groups = weight.view(40, -1, format.group or n_inputs)
    found = compensate(
        groups,
        scale[:, :, None],
        None if zero is None else zero[:, :, None],
        format.nearest,
        statistics(x, n_blocks),
    )
    codes = torch.arange(0 if format.bits == 4 or format.has_zeros else 1, 1 << format.bits)
    values = format.decode(codes.to(torch.uint8), torch.zeros(1) if format.has_zeros else None)
    expand = n_inputs // groups.shape[1]
    expected = gptq(
        weight.double().numpy(),
        x.double().numpy(),
        n_blocks,
        scale.double().numpy().repeat(expand, 1),
        None if zero is None else zero.double().numpy().repeat(expand, 1),
        values.double().numpy(),
    )
    # where a weight lies in the middle of two values, float32 may take the other one, and all later ones differ
    close = np.isclose(found.view(40, -1).numpy(), expected, rtol=1e-3, atol=1e-4).all(1)
    assert close.mean() > 0.9
    assert not np.allclose(expected, weight.numpy(), atol=1e-3)


@every_format
@pytest.mark.parametrize("n_inputs", [96, 1024])
def test_errors_of_outputs_are_smaller(
    format: Format, n_inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    format = Int4(group=32) if format == Int4(group=64) else format
    weight, x = torch.randn(50, n_inputs), correlated(n_inputs, 2000)
    n_blocks = n_inputs // block_inputs(n_inputs)

    def error(seen: InputStatistics | None) -> float:
        return float(((format.unpack(format.pack(weight, seen)) - weight) @ x.T).square().mean())

    independent = InputStatistics.of(x.square().sum(0)[:, None, None], len(x))
    assert error(independent) < error(None)
    once = error(statistics(x, n_blocks))
    assert once < 0.5 * error(independent)
    # sums of other sizes round at other places
    monkeypatch.setattr(format_module, "FEEDBACK_SLICE", 17 * n_inputs)
    assert error(statistics(x, n_blocks)) == pytest.approx(once, rel=0.05)


def test_the_factor_is_that_of_the_inverse() -> None:
    x = correlated(12)
    seen = statistics(x, 2)
    for block in range(2):
        part = x[:, seen.order[block]].double().numpy()
        matrix = part.T @ part / len(x)
        assert (np.diff(np.diag(matrix)) <= 0).all()
        matrix = matrix / np.diag(matrix).mean() + damping(6, len(x)) * np.eye(6)
        factor = seen.factor[block].double().numpy()
        np.testing.assert_allclose(factor.T @ factor @ matrix, np.eye(6), atol=1e-4)
        assert not np.tril(factor, -1).any()
    assert sorted(seen.order.view(-1).tolist()) == list(range(12))
    torch.testing.assert_close(seen.mean_squares, x.square().mean(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_products_that_are_not_finite_are_refused(value: float) -> None:
    products = torch.eye(4)[None].repeat(3, 1, 1)
    products[1, 2, 3] = value
    with pytest.raises(InvalidInput, match="finite"):
        InputStatistics.of(products, 7)


@pytest.mark.parametrize(
    ("n_inputs", "expected"), [(1, 1), (384, 384), (512, 512), (513, 171), (521, 1), (768, 384), (8192, 512)]
)
def test_blocks_are_as_large_as_they_may_be(n_inputs: int, expected: int) -> None:
    assert block_inputs(n_inputs) == expected
