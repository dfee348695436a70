"""`functional.linear` and its kernels against float64 numpy."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hfopt.errors import InvalidInput
from hfopt.functional.activation import ACTIVATIONS
from hfopt.functional.linear import LinearWeights, linear
from hfopt.kernels.linear import rows as kernels
from hfopt.kernels.linear.tiles import linear_tiles
from tests.reference import DTYPES

# around every boundary: rows of a tile (1, 2, 4), of two, three and more tiles (8, 12, 16), the last row whose weights are
# not packed (64), packed tiles of 13, 8 and 14 rows
ROWS = [1, 2, 3, 4, 5, 8, 9, 12, 13, 15, 16, 17, 31, 32, 33, 36, 37, 63, 64, 65, 71, 79]
# features around a vector (16 or 32), odd ones (the last unit half full), the steps of a block (8 to 64 chunks: 128 to 1024
# float32, 256 to 2048 bfloat16) and the depth of a panel (1024 units)
FEATURES = [1, 15, 16, 31, 33, 41, 123, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4100]
# output columns around rows of weights at a time (4, 8), a block (16) and a panel (32)
COLUMNS = [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 32, 33, 48]


def _random(*shape, dtype):
    return torch.randn(*shape).to(dtype)


def _exact(x, weights, biases, activation=None, gated=False, residuals=()):
    act = ACTIVATIONS[activation] if activation else lambda y: y
    parts = [
        x.double() @ weight.double().T + (0 if bias is None else bias.double())
        for weight, bias in zip(weights, biases, strict=True)
    ]
    y = act(parts[0]) * parts[1] if gated else act(torch.cat(parts, -1))
    for residual in residuals:
        y = y + residual.double()
    return y


def _torch(x, weights, biases, activation=None, gated=False, residuals=()):
    act = ACTIVATIONS[activation] if activation else lambda y: y
    parts = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    y = act(parts[0]) * parts[1] if gated else act(torch.cat(parts, -1))
    for residual in residuals:
        y = y + residual
    return y


def _mean(results, exacts):
    return (
        torch.cat([(a.double() - b).flatten() for a, b in zip(results, exacts, strict=True)])
        .square()
        .mean()
        .sqrt()
    )


def _compare(ours, torchs, exacts):
    """At most twice torch's own error (root mean square), or half a rounding of the largest result where torch is exact."""
    rounding = max(exact.abs().max() for exact in exacts) * torch.finfo(ours[0].dtype).eps / 2
    assert _mean(ours, exacts) <= max(2 * _mean(torchs, exacts), rounding)


def _check(x, weights, biases, **options):
    exact = _exact(x, weights, biases, **options)
    ours = linear(x, LinearWeights.of(weights, biases), **options)
    assert ours.dtype == x.dtype and ours.shape == exact.shape
    _compare([ours], [_torch(x, weights, biases, **options)], [exact])
    return ours


@pytest.mark.parametrize("features", [33, 123, 1025, 2049, 4100, 8200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_among_others(dtype, features):
    x = _random(64, features, dtype=dtype)
    weights = LinearWeights.of([_random(19, features, dtype=dtype)], [None])
    alone = torch.cat([linear(row[None], weights) for row in x])
    for n_rows in (n for n in ROWS if n <= kernels.ROW_LIMIT):
        assert torch.equal(linear(x[:n_rows], weights), alone[:n_rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_and_features(dtype, rows):
    for features in FEATURES:
        x, weight = _random(rows, features, dtype=dtype), _random(19, features, dtype=dtype)
        _check(x, [weight], [None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_columns(dtype, rows):
    for columns in COLUMNS:
        # the error of a single value is chance: that of many draws is compared
        ours, torchs, exacts = [], [], []
        for _ in range(50):
            x, weight = _random(rows, 70, dtype=dtype), _random(columns, 70, dtype=dtype)
            bias = _random(columns, dtype=dtype)
            ours.append(linear(x, LinearWeights.of([weight], [bias])))
            torchs.append(_torch(x, [weight], [bias]))
            exacts.append(_exact(x, [weight], [bias]))
        _compare(ours, torchs, exacts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6, 16, 31])
@pytest.mark.parametrize("sizes", [(64, 16, 16), (33, 5, 18), (7, 41)])
def test_several_matrices_in_one_launch(dtype, rows, sizes):
    x = _random(rows, 96, dtype=dtype)
    weights = [_random(size, 96, dtype=dtype) for size in sizes]
    biases = [_random(size, dtype=dtype) if index != 1 else None for index, size in enumerate(sizes)]
    residual = _random(rows, sum(sizes), dtype=dtype)
    _check(x, weights, biases, residuals=(residual,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 33, 70])
@pytest.mark.parametrize("columns", [5, 16, 50])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gated(dtype, rows, columns, with_bias):
    x = _random(rows, 123, dtype=dtype)
    weights = [_random(columns, 123, dtype=dtype) / 8 for _ in range(2)]
    biases = [_random(columns, dtype=dtype) if with_bias else None for _ in range(2)]
    residuals = [_random(rows, columns, dtype=dtype) for _ in range(2)]
    _check(x, weights, biases, activation="silu", gated=True)
    _check(x, weights, biases, activation="gelu", gated=True, residuals=residuals)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(dtype, name):
    values = torch.cat([torch.linspace(-12, 12, 1001), torch.linspace(-1e-3, 1e-3, 101)]).to(dtype)
    _check(values[:, None], [torch.ones(3, 1, dtype=dtype)], [None], activation=name)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_of_special_values(name):
    values = torch.tensor([float("nan"), float("inf"), 0.0, -100.0, 100.0, 1e30, -1e30, 88.8, -88.8])
    ours = linear(values[:, None], LinearWeights.of([torch.ones(1, 1)], [None]), activation=name)[:, 0]
    expected = ACTIVATIONS[name](values)
    # torch's own exact gelu turns +inf into NaN in its vector code: the limit is right as well
    limit = torch.where(values == float("inf"), ours, expected) if name.startswith("gelu") else expected
    torch.testing.assert_close(ours, limit, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 30])
def test_nan_and_inf_stay_where_they_belong(dtype, rows):
    x, weight = _random(rows, 64, dtype=dtype), _random(20, 64, dtype=dtype)
    clean = linear(x, LinearWeights.of([weight], [None]))
    weight[3, 60] = float("nan")
    weight[7, 2] = float("inf")
    dirty = linear(x, LinearWeights.of([weight], [None]))
    assert dirty[:, 3].isnan().all() and dirty[:, 7].isinf().all()
    others = [c for c in range(20) if c not in (3, 7)]
    assert torch.equal(dirty[:, others], clean[:, others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 16, 40])
def test_same_bits_with_any_number_of_threads(dtype, rows):
    x = _random(rows, 2100, dtype=dtype)
    weights = LinearWeights.of([_random(70, 2100, dtype=dtype), _random(33, 2100, dtype=dtype)], [None, None])
    torch.set_num_threads(1)
    alone = linear(x, weights)
    torch.set_num_threads(2)
    together = linear(x, weights)
    assert torch.equal(alone, together)


@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_nothing_outside_the_output_is_written(rows, dtype):
    columns, features, guard = 21, 77, 64
    memory = np.full(rows * columns + 2 * guard, 123, dtype)
    out = memory[guard:-guard].reshape(rows, columns)
    x = np.zeros((rows, features), dtype)
    weight = np.zeros((columns, features), dtype)
    table = np.array([[weight.ctypes.data, 0, columns, 0]], np.int64)
    nothing = np.empty(0, np.int64)
    kernel = kernels.linear_rows if rows <= kernels.ROW_LIMIT else linear_tiles
    place = (np.empty(0, dtype), x.ctypes.data, rows, features)
    kernel(*place, table, False, 0, nothing, out.ctypes.data, columns)
    assert (out == 0).all()
    assert (memory[:guard] == 123).all() and (memory[-guard:] == 123).all()


def test_leading_dimensions_and_strided_rows():
    weight = _random(10, 24, dtype=torch.float32)
    x = _random(3, 4, 48, dtype=torch.float32)[..., :24]
    torch.testing.assert_close(linear(x, LinearWeights.of([weight], [None])), F.linear(x, weight))
    empty = torch.empty(0, 24)
    assert linear(empty, LinearWeights.of([weight], [None])).shape == (0, 10)


def test_weights_notice_that_they_were_replaced():
    weight = torch.nn.Parameter(torch.randn(4, 8))
    record = LinearWeights.of([weight], [None])
    assert record.reads([weight], [None])
    weight.data = torch.randn(4, 8)
    assert not record.reads([weight], [None])
    assert not record.reads([weight], [torch.zeros(4)])


_GOOD = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("weights", "biases", "words"),
    [
        ([], [], "0 and 0"),
        ([_GOOD], [], "1 and 0"),
        ([_GOOD.double()], [None], "torch.float64"),
        ([_GOOD, _GOOD.bfloat16()], [None, None], "weights[1] has dtype torch.bfloat16"),
        ([_GOOD.to("meta")], [None], "meta"),
        ([torch.ones(8, 2).T], [None], "strides"),
        ([torch.ones(8)], [None], "(8,)"),
        ([_GOOD, torch.ones(2, 9)], [None, None], "(2, 9)"),
        ([_GOOD], [torch.ones(3)], "biases[0] has shape (3,)"),
        ([_GOOD], [torch.ones(2).bfloat16()], "biases[0] has dtype"),
        ([_GOOD], [torch.ones(4)[::2]], "strides"),
    ],
)
def test_bad_weights(weights, biases, words):
    with pytest.raises(InvalidInput) as caught:
        LinearWeights.of(weights, biases)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (torch.ones(3, 7), {}, "7 features"),
        (torch.ones(3, 8).bfloat16(), {}, "hidden_states has dtype torch.bfloat16"),
        (torch.ones(8, 3).T, {}, "strides"),
        (torch.ones(3, 8, device="meta"), {}, "meta"),
        (torch.ones(3, 8), {"activation": "swish"}, "'swish'"),
        (torch.ones(3, 8), {"gated": True}, "gated"),
        (torch.ones(3, 8), {"residuals": [torch.ones(3, 3)]}, "residuals[0] has shape (3, 3)"),
        (torch.ones(3, 8), {"residuals": [torch.ones(2, 3).T]}, "strides"),
        (np.ones((3, 8)), {}, "ndarray"),
    ],
)
def test_bad_input(x, options, words):
    with pytest.raises(InvalidInput) as caught:
        linear(x, LinearWeights.of([_GOOD], [None]), **options)
    assert words in str(caught.value)
