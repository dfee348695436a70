"""`functional.quantized_linear` and its kernels against float64 numpy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.functional.activation import ACTIVATIONS
from hfopt.functional.quantized import Compute, QuantizedWeights, quantized_linear, terms_of
from hfopt.kernels.jit import cpu
from hfopt.kernels.linear.matrix_quantized import LEAST_ROWS
from hfopt.kernels.linear.quantized import quantized_linear as quantized_kernel
from hfopt.quantization import QuantizedMatrix
from tests import reference
from tests.quantized_cases import FORMATS, NF4, Format, Matrix, expected, noise, quantized_x, weights_of
from tests.reference import DTYPES

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 24, 63, 64, 65, 130, 264, 265, 300]
COLUMNS = [1, 5, 15, 16, 17, 31, 32, 33, 123]
# NMSE against exactly the arithmetic of the kernel: float32 sums, and some codes of x that lie between two integers
CLOSE = 1e-7
# the same of few results that are rounded to 16 bits
ROUNDED = 1e-5
LIMITS = {"int8": 5e-4, "float": 1e-12}  # against dequantised weights and x as it is

COMPUTE = ["int8", "float"]
SHORT = [
    Format(8, None),
    Format(8, 128, True),
    Format(4, 32),
    Format(4, 256, True),
    Format(4, 64, levels=NF4),
]


def _case(
    rows: int, columns: Sequence[int], size: int, form: Format, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Matrix]]:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((rows, size))).to(dtype)
    return x, [Matrix.random(n, size, form, rng) for n in columns]


def _check(
    case: tuple[Tensor, list[Matrix]],
    form: Format,
    compute: Compute,
    biases: list[Tensor | None] | None = None,
    **options: Any,
) -> Tensor:
    x, matrices = case
    biases = biases or [None] * len(matrices)
    weights = weights_of(matrices, biases, form)
    ours = quantized_linear(x, weights, compute=compute, **options)
    assert ours.dtype == x.dtype
    near = quantized_x(x, form) if compute == "int8" and not keeps_x(x) else x.double().numpy()
    exact = expected(x.double().numpy(), matrices, biases, **options)
    if keeps_x(x) and compute == "int8":
        matrices = [each.rounded() for each in matrices]
    limit = CLOSE if x.dtype == torch.float32 else ROUNDED
    assert noise(ours, expected(near, matrices, biases, **options)) < limit
    if not options.get("gated"):  # a product of two results has the errors of both
        assert noise(ours, exact) < LIMITS[compute] + (0 if x.dtype == torch.float32 else ROUNDED)
    return ours


def keeps_x(x: Tensor) -> bool:
    """Whether weights become bfloat16 for it, on this machine, and x is not quantised."""
    rows, size = x.shape
    return cpu.HAS_AMX_BF16 and x.dtype == torch.bfloat16 and rows >= LEAST_ROWS and size % 32 == 0


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_many_rows_of_bfloat16(form: Format, compute: Compute) -> None:
    group = form.group or 32
    for rows, size, columns in (
        (LEAST_ROWS, group, [37]),
        (97, 2048 + 2 * group, [16, 47]),
        (300, 3 * group, [130]),
    ):
        _check(_case(rows, columns, size, form, torch.bfloat16), form, compute)
        x, matrices = _case(rows, [40, 40], size, form, torch.bfloat16)
        residual = x.new_ones(rows, 40)
        options: dict[str, Any] = {"activation": "silu", "gated": True, "residuals": (residual,)}
        _check((x, matrices), form, compute, **options)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_formats(form: Format, compute: Compute) -> None:
    sizes = (32, 41, 123, 640) if form.group is None else (form.group, 3 * form.group, 5 * form.group)
    for size in sizes:
        for rows in (1, 3, 9, 70):
            _check(_case(rows, [37], size, form), form, compute)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("form", SHORT, ids=str)
def test_rows(form: Format, compute: Compute) -> None:
    for rows in ROWS:
        _check(_case(rows, [40], 768, form), form, compute)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_columns(columns: int, dtype: torch.dtype, compute: Compute) -> None:
    for form in SHORT:
        x, matrices = _case(66, [columns], 256, form, dtype)
        bias = torch.randn(columns).to(dtype)
        _check((x, matrices), form, compute, [bias])
        weights = weights_of(matrices, [bias], form)
        together = quantized_linear(x[: LEAST_ROWS - 1], weights, compute=compute)
        for rows in (1, 8):
            few = quantized_linear(x[:rows], weights, compute=compute)
            assert torch.equal(few, together[:rows])


def _rows_with(kind: str, rng: np.random.Generator) -> NDArray:
    """8 rows of inputs in groups that are as different as those of models, or more."""
    x = rng.standard_normal((8, 1024))
    if kind == "one large":
        x[:, 44] = 1e4
    elif kind == "large in each group":
        x[:, 5::128] = 1e4
        x[:, 6::128] = 100
    elif kind == "all sizes":
        x *= np.exp(2 * rng.standard_normal(x.shape))
    return x


def _in_lanes(x: Tensor, w: Tensor, n_lanes: int = 4) -> Tensor:
    """x w in float32, by fused multiply-adds in so many lanes: on a machine with vectors of 128 bits, torch's own."""
    rows, columns = x.float().double().numpy(), w.double().numpy()
    sums = np.zeros((len(rows), n_lanes, columns.shape[1]), np.float32)
    for k in range(0, rows.shape[1], n_lanes):
        sums = (sums + rows[:, k : k + n_lanes, None] * columns[None, k : k + n_lanes]).astype(np.float32)
    while sums.shape[1] > 1:
        sums = sums[:, ::2] + sums[:, 1::2]
    return torch.from_numpy(sums[:, 0]).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "one large", "large in each group", "all sizes"])
def test_float_is_as_exact_as_torch(kind: str, dtype: torch.dtype) -> None:
    for form in FORMATS:
        rng = np.random.default_rng(0)
        x = torch.from_numpy(_rows_with(kind, rng)).to(dtype)
        matrix = Matrix.random(64, 1024, form, rng)
        exact = expected(x.double().numpy(), [matrix], [None])
        w = torch.from_numpy(matrix.values.T).to(dtype)
        # torch's error depends on the machine's vectors: ours must not be held against the widest ones alone
        theirs = max(noise(x @ w, exact), noise(_in_lanes(x, w), exact))
        ours = noise(quantized_linear(x, weights_of([matrix], [None], form), compute="float"), exact)
        assert ours < 4 * theirs  # squares


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_keeps_inputs_beside_a_large_one_without_weight(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(_rows_with("one large", rng)).to(dtype)
    matrix = Matrix.random(64, 1024, Format(4, 128), rng)
    # input 44 is input 4 of unit 5, the code of 0 is 8
    codes = matrix.packed.codes.view(4, 128, 16, 4)
    codes[:, 5, :, 0] = codes[:, 5, :, 0] & 0x0F | 0x80
    matrix.values[:, 44] = 0
    exact = expected(x.double().numpy(), [matrix], [None])
    ours = quantized_linear(x, weights_of([matrix], [None], Format(4, 128)), compute="float")
    # what is promised
    largest = np.abs(x.double().numpy()).reshape(8, 8, 128).max(-1)
    bound = 254.0 ** -terms_of("float", dtype) * largest @ np.abs(matrix.values).reshape(64, 8, 128).sum(-1).T
    rounding = torch.finfo(dtype).eps * (
        np.abs(exact) + np.abs(x.double().numpy()) @ np.abs(matrix.values.T) / 64
    )
    assert (np.abs(ours.double().numpy() - exact) <= bound + rounding).all()
    if dtype != torch.float32:
        assert noise(ours, exact) < 4 * noise(x @ torch.from_numpy(matrix.values.T).to(dtype), exact)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("sizes", [(64, 16, 16), (33, 5, 18), (7, 141)])
def test_several_matrices_in_one_launch(sizes: tuple[int, ...], compute: Compute) -> None:
    for form in SHORT:
        for rows in (1, 6, 70):
            x, matrices = _case(rows, sizes, 256, form)
            biases = [torch.randn(size) if index != 1 else None for index, size in enumerate(sizes)]
            _check((x, matrices), form, compute, biases, residuals=(torch.randn(rows, sum(sizes)),))


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("columns", [5, 16, 150])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gated(with_bias: bool, columns: int, compute: Compute) -> None:
    for form in SHORT:
        for rows in (1, 4, 33, 270):
            x, matrices = _case(rows, [columns, columns], 256, form)
            biases = [torch.randn(columns) if with_bias else None for _ in range(2)]
            residuals = tuple(torch.randn(rows, columns) for _ in range(2))
            _check((x, matrices), form, compute, biases, activation="silu", gated=True, residuals=residuals)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name: str, compute: Compute) -> None:
    x, matrices = _case(5, [20], 96, SHORT[0])
    _check((x, matrices), SHORT[0], compute, activation=name)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("form", SHORT, ids=str)
def test_a_row_has_the_same_bits_among_any_others(form: Format, compute: Compute) -> None:
    x, matrices = _case(300, [200, 33], 1536, form)
    weights = weights_of(matrices, [None, None], form)
    together = quantized_linear(x, weights, compute=compute)
    for rows in (1, 2, 4, 7, 8, 12, 70):
        assert torch.equal(quantized_linear(x[:rows], weights, compute=compute), together[:rows])


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("form", SHORT, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_any_number_of_threads(dtype: torch.dtype, form: Format, compute: Compute) -> None:
    for rows in (1, 8, 300):
        x, matrices = _case(rows, [170, 33], 1024, form, dtype)
        weights = weights_of(matrices, [None, None], form)
        torch.set_num_threads(1)
        alone = quantized_linear(x, weights, compute=compute)
        torch.set_num_threads(2)
        assert torch.equal(alone, quantized_linear(x, weights, compute=compute))


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_stay_in_their_rows(bad: float, compute: Compute) -> None:
    for form in SHORT:
        for rows in (1, 5, 70):
            x, matrices = _case(rows, [20], 256, form)
            weights = weights_of(matrices, [None], form)
            clean = quantized_linear(x, weights, compute=compute)
            x[rows // 2, 200] = bad
            dirty = quantized_linear(x, weights, compute=compute)
            assert dirty[rows // 2].isnan().all()
            others = [row for row in range(rows) if row != rows // 2]
            assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("compute", COMPUTE)
def test_zeros_and_extremes(compute: Compute) -> None:
    for form in SHORT:
        x, matrices = _case(3, [20], 512, form)
        weights = weights_of(matrices, [None], form)
        assert (quantized_linear(torch.zeros_like(x), weights, compute=compute) == 0).all()
        x[:, :256] = 0
        _check((x, matrices), form, compute)
        _check((x * 1e30, matrices), form, compute)
        _check((x * 1e-25, matrices), form, compute)
        tiny = quantized_linear(x * 1e-42, weights, compute=compute)
        assert tiny.abs().max() < 1e-40


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9, 300])
def test_nothing_outside_the_output_is_written(rows: int, dtype: torch.dtype, compute: Compute) -> None:
    columns, guard = 21, 64
    for form in SHORT:
        _, matrices = _case(1, [columns], 256, form)
        weights = weights_of(matrices, [None], form)
        like = reference.like(dtype)
        memory: NDArray = np.full(rows * columns + 2 * guard, 123, like.dtype)
        out = memory[guard:-guard].reshape(rows, columns)
        x: NDArray = np.zeros((rows, 256), like.dtype)
        terms = terms_of(compute, dtype)
        levels = 0 if weights.levels is None else weights.levels.data_ptr()
        meaning = (weights.table, weights.scaling, weights.bits, weights.group, levels, terms)
        rest = (False, 0, np.empty(0, np.int64), out.ctypes.data, columns)
        quantized_kernel(like, x.ctypes.data, rows, 256, *meaning, *rest)
        assert (out == 0).all()
        assert (memory[:guard] == 123).all() and (memory[-guard:] == 123).all()


def test_leading_dimensions_and_no_rows() -> None:
    x, matrices = _case(12, [10], 64, SHORT[0])
    weights = weights_of(matrices, [None], SHORT[0])
    flat = quantized_linear(x, weights)
    assert torch.equal(quantized_linear(x.reshape(3, 4, 64), weights), flat.reshape(3, 4, 10))
    assert quantized_linear(x[:0], weights).shape == (0, 10)


def test_weights_notice_that_they_were_replaced() -> None:
    _, (matrix,) = _case(1, [10], 64, Format(8, 32))
    weights = weights_of([matrix], [None], Format(8, 32))
    assert weights.reads([matrix.packed], [None])
    assert not weights.reads([matrix.packed._replace(codes=matrix.packed.codes.clone())], [None])
    assert not weights.reads([matrix.packed], [torch.zeros(10)])


# ---- bad input -------------------------------------------------------------------------------------------------------

_FORM = Format(8, 32, True)
_X, (_GOOD,) = _case(3, [20], 64, _FORM)
_PACKED = _GOOD.packed
_NIBBLES = _case(3, [20], 64, Format(4, 32))[1][0].packed


def _record(
    *matrices: QuantizedMatrix, biases: list[Tensor | None] | None = None, **options
) -> QuantizedWeights:
    given = {"in_features": 64, "bits": 8, "group": 32} | options
    return QuantizedWeights.of(matrices, biases or [None] * len(matrices), **given)


def _with(tensor: Tensor | None, value: float) -> Tensor:
    assert tensor is not None
    changed = tensor.clone()
    changed[1, ..., 0] = value
    return changed


_UNALIGNED = torch.empty(_PACKED.codes.numel() + 8, dtype=torch.uint8)[8:].view_as(_PACKED.codes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: _record(), "0 and 0"),
        (lambda: _record(_PACKED, biases=[None, None]), "1 and 2"),
        (lambda: _record(_PACKED, bits=5), "bits is 5"),
        (lambda: _record(_PACKED, in_features=0), "in_features is 0"),
        (lambda: _record(_PACKED, group=0), "group is 0"),
        (lambda: _record(_PACKED, group=48), "group is 48"),
        (lambda: _record(_PACKED, group=384, in_features=768), "group is 384"),
        (lambda: _record(_PACKED, group=128), "must divide in_features, 64"),
        (lambda: _record(_PACKED, levels=NF4), "bits=8"),
        (lambda: _record(_NIBBLES, bits=4, levels=NF4[:5]), "16 integers"),
        (lambda: _record(_NIBBLES, bits=4, levels=(*NF4[:15], 128)), "16 integers"),
        (lambda: _record(_PACKED._replace(out_features=0)), "out_features is 0"),
        (lambda: _record(_PACKED._replace(out_features=33)), "codes has shape (2, 16, 64)"),
        (lambda: _record(_PACKED, in_features=96), "codes has shape (2, 16, 64)"),
        (lambda: _record(_PACKED, bits=4), "codes has shape (2, 16, 64)"),
        (lambda: _record(_PACKED._replace(scales=None)), "scales is missing"),
        (lambda: _record(_PACKED, group=None), "scales is given"),
        (lambda: _record(_PACKED, _PACKED._replace(zeros=None)), "matrices[1].zeros is missing"),
        (lambda: _record(_PACKED._replace(codes=_PACKED.codes.int())), "torch.int32"),
        (lambda: _record(_PACKED._replace(codes=_PACKED.codes.to("meta"))), "meta"),
        (lambda: _record(_PACKED._replace(codes=_PACKED.codes.numpy())), "ndarray"),  # type: ignore[arg-type]
        (lambda: _record(_PACKED._replace(codes=_UNALIGNED)), "8 bytes behind a multiple of 64"),
        (lambda: _record(_PACKED._replace(row_scales=_PACKED.row_scales.T.contiguous().T)), "strides"),
        (
            lambda: _record(_PACKED._replace(scales=_with(_PACKED.scales, float("nan")))),
            "scales is nan at [1, 0, 0]",
        ),
        (
            lambda: _record(_PACKED._replace(row_scales=_with(_PACKED.row_scales, float("inf")))),
            "is inf at [1, 0]",
        ),
        (lambda: _record(_PACKED, biases=[torch.ones(3)]), "biases[0] has shape (3,)"),
        (lambda: _record(_PACKED, biases=[torch.ones(20).double()]), "torch.float64"),
        (
            lambda: _record(_PACKED, _PACKED, biases=[torch.ones(20), torch.ones(20).bfloat16()]),
            "biases[1] has dtype torch.bfloat16",
        ),
    ],
)
def test_bad_weights(make, words) -> None:
    with pytest.raises(InvalidInput) as caught:
        make()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (torch.ones(3, 7), {}, "7 features"),
        (torch.ones(3, 64).double(), {}, "torch.float64"),
        (torch.ones(64, 3).T, {}, "strides"),
        (_X, {"activation": "swish"}, "'swish'"),
        (_X, {"gated": True}, "gated"),
        (_X, {"compute": "int4"}, "'int4'"),
        (_X, {"residuals": [torch.ones(3, 3)]}, "residuals[0] has shape (3, 3)"),
    ],
)
def test_bad_input(x, options, words) -> None:
    with pytest.raises(InvalidInput) as caught:
        quantized_linear(x, _record(_PACKED), **options)
    assert words in str(caught.value)


def test_x_has_the_dtype_of_the_biases() -> None:
    with pytest.raises(InvalidInput, match="float32 is needed"):
        quantized_linear(_X.bfloat16(), _record(_PACKED, biases=[torch.ones(20)]))
