"""Formats of quantised weights: packing, unpacking, the layout, the search for scales, and what is refused."""

import json
from dataclasses import FrozenInstanceError
from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hfopt.embedded import embedded_model
from hfopt.errors import InvalidInput, UnsupportedDevice
from hfopt.quantization import (
    FORMATS,
    NF4,
    Format,
    InputStatistics,
    Int4,
    Int8,
    Packed,
    QuantizationConfig,
    QuantizedMatrix,
    from_dict,
    layout_of,
    packed_from,
    resolve,
)
from hfopt.quantization import format as format_module
from hfopt.quantization.nf4 import LEVELS

ALL: list[Format] = [
    *(Int8(group=group, symmetric=symmetric) for group, symmetric in product(Int8.groups, (True, False))),
    *(Int4(group=group, symmetric=symmetric) for group, symmetric in product(Int4.groups, (True, False))),
    *(NF4(group=group) for group in NF4.groups),
]
every_format = pytest.mark.parametrize("format", ALL, ids=str)


def random(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def independent(importance: torch.Tensor) -> InputStatistics:
    """Inputs with these mean squares, and no products known."""
    return InputStatistics.of(importance[:, None, None], 1)


def inputs_for(format: Format) -> int:
    """Three groups; without groups, a number of inputs that fills no unit."""
    return 3 * format.group if format.group else 123


def plain(packed: Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [out, in], zero points and scales of every weight, read byte by byte as the layout is described."""
    rows, inputs, bits = packed.out_features, packed.in_features, packed.format.bits
    group = packed.format.group or inputs
    o, k = np.indices((rows, inputs))
    (block, j), (unit, i), g = divmod(o, 16), divmod(k, 4 if bits == 8 else 8), k // group
    stored = {name: tensor.numpy() for name, tensor in packed.tensors().items()}
    byte = stored["codes"][block, unit, 4 * j + i % 4].astype(np.int64)
    codes = byte if bits == 8 else np.where(i >= 4, byte >> 4, byte & 15)
    zeros = np.full_like(codes, packed.format.zero_code)
    if packed.zeros is not None:
        zeros[:] = stored["zeros"][block, g, j]
    scales = stored["row_scales"][block, j].astype(np.float32)
    if packed.scales is not None:
        scales *= stored["scales"][block, g, j].astype(np.float32)
    return codes, zeros, scales


@every_format
@pytest.mark.parametrize("rows", [5, 16, 17])
def test_unpack_is_what_the_layout_says(format, rows):
    packed = format.pack(random(rows, inputs_for(format)))
    codes, zeros, scales = plain(packed)
    values = np.array(LEVELS)[codes] if isinstance(format, NF4) else codes - zeros
    np.testing.assert_allclose(format.unpack(packed).numpy(), values * scales, rtol=3e-7)


@every_format
def test_every_array_is_aligned_and_padded_with_nothing(format):
    packed = format.pack(random(17, inputs_for(format)))
    for name, (shape, dtype) in layout_of(format, 17, inputs_for(format)).items():
        tensor = packed.tensors()[name]
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
    assert packed.codes.shape[0] == 2
    assert not packed.row_scales[1, 1:].any()
    assert packed.scales is None or not packed.scales[1, :, 1:].any()
    # what lies behind the last row and the last input has the value 0
    wide = packed_from(format, 32, packed.codes.shape[1] * 32 // format.bits, packed.tensors())
    beyond = format.unpack(wide)
    assert not beyond[17:].any() and not beyond[:, packed.in_features :].any()


@pytest.mark.parametrize("format", [Int8(), Int4(group=None)], ids=str)
@pytest.mark.parametrize("inputs", [1, 3, 4, 8])
def test_unpack_of_inputs_that_fill_one_unit_at_most(format, inputs):
    packed = format.pack(random(5, inputs))
    codes, zeros, scales = plain(packed)
    np.testing.assert_allclose(format.unpack(packed).numpy(), (codes - zeros) * scales, rtol=3e-7)


def matrix_of(packed):
    return QuantizedMatrix(packed.out_features, **packed.tensors())


@every_format
def test_rows_of_a_matrix_are_views_of_whole_blocks(format):
    """Both halves of a fused weight, for example; with few groups, zero points of some blocks are not aligned."""
    inputs = inputs_for(format)
    packed = format.pack(random(8 * 16 + 5, inputs))
    values = format.unpack(packed)
    for first, n in ((0, 64), (64, 64), (16, 32), (48, 16), (64, 69), (0, 133)):
        rows = matrix_of(packed).rows(first, n)
        starts = [
            len(tensor[: first // 16].reshape(-1).view(torch.uint8)) for tensor in packed.tensors().values()
        ]
        if any(start % 64 for start in starts):
            assert rows is None and first % 64
            continue
        part = Packed(format, n, inputs, **rows.tensors)
        assert torch.equal(format.unpack(part), values[first : first + n])
        for name, tensor in rows.tensors.items():
            assert tensor.untyped_storage().data_ptr() == packed.tensors()[name].untyped_storage().data_ptr()
            assert tensor.data_ptr() % 64 == 0


def test_rows_that_no_view_can_be_made_of():
    matrix = matrix_of(Int8(group=64, symmetric=False).pack(random(64, 64)))
    assert matrix.rows(16, 16) is None  # a group of 16 rows has 16 bytes of zero points
    assert matrix.rows(8, 16) is None and matrix.rows(0, 8) is None
    for first, n in ((0, 65), (-16, 16), (64, 16), (16, 0)):
        with pytest.raises(InvalidInput, match="rows from 0 to 64 are there"):
            matrix.rows(first, n)


def test_rows_keep_the_order_of_inputs():
    packed = Int4(group=32).pack(random(32, 128))
    order = torch.randperm(128, dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    matrix = QuantizedMatrix(32, **packed.tensors(), order=order)
    rows = matrix.rows(16, 16)
    assert rows is not None and rows.order is order


@every_format
@pytest.mark.parametrize("rows", [1, 5, 123])
def test_error_is_half_a_step_where_nothing_is_clipped(format, rows):
    weight = random(rows, inputs_for(format))
    packed = format.pack(weight)
    codes, _, scales = plain(packed)
    error = np.abs(format.unpack(packed).numpy() - weight.numpy())
    if isinstance(format, NF4):
        steps = np.diff(LEVELS)
        gap = np.maximum(np.append(steps, 0)[codes], np.insert(steps, 0, 0)[codes])
        inside = (codes > 0) & (codes < 15)
    else:
        gap = np.ones_like(scales)
        inside = (codes > (0 if packed.zeros is not None or format.bits == 4 else 1)) & (
            codes < 2**format.bits - 1
        )
    assert inside.mean() > 0.7
    assert (error <= gap * np.abs(scales) / 2 * 1.00001)[inside].all()
    assert np.square(error).mean() < (2e-4 if format.bits == 8 else 0.02)


@pytest.mark.parametrize("format", [form for form in ALL if not form.has_zeros], ids=str)
def test_packing_again_changes_no_value(format):
    once = format.unpack(format.pack(random(48, 2 * inputs_for(format) if format.group else 123)))
    twice = format.unpack(format.pack(once))
    same = (twice - once).abs() <= 1e-6 * once.abs().amax(1, keepdim=True)
    assert same.float().mean() > 0.999


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_the_grid_are_kept(format, dtype):
    """Integers that span the range, times a power of two: the codes that come out are the ones that went in."""
    inputs = inputs_for(format)
    generator = torch.Generator().manual_seed(1)
    if isinstance(format, NF4):
        low, high, values = 0, 15, torch.tensor(LEVELS)
    else:
        top = 2**format.bits - 1
        low, high = (0 if format.bits == 4 or format.has_zeros else 1), top
        values = torch.arange(top + 1) - (100 % (top + 1) if format.has_zeros else format.zero_code)
    codes = torch.randint(low, high + 1, (19, inputs), generator=generator)
    codes[:, :: format.group or inputs] = low
    codes[:, 1 :: format.group or inputs] = high
    weight = values[codes] * 2.0**-9
    packed = format.pack(weight.to(dtype))
    found, _, scales = plain(packed)
    np.testing.assert_array_equal(found, codes.numpy())
    assert (scales == 2.0**-9).all()
    assert torch.equal(format.unpack(packed), weight)


@every_format
def test_bfloat16_and_float16_are_taken_as_they_are(format):
    weight = random(20, inputs_for(format))
    for dtype in (torch.bfloat16, torch.float16):
        narrow, wide = format.pack(weight.to(dtype)), format.pack(weight.to(dtype).float())
        for name, tensor in narrow.tensors().items():
            assert torch.equal(tensor, wide.tensors()[name]), name


@every_format
@pytest.mark.parametrize("is_calibrated", [False, True])
def test_slices_change_nothing(format, is_calibrated, monkeypatch):
    weight = random(70, inputs_for(format))
    seen = independent(random(1, inputs_for(format))[0].square()) if is_calibrated else None
    whole = format.pack(weight, seen)
    values = format.unpack(whole)
    monkeypatch.setattr(format_module, "SLICE", 33 * inputs_for(format))
    monkeypatch.setattr(format_module, "FEEDBACK_SLICE", 33 * inputs_for(format))
    for name, tensor in format.pack(weight, seen).tensors().items():
        assert torch.equal(tensor, whole.tensors()[name]), name
    assert torch.equal(format.unpack(whole), values)


@every_format
def test_a_view_of_a_larger_matrix(format):
    inputs = inputs_for(format)
    large = random(2 * inputs, 40)
    weight = large.t()[3:30, 1 : 2 * inputs : 2]
    assert torch.equal(format.pack(weight).codes, format.pack(weight.contiguous()).codes)


@every_format
def test_rows_and_groups_of_zeros(format):
    weight = random(20, inputs_for(format))
    weight[3] = 0
    if format.group:
        weight[5, : format.group] = 0
    unpacked = format.unpack(format.pack(weight))
    assert not unpacked[3].any()
    if format.group:
        assert not unpacked[5, : format.group].any()
    assert not format.unpack(format.pack(torch.zeros(4, inputs_for(format)))).any()


@every_format
@pytest.mark.parametrize("value", [1.0, -0.3])
def test_constant_rows_are_exact(format, value):
    weight = torch.full((3, inputs_for(format)), value)
    torch.testing.assert_close(format.unpack(format.pack(weight)), weight, rtol=1e-6, atol=0)


@every_format
@pytest.mark.parametrize("size", [1e-42, 1e-37, 1e-25, 1e30, 3e38])
def test_tiny_and_huge_weights(format, size):
    weight = random(18, inputs_for(format)).clamp(-1, 1)
    weight[:, 0] = 1
    unpacked = format.unpack(format.pack(weight.double().mul(size).float()))
    assert unpacked.isfinite().all()
    if size < 1e-30:
        assert not unpacked.any()  # below what a row can hold
    else:
        expected = format.unpack(format.pack(weight)).double() * size
        torch.testing.assert_close(unpacked.double(), expected, rtol=1e-3, atol=size * 0.02)


@pytest.mark.parametrize("format", [form for form in ALL if form.group], ids=str)
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-8, 1e-12, 1e-37])
def test_a_group_that_is_tiny_against_its_row(format, size):
    """Scales are float16 and relative to the row's largest: small ones lose precision, then become 0."""
    weight = random(18, inputs_for(format))
    weight[:, : format.group] *= size
    unpacked = format.unpack(format.pack(weight))
    error = (unpacked - weight)[:, : format.group].abs().amax()
    largest = weight[:, : format.group].abs().amax()
    assert error <= (1.01 if size < 1e-6 else 0.35) * largest
    assert (unpacked - weight)[:, format.group :].abs().amax() < 0.7


@every_format
def test_one_outlier_keeps_its_value_and_its_group(format):
    weight = random(18, inputs_for(format))
    weight[2, 1] = 1000
    weight[4, -1] = -1000
    unpacked = format.unpack(format.pack(weight))
    worst = 0.6 if format.bits == 8 else 20
    assert abs(unpacked[2, 1] - 1000) < worst * 8 and abs(unpacked[4, -1] + 1000) < worst * 8
    assert unpacked.isfinite().all()
    if format.group:
        other = (unpacked - weight)[[2, 4]][:, format.group : -format.group].abs().amax()
        assert other < (0.1 if format.bits == 8 else 0.9)


def nearest_error(format: Format, weight: torch.Tensor) -> float:
    """The squared error of the plainest scale: the largest magnitude, or both ends, on the ends of the codes."""
    groups = weight.view(len(weight), -1, format.group or weight.shape[1])
    high, low = groups.amax(-1, keepdim=True).clamp(min=0), groups.amin(-1, keepdim=True).clamp(max=0)
    largest = torch.maximum(high, -low)
    if isinstance(format, NF4):
        levels = torch.tensor(LEVELS) / 127
        values = levels[((groups / largest)[..., None] - levels).abs().argmin(-1)] * largest
    elif format.has_zeros:
        top = 2**format.bits - 1
        scale = (high - low) / top
        zero = (-low / scale).round()
        values = ((groups / scale + zero).round().clamp(0, top) - zero) * scale
    else:
        scale = largest / (2 ** (format.bits - 1) - 1)
        values = (groups / scale).round() * scale
    return float((values - groups).square().sum())


@every_format
@pytest.mark.parametrize("weights", ["normal", "heavy tails", "embedded"])
def test_the_search_beats_the_nearest(format, weights):
    inputs = 256
    if weights == "normal":
        weight = random(64, inputs)
    elif weights == "heavy tails":
        weight = random(64, inputs) / random(64, inputs, 1).square().mul(3).add(0.05).sqrt()
    else:
        tensors = load_file(f"{embedded_model()}/model.safetensors")
        weight = tensors["model.layers.1.mlp.gate_proj.weight"].float()
    gain = nearest_error(format, weight) / float((format.unpack(format.pack(weight)) - weight).square().sum())
    if format.bits == 8:
        assert gain > (1.0 if format.group is None else 1.01)
    else:
        assert gain > (1.3 if isinstance(format, Int4) and format.symmetric else 1.04)


@every_format
def test_importance_moves_the_error_to_where_it_costs_least(format):
    weight = random(64, 256)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(5)).pow(8)
    importance[::7] = 0
    plainly = format.unpack(format.pack(weight))
    weighted = format.unpack(format.pack(weight, independent(importance)))
    error = ((plainly - weight).square() * importance).sum()
    assert ((weighted - weight).square() * importance).sum() < 0.999 * error
    assert (weighted - weight).square().sum() > (plainly - weight).square().sum()
    # a common factor changes nothing, and neither do equal ones
    assert torch.equal(format.unpack(format.pack(weight, independent(2.0**-70 * importance))), weighted)
    equal = format.unpack(format.pack(weight, independent(torch.full((256,), 3.0))))
    assert (equal == plainly).float().mean() > 0.999


def test_no_importance_at_all_is_finite():
    weight = random(4, 64)
    for format in (Int8(group=32), Int4(group=32, symmetric=False), NF4(group=32)):
        for nothing in (independent(torch.zeros(64)), InputStatistics.of(torch.zeros(1, 64, 64), 9)):
            unpacked = format.unpack(format.pack(weight, nothing))
            assert (unpacked - weight).abs().amax() < 0.7


@every_format
def test_dictionaries_round_trip(format):
    values = json.loads(json.dumps(format.to_dict()))
    again = from_dict(values)
    assert again == format and hash(again) == hash(format) and type(again) is type(format)
    assert resolve(values) == resolve(format) == format


def test_names_have_defaults():
    assert set(FORMATS) == {"int8", "int4", "nf4"}
    assert resolve("int8") == Int8(group=None, symmetric=True, compute="int8")
    assert resolve("int4") == Int4(group=128, symmetric=True, compute="int8")
    assert resolve("nf4") == NF4(group=64, compute="int8")
    assert from_dict({"format": "int4", "group": 32}) == Int4(group=32)
    with pytest.raises(FrozenInstanceError):
        Int8().group = 32  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("int3", r"'int3' is not known; formats are \['int4', 'int8', 'nf4'\]"),
        (None, "None is not known"),
        (8, "8 is not known"),
        ({}, "None is not known"),
        ({"format": ["int8"]}, "is not known"),
        ({"format": "int8", "groups": 32}, r"no options \['groups'\]; options are"),
        ({"format": "nf4", "symmetric": True}, r"no options \['symmetric'\]"),
        (
            {"format": "int8", "group": 16},
            r"group=16 of format 'int8' must be one of \[None, 32, 64, 128, 256\]",
        ),
        ({"format": "int8", "group": "32"}, "group='32'"),
        ({"format": "int8", "group": 32.0}, "group=32.0"),
        ({"format": "int4", "group": 256}, "group=256"),
        ({"format": "nf4", "group": None}, "group=None"),
        ({"format": "int8", "symmetric": 1}, r"symmetric=1 of format 'int8' must be one of \[True, False\]"),
        ({"format": "int4", "compute": "bf16"}, r"compute='bf16' .* \['int8', 'float'\]"),
    ],
)
def test_unknown_formats_are_refused(values, message):
    with pytest.raises(InvalidInput, match=message):
        resolve(values)


@pytest.mark.parametrize("skip", ["*.q_proj", 3, None, (3,)])
def test_patterns_are_a_tuple(skip):
    with pytest.raises(InvalidInput, match=r"skip=.* must be a tuple of patterns"):
        QuantizationConfig(Int8(), skip=skip)


@every_format
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(format, value):
    weight = random(40, inputs_for(format))
    weight[33, 5] = value
    with pytest.raises(InvalidInput, match="weight must be finite; row 33 is not"):
        format.pack(weight)


def test_other_bad_weights_are_refused():
    for shape in ((64,), (2, 2, 64), (0, 64), (4, 0)):
        with pytest.raises(InvalidInput, match=r"weight must be a matrix \[out, in\]"):
            Int8().pack(torch.zeros(shape))
    with pytest.raises(InvalidInput, match="weight must be one of"):
        Int8().pack(torch.zeros(4, 64, dtype=torch.int8))
    with pytest.raises(InvalidInput, match="weight must be finite; row 2 is not"):
        Int8().pack(torch.ones(4, 64, dtype=torch.float64).index_fill(0, torch.tensor([2]), 1e300))
    with pytest.raises(UnsupportedDevice, match="meta"):
        Int8().pack(torch.zeros(4, 64, device="meta"))
    for format in (Int8(group=64), Int4(group=64), NF4()):
        with pytest.raises(InvalidInput, match=r"group must divide the number of inputs: .* 96 inputs"):
            format.pack(torch.zeros(4, 96))


def test_statistics_of_other_inputs_are_refused():
    with pytest.raises(InvalidInput, match="inputs describes 32 inputs: 64 are needed"):
        Int8().pack(random(4, 64), independent(torch.ones(32)))


@every_format
def test_tensors_round_trip_and_contradictions_are_refused(format):
    inputs = inputs_for(format)
    packed = format.pack(random(20, inputs))
    tensors = packed.tensors()
    assert packed.nbytes == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    again = packed_from(format, 20, inputs, tensors)
    assert torch.equal(format.unpack(again), format.unpack(packed))
    for name, tensor in tensors.items():
        rest = {other: values for other, values in tensors.items() if other != name}
        with pytest.raises(InvalidInput):
            packed_from(format, 20, inputs, rest)
        for bad in (tensor[:-1], tensor.to(torch.int16), tensor.new_zeros(*tensor.shape, 2)[..., 0]):
            with pytest.raises(InvalidInput, match=f"^{name} of a matrix 20 × {inputs}"):
                packed_from(format, 20, inputs, {**rest, name: bad})
    with pytest.raises(InvalidInput, match="no tensors \\['weight'\\]"):
        packed_from(format, 20, inputs, {**tensors, "weight": tensors["codes"]})
    with pytest.raises(InvalidInput):
        packed_from(format, 33, inputs, tensors)


def test_an_order_permutes_inputs():
    packed = Int8().pack(weight := random(20, 64))
    order = torch.randperm(64, dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    permuted = packed_from(Int8(), 20, 64, {**packed.tensors(), "order": order})
    torch.testing.assert_close(Int8().unpack(permuted)[:, order.long()], Int8().unpack(packed))
    x = random(3, 64)
    torch.testing.assert_close(x[:, order.long()] @ Int8().unpack(packed).T, x @ Int8().unpack(permuted).T)
    assert weight.shape == (20, 64)
    for bad in (order.clone().fill_(3), order + 1, order - 1):
        with pytest.raises(InvalidInput, match="order must hold every number below 64 once"):
            packed_from(Int8(), 20, 64, {**packed.tensors(), "order": bad})
