"""`quantization.plan`: which layer gets which format, and why others are left."""

from typing import Any

import pytest
from torch import nn

import hfopt
from hfopt import HfoptConfig
from hfopt.errors import InvalidInput
from hfopt.quantization import NF4, Int4, Int8, QuantizationConfig
from hfopt.quantization.plan import Layer, plan

LAYERS = {
    "layers.0.up": Layer(256),
    "layers.0.down": Layer(96),
    "layers.0.odd": Layer(256, obstacle="it is a LoraLinear"),
    "vision.up": Layer(256, in_decoder=False),
    "head": Layer(256, is_head=True, in_decoder=False),
}


def test_every_layer_gets_a_format_or_a_reason():
    recipe = QuantizationConfig(Int4(group=128), skip=("*.nothing",))
    formats, left = plan(LAYERS, recipe)
    assert formats == {"layers.0.up": Int4(group=128), "head": Int8()}
    assert left == {
        "layers.0.down": "groups of 128 do not divide its 96 inputs",
        "layers.0.odd": "it is a LoraLinear",
        "vision.up": "it is outside the decoder",
    }


def test_what_a_recipe_says_of_single_layers_comes_first():
    recipe = HfoptConfig("int8", head=None, modules={"layers.0.up": "nf4", "layers.0.down": None})
    formats, left = plan(LAYERS, recipe)
    assert formats == {"layers.0.up": NF4()}
    assert left["layers.0.down"] == "modules names it, with None"
    assert left["head"] == "head is None"


def test_layers_that_are_packed_as_wanted_are_done():
    layers = {"layers.0.up": Layer(256, packed=Int4()), "layers.0.down": Layer(96)}
    assert plan(layers, QuantizationConfig(Int4())) == (
        {},
        {"layers.0.down": "groups of 128 do not divide its 96 inputs"},
    )


@pytest.mark.parametrize(
    "recipe",
    [QuantizationConfig(Int8()), QuantizationConfig(Int4(), skip=("layers.*",))],
    ids=["another format", "skipped"],
)
def test_layers_that_are_packed_otherwise_are_refused(recipe):
    with pytest.raises(InvalidInput, match=r"layers\.0\.up is quantised as Int4.* already"):
        plan({"layers.0.up": Layer(256, packed=Int4())}, recipe)


def test_a_format_that_fits_no_layer_is_refused():
    with pytest.raises(InvalidInput, match=r"fits no layer that it is for \(layers\.0\.down: groups of 128"):
        plan({"layers.0.down": Layer(96), "head": Layer(96, is_head=True)}, QuantizationConfig(Int4()))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_is_computed_from_others_is_left():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    nn.utils.weight_norm(model[0])
    report: Any = hfopt.optimize(model, quantization="int8").hfopt
    assert report.left == {"0": "its weight is no parameter"}
    assert [each.path for each in report.quantized] == ["1"]
