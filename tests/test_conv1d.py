"""GPT-2, whose linear layers have weights [in, out] (Conv1D): the packed numbers of Linears, and every way to them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import hfopt
from hfopt.modules.quantized import QuantizedLinear
from hfopt.quantization import NF4, Format, InputStatistics, Int4, Int8
from tests.generation_cases import Model, assert_same
from tests.model_types import prompts, tiny

FORMATS = (Int8(), Int8(group=32), Int4(group=32), NF4(group=32))
TEXTS = [torch.arange(2, 60), torch.arange(150, 100, -1)]


def layers(model: Model) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if path.startswith("transformer.h.")}


def greedy(model: Model) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(**prompts(), do_sample=False, max_new_tokens=8)
    return tokens


def assert_same_matrices(model: Model, expected: Model) -> None:
    found = {path: each for path, each in layers(model).items() if isinstance(each, QuantizedLinear)}
    assert len(found) == 4 * 4
    for path, linear in found.items():
        other: Any = expected.get_submodule(path)
        assert linear.format == other.format
        assert linear.packed.tensors().keys() == other.packed.tensors().keys()
        for name, tensor in linear.packed.tensors().items():
            assert torch.equal(tensor, other.packed.tensors()[name]), (path, name)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_packed_numbers_are_those_of_a_linear(format: Format) -> None:
    torch.manual_seed(0)
    layer, linear = Conv1D(48, 64), nn.Linear(64, 48)
    nn.init.normal_(layer.bias)
    linear.load_state_dict({"weight": layer.weight.t(), "bias": layer.bias})
    x = torch.randn(3, 64)
    hfopt.optimize(nn.Sequential(layer), quantization=format)
    hfopt.optimize(nn.Sequential(linear), quantization=format)
    assert isinstance(layer, QuantizedLinear)
    for name, tensor in linear.packed.tensors().items():
        assert torch.equal(layer.packed.tensors()[name], tensor)
    with torch.no_grad():
        assert torch.equal(layer(x), linear(x))
        assert torch.equal(layer.weight, linear.weight)
    assert repr(layer).startswith("QuantizedLinear(in_features=64, out_features=48, bias=True")


@pytest.mark.parametrize("is_copy", [False, True])
def test_restore_brings_the_same_layers_back(is_copy: bool) -> None:
    model = tiny("gpt2")
    expected = greedy(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = {path: (type(each), set(vars(each))) for path, each in model.named_modules() if path}
    hfopt.optimize(model, quantization="int8", keep_original=True)
    if is_copy:
        model = copy.deepcopy(model)
    assert isinstance(model.transformer.h[0].mlp.c_fc, QuantizedLinear)
    hfopt.restore(model)
    assert {path: (type(each), set(vars(each))) for path, each in model.named_modules() if path} == before
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert tensor.is_contiguous() and torch.equal(tensor, state[name])
    assert_same(greedy(model), expected)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_way_leads_to_the_same_model(format: Format, tmp_path: Path) -> None:
    model = tiny("gpt2")
    floats, packed = tmp_path / "floats", tmp_path / "packed"
    model.save_pretrained(floats)
    hfopt.optimize(model, quantization=format)
    assert not layers(model).keys() & hfopt.explain(model).left.keys()
    expected = greedy(model)
    hfopt.save(model, packed)
    config = hfopt.HfoptConfig.of(format)
    others = (
        hfopt.load(packed),
        hfopt.load(floats, quantization=format),
        hfopt.optimize(AutoModelForCausalLM.from_pretrained(packed)),
        hfopt.optimize(AutoModelForCausalLM.from_pretrained(floats, quantization_config=config)),
    )
    for other in others:
        assert_same_matrices(other, model)
        assert_same(greedy(other), expected)


def test_calibration_rounds_with_regard_to_the_inputs(tmp_path: Path) -> None:
    """A Linear with the same weight and statistics of inputs has the same numbers; and so has the first layer of one that
    is loaded, where all others are packed already.
    """
    model = tiny("gpt2")
    model.save_pretrained(tmp_path)
    layer = model.transformer.h[0].attn.c_attn
    weight, inputs = layer.weight.detach().clone(), []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for text in TEXTS:
            model(input_ids=text[None], use_cache=False)
    handle.remove()
    hfopt.optimize(model, quantization=Int4(group=32), calibration=TEXTS)
    assert layer.packed.in_features == len(weight)
    x = torch.cat(inputs)
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False)
    linear.weight.data = weight.t().contiguous()
    expected = layer.format.pack(linear.weight, InputStatistics.of((x.mT @ x)[None], len(x)))
    plain = layer.format.pack(linear.weight)
    assert torch.equal(layer.packed.codes, expected.codes)
    assert not torch.equal(layer.packed.codes, plain.codes)
    loaded: Any = hfopt.load(tmp_path, quantization=Int4(group=32), calibration=TEXTS)
    assert torch.equal(loaded.transformer.h[0].attn.c_attn.packed.codes, expected.codes)
