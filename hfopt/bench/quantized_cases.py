"""The cases of `hfopt bench --kernels` over packed matrices."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional as F

from hfopt.functional import QuantizedWeights, quantized_linear
from hfopt.functional.quantized import terms_of
from hfopt.quantization import FORMATS, Format, Packed, QuantizedMatrix, config_of

from .kernel_case import PEAK, STREAM, Call, Case, Sizes, Target, each, peak, random, rounds_up, stream

_DTYPE = torch.bfloat16
# of the bandwidth in decoding; 8 rows at most so many times one row
_ONE_ROW = {"int8": 0.9, "int4": 0.85}
_EIGHT_ROWS = {"int8": 1.3, "int4": 1.6}
_FEW_ROWS = (1, 2, 8, 32)
_MANY_ROWS = {"int8": 1.5e12}  # operations a second


def _title(compute: str, n_rows: int) -> str:
    return f"quantised linear, {compute}, {n_rows} row{'s' if n_rows > 1 else ''}"


def _packed(format: Format, shape: tuple[int, int]) -> Packed:
    return format.pack(random(_DTYPE, *shape))


def _record(packed: Packed) -> QuantizedWeights:
    """Record for kernels, of a copy of a matrix."""
    copies = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    matrix = QuantizedMatrix(packed.out_features, **copies)
    format = packed.format
    return QuantizedWeights.of(
        [matrix],
        [None],
        in_features=packed.in_features,
        bits=format.bits,
        group=format.group,
        levels=format.levels,
        compute=format.compute,
    )


def _operations(format: Format, shape: tuple[int, int], n_rows: int) -> int:
    """Operations of a product, on 8-bit integers."""
    return 2 * n_rows * shape[0] * shape[1] * terms_of(format.compute, _DTYPE)


def _few_rows(sizes: Sizes, format: Format, shape: tuple[int, int]) -> dict[str, Call]:
    packed = _packed(format, shape)
    records = [_record(packed) for _ in range(rounds_up(sizes.streamed, packed.nbytes))]
    calls = stream([record.tensors[0] for record in records])  # type: ignore[misc]
    for n_rows in _FEW_ROWS:
        run = each(partial(quantized_linear, random(_DTYPE, n_rows, shape[1])), records)
        operations = _operations(format, shape, n_rows)
        calls[_title(format.compute, n_rows)] = Call(run, len(records), packed.nbytes, operations)
    return calls | peak(torch.int8)


def _many_rows(format: Format, shape: tuple[int, int], n_rows: int) -> dict[str, Call]:
    packed = _packed(format, shape)
    record, weight = _record(packed), format.unpack(packed).to(_DTYPE)
    x = random(_DTYPE, n_rows, shape[1])
    operations = _operations(format, shape, n_rows)
    return {
        "torch": Call(lambda: F.linear(x, weight), n_operations=operations),
        "hfopt": Call(lambda: quantized_linear(x, record), n_operations=operations),
    } | peak(torch.int8)


def _targets(format: Format) -> Iterator[Target]:
    """Targets of a format; figures are given for the default way to compute alone."""
    name = format.name if format == config_of(format.name).body else ""
    titles = [_title(format.compute, n_rows) for n_rows in _FEW_ROWS]
    yield Target(titles[0], titles[0], "share", _ONE_ROW.get(name), limits=STREAM)
    for title, n_rows in zip(titles[1:], _FEW_ROWS[1:], strict=True):
        wanted = _EIGHT_ROWS.get(name) if n_rows == 8 else None
        yield Target(title, title, "slower", wanted, titles[0], STREAM + PEAK)


def quantized_cases(sizes: Sizes) -> Iterator[Case]:
    """Every format in both ways to compute: a few rows, bound by codes that stream by; many rows, bound by arithmetic."""
    for name in FORMATS:
        default = config_of(name).body
        for compute in ("int8", "float"):
            format = dataclasses.replace(default, compute=compute)
            for shape in (sizes.features[::-1], sizes.features):
                text = f"{name} {shape[0]}×{shape[1]}"
                yield Case(text, partial(_few_rows, sizes, format, shape), tuple(_targets(format)))
                title = _title(compute, sizes.quantized_rows)
                wanted = _MANY_ROWS.get(name) if format == default else None
                many = (
                    Target(title, "hfopt", "rate", wanted, limits=PEAK),
                    Target(title, "hfopt", "faster", None, "torch", PEAK),
                )
                yield Case(text, partial(_many_rows, format, shape, sizes.quantized_rows), many)
