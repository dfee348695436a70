"""Quantised matrices packed by plain numpy, and the arithmetic of the kernels in float64."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hfopt.functional.activation import ACTIVATIONS
from hfopt.functional.quantized import QuantizedWeights
from hfopt.quantization import QuantizedMatrix

NF4 = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Format:
    """Bits of a code, inputs with a scale in common (None: all), zero points of their own, levels."""

    bits: int
    group: int | None
    asymmetric: bool = False
    levels: tuple[int, ...] | None = None

    def __str__(self) -> str:
        kind = "levels" if self.levels else "asymmetric" if self.asymmetric else "symmetric"
        return f"{self.bits}-{self.group}-{kind}"


FORMATS = [
    *(Format(8, group, asymmetric) for group in (None, 32, 64, 128, 256) for asymmetric in (False, True)),
    *(Format(4, group, asymmetric) for group in (None, 32, 64, 128, 256) for asymmetric in (False, True)),
    *(Format(4, group, levels=NF4) for group in (32, 64, 128)),
]


def _tensor(values: NDArray) -> Tensor:
    """A copy that starts at a multiple of 64 bytes, which torch sees to."""
    source = torch.from_numpy(np.ascontiguousarray(values))
    return torch.empty_like(source).copy_(source)


def _blocks(values: NDArray, n_columns: int) -> Tensor:
    """[out, groups] as [blocks, groups, 16], filled up with zeros."""
    full = np.zeros((-(-n_columns // 16) * 16, values.shape[1]), values.dtype)
    full[:n_columns] = values
    return _tensor(full.reshape(-1, 16, values.shape[1]).transpose(0, 2, 1))


@dataclass(frozen=True, eq=False)
class Matrix:
    """Random codes and scales of one matrix [out, in]."""

    packed: QuantizedMatrix
    values: Array  # what they stand for, [out, in]

    @classmethod
    def random(cls, n_columns: int, size: int, form: Format, rng: np.random.Generator) -> "Matrix":
        per_unit, n_groups = 32 // form.bits, size // (form.group or size)
        codes = rng.integers(0, 1 << form.bits, (n_columns, size)).astype(np.uint8)
        scales = rng.uniform(0.2, 1.0, (n_columns, n_groups)).astype(np.float16)
        scales[:, 1::3] *= np.float16(-1)
        scales[:, 2::3] *= np.float16(1e-4)  # most are subnormal
        zeros = rng.integers(0, 1 << form.bits, (n_columns, n_groups)).astype(np.uint8)
        rows = rng.uniform(0.5, 2.0, n_columns).astype(np.float32) / size

        constant = 128 if form.bits == 8 else 8
        points = zeros if form.asymmetric else np.full_like(zeros, constant)
        per_input = np.arange(size) // (form.group or size)
        if form.levels:
            values = np.array(form.levels, np.float64)[codes]
        else:
            values = codes.astype(np.float64) - points[:, per_input]
        if form.group is not None:
            values = values * scales.astype(np.float64)[:, per_input]

        n_units = -(-size // per_unit)
        # what is behind the end must not matter
        full = rng.integers(0, 1 << form.bits, (-(-n_columns // 16) * 16, n_units * per_unit)).astype(
            np.uint8
        )
        full[:n_columns, :size] = codes
        units: NDArray = full.reshape(-1, 16, n_units, per_unit).transpose(0, 2, 1, 3)
        if form.bits == 4:
            units = units[..., :4] | units[..., 4:] << 4
        packed = QuantizedMatrix(
            out_features=n_columns,
            codes=_tensor(units.reshape(-1, n_units, 64)),
            row_scales=_blocks(rows[:, None], n_columns)[:, 0],
            scales=None if form.group is None else _blocks(scales, n_columns),
            zeros=_blocks(zeros, n_columns) if form.asymmetric else None,
        )
        return cls(packed, values * rows.astype(np.float64)[:, None])

    def rounded(self) -> "Matrix":
        """With weights that are bfloat16 before they are scaled by rows."""
        rows = self.packed.row_scales.double().flatten()[: len(self.values), None]
        values = (torch.from_numpy(self.values) / rows).float().bfloat16().double() * rows
        return Matrix(self.packed, values.numpy())


def weights_of(matrices: list[Matrix], biases: list[Tensor | None], form: Format) -> QuantizedWeights:
    """The record of these matrices."""
    return QuantizedWeights.of(
        [matrix.packed for matrix in matrices],
        biases,
        in_features=matrices[0].values.shape[1],
        bits=form.bits,
        group=form.group,
        levels=form.levels,
    )


def quantized_x(x: Tensor, form: Format) -> Array:
    """What the codes of x stand for: round(127 x / absmax) absmax / 127 in each row and group of at most 256 inputs."""
    values = x.double().numpy()
    group = form.group if form.group is not None and form.group <= 256 else 256
    parts = []
    for start in range(0, values.shape[1], group):
        part = values[:, start : start + group]
        largest = np.abs(part).max(-1, keepdims=True)
        steps = np.rint(part / np.where(largest > 0, largest, 1) * 127)
        parts.append(steps * largest / 127)
    return np.concatenate(parts, -1)


def expected(
    x: Array,
    matrices: list[Matrix],
    biases: list[Tensor | None],
    activation: str | None = None,
    gated: bool = False,
    residuals: tuple[Tensor, ...] = (),
) -> Array:
    """The layer in float64."""
    act = ACTIVATIONS[activation] if activation else lambda y: y
    parts = [
        torch.from_numpy(x @ matrix.values.T) + (0 if bias is None else bias.double())
        for matrix, bias in zip(matrices, biases, strict=True)
    ]
    y = act(parts[0]) * parts[1] if gated else act(torch.cat(parts, -1))
    for residual in residuals:
        y = y + residual.double()
    return y.numpy()


def noise(given: Tensor, exact: Array) -> float:
    """Mean squared error against the mean square (NMSE)."""
    return float(((given.double().numpy() - exact) ** 2).mean() / (exact**2).mean())
