"""Checkpoints of other tools, written here from known integers, against plain numpy dequantisation: bit by bit."""

from typing import Any

import numpy as np
import pytest
import torch

from hfopt.checkpoints.foreign import read_linear
from hfopt.errors import CorruptCheckpoint, InvalidInput, UnsupportedModel
from hfopt.quantization import Int4, Int8
from tests.checkpoint_cases import Known, awq, compressed, gptq, tensor

LAYER = "model.layers.3.mlp.down_proj"


def unpacked(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    packed = read_linear(LAYER, tensors, config)
    return packed.format.unpack(packed)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("convention", ["gptq", "gptq_v2", None])
def test_gptq(bits, group, convention):
    known = Known(bits, group, out=24 if group == 32 else 32)
    known.zeros[0, 0] = 0  # one less is stored as the largest number
    known.zeros[1, 0] = 2**bits - 1
    options = {} if convention is None else {"checkpoint_format": convention}
    tensors, config = gptq(known, **options)
    packed = read_linear(LAYER, tensors, config)
    assert packed.format == (Int4 if bits == 4 else Int8)(
        group=None if group == -1 else group, symmetric=False
    )
    assert packed.order is None
    assert torch.equal(packed.format.unpack(packed), known.dequantised())
    del tensors["g_idx"]  # older files have none
    assert torch.equal(unpacked(tensors, config), known.dequantised())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("out", [24, 32])
def test_gptq_with_inputs_out_of_order(bits, group, out):
    known = Known(bits, group, out=out, scatter=True)
    tensors, config = gptq(known, desc_act=True)
    packed = read_linear(LAYER, tensors, config)
    assert packed.order is not None and packed.order.dtype == torch.int32
    assert (np.diff(known.groups[packed.order.numpy()]) >= 0).all()
    assert torch.equal(packed.format.unpack(packed), known.dequantised())


def test_gptq_with_desc_act_whose_inputs_are_in_order():
    known = Known(4, 64)
    packed = read_linear(LAYER, *gptq(known, desc_act=True))
    assert packed.order is None
    known = Known(4, -1, scatter=True)
    packed = read_linear(LAYER, *gptq(known, desc_act=True))
    assert packed.order is None
    assert torch.equal(packed.format.unpack(packed), known.dequantised())


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_in_the_middle_are_symmetric(bits):
    known = Known(bits, 128)
    known.zeros[:] = 2 ** (bits - 1)
    packed = read_linear(LAYER, *gptq(known, sym=True))
    assert packed.zeros is None
    assert packed.format == (Int4 if bits == 4 else Int8)(group=128, symmetric=True)
    assert torch.equal(packed.format.unpack(packed), known.dequantised())


def test_gptq_8_bits_and_an_odd_number_of_outputs():
    """Zero points fill the last word with nothing."""
    known = Known(8, 64, out=7)
    assert torch.equal(unpacked(*gptq(known)), known.dequantised())


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize(("out", "version"), [(40, "gemm"), (32, "GEMM")])
def test_awq(group, out, version):
    known = Known(4, group, out=out)
    packed = read_linear(LAYER, *awq(known, version=version), compute="float")
    assert packed.format == Int4(group=None if group == -1 else group, symmetric=False, compute="float")
    assert torch.equal(packed.format.unpack(packed), known.dequantised())


@pytest.mark.parametrize("group", [-1, 32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "packs"), [(8, False), (8, True), (4, True)])
@pytest.mark.parametrize(("out", "dtype"), [(19, torch.bfloat16), (32, torch.float16)])
def test_compressed_tensors(group, symmetric, bits, packs, out, dtype):
    known = Known(bits, group, out=out)
    tensors, config = compressed(known, packs, symmetric, dtype)
    packed = read_linear(LAYER, tensors, config)
    assert packed.format == (Int4 if bits == 4 else Int8)(
        group=None if group == -1 else group, symmetric=symmetric
    )
    scales = tensors["weight_scale"].float().numpy()
    expected = known.dequantised(2 ** (bits - 1) if symmetric else None, scales)
    assert torch.equal(packed.format.unpack(packed), expected)


def test_compressed_tensors_of_any_width():
    known = Known(8, -1, out=5, inputs=123)
    for dtype in (torch.float32, torch.bfloat16):
        tensors, config = compressed(known, dtype=dtype)
        expected = known.dequantised(128, tensors["weight_scale"].float().numpy())
        assert torch.equal(unpacked(tensors, config), expected)
        tensors, config = compressed(known, packed=True, dtype=dtype)
        assert torch.equal(unpacked(tensors, config), expected)


def test_compressed_tensors_with_groups_out_of_order():
    known = Known(4, 64, scatter=True)
    tensors, config = compressed(known, packed=True, actorder="group")
    tensors["weight_g_idx"] = tensor(known.groups.astype(np.int32))
    expected = known.dequantised(8, tensors["weight_scale"].float().numpy())
    assert torch.equal(unpacked(tensors, config), expected)


def test_float32_scales_of_groups_are_rounded_to_11_bits():
    known = Known(8, 32)
    tensors, config = compressed(known, dtype=torch.float32)
    tensors["weight_scale"] *= (
        1 + torch.rand(known.scales.shape, generator=torch.Generator().manual_seed(0)) / 999
    )
    expected = known.dequantised(128, tensors["weight_scale"].numpy())
    torch.testing.assert_close(unpacked(tensors, config), expected, rtol=2.0**-11, atol=0)


def test_wide_range_of_bfloat16_scales_and_negative_ones():
    known = Known(8, 32)
    tensors, config = compressed(known)
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(-16, 1, known.scales.shape, generator=generator)
    tensors["weight_scale"] = (tensors["weight_scale"] * 2.0 ** (powers - 70)).bfloat16()
    tensors["weight_scale"][3] *= -1
    tensors["weight_scale"][4] = 0
    tensors["weight_scale"][5, 2] = 0
    expected = known.dequantised(128, tensors["weight_scale"].float().numpy())
    found = unpacked(tensors, config)
    # a scale below 2^-14 of its row's largest is a subnormal float16
    torch.testing.assert_close(found, expected, rtol=2.0**-6, atol=0)
    assert (found == expected).float().mean() > 0.9


def test_schemes_are_found_by_name_pattern_and_class():
    known = Known(8, 32)
    tensors, config = compressed(known)
    right = config["config_groups"].pop("group_0")
    wrong = {"targets": ["Linear"], "weights": {**right["weights"], "num_bits": 3}}
    for target in (LAYER, "re:.*down_proj$", "re:model"):
        config["config_groups"] = {"group_0": wrong, "group_1": {**right, "targets": ["Embedding", target]}}
        assert read_linear(LAYER, tensors, config).format == Int8(group=32)
    for target in (LAYER[:-1], "re:.*up_proj", "down_proj"):
        config["config_groups"] = {"group_1": {**right, "targets": [target]}}
        with pytest.raises(UnsupportedModel, match=f"{LAYER}: no group of config_groups"):
            read_linear(LAYER, tensors, config)
    groups: Any
    for groups in (None, {}, []):
        with pytest.raises(CorruptCheckpoint, match="no config_groups"):
            read_linear(LAYER, tensors, {**config, "config_groups": groups})


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (gptq, {"quant_method": "aqlm"}, r"quant_method='aqlm' .* \['awq', 'compressed-tensors', 'gptq'\]"),
        (gptq, {"quant_method": None}, "quant_method=None"),
        (gptq, {"bits": 3}, r"bits=3 .* \[4, 8\]"),
        (gptq, {"bits": "4"}, "bits='4'"),
        (gptq, {"bits": True}, "bits=True"),
        (gptq, {"group_size": 16}, r"group_size=16 .* \[-1, 32, 64, 128\] for 4 bits"),
        (gptq, {"group_size": 256}, "group_size=256"),
        (gptq, {"group_size": 64.0}, "group_size=64.0"),
        (gptq, {"checkpoint_format": "marlin"}, r"checkpoint_format='marlin' .* \['gptq', 'gptq_v2'\]"),
        (awq, {"bits": 8}, r"bits=8 .* \[4\]"),
        (awq, {"version": "gemv"}, "version='gemv'"),
        (awq, {"zero_point": False}, "zero_point=False"),
        (awq, {"group_size": 0}, "group_size=0"),
        (compressed, {"num_bits": 4}, r"num_bits=4 .* \[8\]"),
        (compressed, {"type": "float"}, "type='float'"),
        (compressed, {"strategy": "block"}, r"strategy='block' .* \['channel', 'group'\]"),
        (compressed, {"symmetric": None}, "symmetric=None"),
    ],
)
def test_what_hfopt_cannot_read_is_refused(write, options, message):
    bits = 8 if write is compressed else 4
    tensors, config = write(Known(bits, 64), **options)
    with pytest.raises(UnsupportedModel, match=f"^{LAYER}: {message}"):
        read_linear(LAYER, tensors, config)


def test_other_refusals():
    tensors, config = compressed(Known(8, 64))
    with pytest.raises(UnsupportedModel, match="format='marlin-24'"):
        read_linear(LAYER, tensors, {**config, "format": "marlin-24"})
    with pytest.raises(UnsupportedModel, match="group_size=128 does not divide its 192 inputs"):
        read_linear(LAYER, *awq(Known(4, 64, inputs=192), group_size=128))
    with pytest.raises(InvalidInput, match="compute='bf16'"):
        read_linear(LAYER, *awq(Known(4, 64)), compute="bf16")
    known = Known(4, 64)
    known.groups[:10] = 3
    with pytest.raises(UnsupportedModel, match="every group must hold 64 inputs"):
        read_linear(LAYER, *gptq(known, desc_act=True))


WRITERS = {
    "gptq": lambda: gptq(Known(4, 64, scatter=True), desc_act=True),
    "awq": lambda: awq(Known(4, 64)),
    "int8": lambda: compressed(Known(8, 64), symmetric=False),
    "packed": lambda: compressed(Known(4, 64), packed=True, symmetric=False),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_missing_and_contradicting_tensors_are_refused(writer):
    tensors, config = WRITERS[writer]()
    contradiction = (CorruptCheckpoint, UnsupportedModel)  # a cut qweight says that there are fewer inputs
    for name, values in tensors.items():
        rest = {other: value for other, value in tensors.items() if other != name}
        with pytest.raises(CorruptCheckpoint, match=f"^{LAYER}: tensor '{name}' is missing"):
            read_linear(LAYER, rest, config)
        for bad in (values[:-1], values[:0], values[None], values.double(), torch.cat([values, values])):
            with pytest.raises(contradiction, match=f"^{LAYER}: (tensor |group_size=64 does not divide)"):
                read_linear(LAYER, {**rest, name: bad}, config)
        if values.ndim == 2:
            with pytest.raises(contradiction, match=f"^{LAYER}: (tensor |group_size=64 does not divide)"):
                read_linear(LAYER, {**rest, name: values[:, :-1]}, config)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(writer, value):
    tensors, config = WRITERS[writer]()
    scales = tensors["weight_scale" if "weight_scale" in tensors else "scales"]
    scales[1, 2] = value
    with pytest.raises(CorruptCheckpoint, match=f"^{LAYER}: the scales hold NaN or Inf"):
        read_linear(LAYER, tensors, config)


@pytest.mark.parametrize("index", [-1, 4])
def test_groups_that_do_not_exist_are_refused(index):
    tensors, config = gptq(Known(4, 64), desc_act=True)
    tensors["g_idx"][7] = index
    with pytest.raises(CorruptCheckpoint, match=f"^{LAYER}: group indices must be from 0 to 3"):
        read_linear(LAYER, tensors, config)


def test_bits_that_contradict_the_tensors_are_refused():
    tensors, config = gptq(Known(4, 64))
    with pytest.raises(CorruptCheckpoint, match="for 8 bits, 128 inputs and group_size=64"):
        read_linear(LAYER, tensors, {**config, "bits": 8})
