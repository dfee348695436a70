"""Models with quantised weights: what they compute, what they hold, and what can be done to them."""

import copy
import gc
import itertools
import pickle
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

import hfopt
from hfopt.bench import roofline
from hfopt.errors import InvalidInput, UnsupportedModel
from hfopt.functional import Epilogue
from hfopt.modules.quantized import BUFFERS, QuantizedLinear, empty_linear, quantize_linear, read_matrices
from hfopt.patches.replacement import Record
from hfopt.program.decoder import build
from hfopt.quantization import NF4, Format, InputStatistics, Int4, Int8, Packed, QuantizationConfig
from tests.generation_cases import (
    FAMILIES,
    Doubled,
    Model,
    assert_same,
    llama,
    needs_programs,
    one_thread,
    prompts,
)
from tests.pairs import pairs_of
from tests.reference import DTYPES
from tests.step_cases import MODES as STEP_MODES
from tests.step_cases import assert_program_is_the_modules, passes, prove, rehearsals

__all__ = ["passes", "rehearsals"]  # fixtures

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

FORMATS: dict[str, Format] = {
    "int8": Int8(),
    "int8, groups, zeros": Int8(group=32, symmetric=False),
    "int4": Int4(group=32),
    "int4, zeros": Int4(group=32, symmetric=False),
    "nf4": NF4(group=32),
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 4},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "several of a prompt": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2, "eos_token_id": 1},
}


def in_floats(format: Format) -> QuantizationConfig:
    """All Linears in a format, inputs as they are."""
    return QuantizationConfig(replace(format, compute="float"), head="body")


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, QuantizedLinear)}


def unpacked(stock: Model, model: Model, dtype: torch.dtype = torch.float32) -> Model:
    """The stock model with the weights that those of the quantised model stand for."""
    result = copy.deepcopy(stock).to(dtype)
    for name, linear in quantized_linears(model).items():
        values = linear.format.unpack(linear.packed).to(dtype)
        result.get_submodule(name).weight = nn.Parameter(values)
    return result


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of the tokens that are no padding."""
    inputs = prompts()
    output: Tensor = model(**inputs).logits[inputs["attention_mask"].bool()].float()
    return output


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# ---- what they compute ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name", "dtype"), pairs_of(FAMILIES, FORMATS, DTYPES))
def test_logits_are_those_of_the_unpacked_weights(family: str, name: str, dtype: torch.dtype) -> None:
    stock = FAMILIES[family]()
    model = hfopt.optimize(copy.deepcopy(stock).to(dtype), quantization=in_floats(FORMATS[name]))
    assert not hfopt.explain(model).idle
    exact = logits(unpacked(stock, model, torch.float64))
    own_error = difference(logits(unpacked(stock, model, dtype)), exact)
    # weights are rounded to bfloat16 at another place, without the scales of rows
    limit = 1e-5 if dtype is torch.float32 else 2 * own_error
    assert difference(logits(model), exact) < limit

    rounded = hfopt.optimize(copy.deepcopy(stock).to(dtype), quantization=FORMATS[name])
    exact = logits(unpacked(stock, rounded, torch.float64))
    assert 1e-4 < difference(logits(rounded), exact) < 0.06


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_of_generate(family: str, mode: str) -> None:
    stock = FAMILIES[family]()
    model = hfopt.optimize(copy.deepcopy(stock), quantization=in_floats(Int4(group=32)))
    reference = unpacked(stock, model)
    arguments = {**prompts(1 if mode == "prompt lookup" else 3), **MODES[mode], "max_new_tokens": 8}
    torch.manual_seed(5)
    ours = model.generate(**arguments)
    torch.manual_seed(5)
    assert_same(ours, reference.generate(**arguments))


@needs_programs
@pytest.mark.parametrize("left", ["v_proj", "gate_proj", "down_proj"])
def test_projections_of_several_kinds_go_one_after_the_other(left: str) -> None:
    stock = llama()
    config = replace(in_floats(NF4(group=32)), skip=(f"*.{left}",))
    model = hfopt.optimize(copy.deepcopy(stock), quantization=config)
    assert type(model.get_submodule(f"model.layers.0.{_parent(left)}.{left}")) is nn.Linear
    assert difference(logits(model), logits(unpacked(stock, model))) < 1e-5
    # in kernels, not in the classes of transformers
    layer = model.model.layers[0]
    with torch.no_grad():
        assert layer.mlp.compute(torch.randn(1, 3, 64)) is not None
    assert layer.self_attn._hfopt.weights and layer.mlp._hfopt.weights


def _parent(name: str) -> str:
    return "self_attn" if name == "v_proj" else "mlp"


def test_inputs_in_another_order() -> None:
    linear = nn.Linear(64, 24).eval()
    packed = Int4(group=32, compute="float").pack(linear.weight)
    order = torch.randperm(64).int()
    ordered = Packed(packed.format, 24, 64, **packed.tensors(), order=order)
    quantize_linear(linear, ordered)
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = nn.functional.linear(x[:, order.long()], packed.format.unpack(packed), linear.bias)
        torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(linear.weight[:, order.long()], packed.format.unpack(packed))


@torch.inference_mode()
@pytest.mark.parametrize("name", FORMATS)
def test_halves_of_a_fused_weight_are_read_in_place(name: str) -> None:
    """As the gate and up projections are that some models keep in one Linear."""
    fused = nn.Linear(256, 128).eval()
    quantize_linear(fused, FORMATS[name].pack(fused.weight))
    assert isinstance(fused, QuantizedLinear)
    halves = [half for first in (0, 64) if (half := fused.matrix.rows(first, 64)) is not None]
    biases = fused.bias.split(64)
    record = Record(None)
    weights = read_matrices(record, "gate and up", fused.format, 256, halves, biases)
    assert weights is not None
    x = torch.randn(3, 256)
    assert torch.equal(weights.multiply(x), fused(x))
    gate, up = fused(x).split(64, dim=-1)
    gated = weights.multiply(x, Epilogue("silu", gated=True))
    torch.testing.assert_close(gated, nn.functional.silu(gate) * up)
    assert read_matrices(record, "gate and up", fused.format, 256, halves, biases) is weights


# ---- in one call ---------------------------------------------------------------------------------------------


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("family", "name", "dtype"), pairs_of(FAMILIES, FORMATS, DTYPES))
def test_the_program_has_the_bits_of_the_modules(
    family: str, name: str, dtype: torch.dtype, passes: list[int]
) -> None:
    for quantization in (FORMATS[name], in_floats(FORMATS[name])):
        model = hfopt.optimize(FAMILIES[family]().to(dtype), kernels="hfopt", quantization=quantization)
        prove(model)
        assert_program_is_the_modules(model, passes, max_new_tokens=8, **STEP_MODES["greedy"])
        assert_program_is_the_modules(model, passes, max_new_tokens=4, **STEP_MODES["beams"])


def test_long_prompts_go_in_one_call_too(passes: list[int]) -> None:
    model = hfopt.optimize(llama(), kernels="hfopt", quantization=QuantizationConfig(NF4(group=32), None))
    prove(model)
    assert_program_is_the_modules(model, passes, **prompts(2, 70), max_new_tokens=3)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_whose_kernels_has_no_meaning_for_quantised_layers(kernels: Any, passes: list[int]) -> None:
    model = hfopt.optimize(llama(), kernels=kernels, quantization="int8")
    prove(model)
    passes.clear()
    model.generate(**prompts(1, 2), max_new_tokens=6)
    # attention over a prompt is another matter
    assert passes == ([2] if kernels == "torch" else [])


KINDS = (Int8(), Int4(group=32, symmetric=False), None, NF4(group=32, compute="float"))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_program_of_several_formats_has_the_bits_of_the_modules(
    family: str, first: int, dtype: torch.dtype, passes: list[int]
) -> None:
    """Each Linear in another format than the one before it, or of floats."""
    model = FAMILIES[family]().to(dtype)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for linear, format in zip(linears, itertools.cycle(KINDS[first:] + KINDS[:first]), strict=False):
        if format is not None:
            quantize_linear(linear, format.pack(linear.weight))
    hfopt.optimize(model, kernels="hfopt")
    prove(model)
    assert_program_is_the_modules(model, passes, max_new_tokens=6)
    assert_program_is_the_modules(model, passes, **prompts(2, 70), max_new_tokens=3)
    listing = str(hfopt.explain(model).program)
    assert "64 → 64, 8 bits" in listing
    assert ("multiply" in listing) == (family == "llama")


def ordered(linear: nn.Linear, order: Tensor) -> None:
    packed = Int4(group=32).pack(linear.weight)
    quantize_linear(linear, replace(packed, order=order.int()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_program_of_inputs_in_another_order_has_the_bits_of_the_modules(
    dtype: torch.dtype, passes: list[int]
) -> None:
    model = llama().to(dtype)
    first, second = model.model.layers
    shared = torch.randperm(64)
    for name in ("q_proj", "k_proj", "v_proj"):
        ordered(first.self_attn.get_submodule(name), shared)
    for linear in (first.mlp.down_proj, second.mlp.gate_proj, second.mlp.up_proj, second.self_attn.o_proj):
        ordered(linear, torch.randperm(linear.in_features))
    ordered(model.lm_head, torch.randperm(64))
    hfopt.optimize(model, kernels="hfopt", quantization=QuantizationConfig(Int4(group=32), head="body"))
    prove(model)
    assert_program_is_the_modules(model, passes, max_new_tokens=6)
    assert_program_is_the_modules(model, passes, **prompts(2, 70), max_new_tokens=3)
    program = hfopt.explain(model).program
    assert program is not None
    lines = [(each.layer, each.name) for each in program.instructions]
    # of q, k and v it is one
    assert [lines.count((layer, "permute")) for layer in (0, 1, None)] == [2, 3, 1]


def test_an_order_that_has_changed_is_the_next_request_s(passes: list[int]) -> None:
    model = llama()
    ordered(model.lm_head, torch.arange(64))
    for name in ("q_proj", "k_proj", "v_proj"):
        ordered(model.model.layers[0].self_attn.get_submodule(name), torch.arange(64))
    hfopt.optimize(model, kernels="hfopt")
    prove(model)
    before = assert_program_is_the_modules(model, passes, max_new_tokens=3)
    for linear in (model.lm_head, model.model.layers[0].self_attn.k_proj):
        linear.quantized_order.copy_(torch.randperm(64))
    prove(model)
    after = assert_program_is_the_modules(model, passes, max_new_tokens=3)
    assert not torch.equal(after.logits[0], before.logits[0])
    with pytest.raises(UnsupportedModel, match="order is from"):
        model.lm_head.quantized_order[3] = 64
        build(model)


@needs_programs
def test_the_listing_counts_packed_bytes() -> None:
    model = hfopt.optimize(llama(), quantization=QuantizationConfig(Int4(group=32), head="body"))
    program = hfopt.explain(model).program
    assert program is not None
    n_bytes = sum(each.n_bytes for each in program.instructions if each.name == "quantized linear")
    assert n_bytes == sum(each.n_bytes for each in model.hfopt.quantized)
    assert "64 → 96 + 96, 4 bits" in str(program)


@pytest.mark.parametrize("tied", [False, True])
def test_the_limit_of_a_step_counts_packed_bytes(tied: bool) -> None:
    stock = llama(tie_word_embeddings=tied)
    operations = roofline.step_operations(stock, 2, 10), roofline.prefill_operations(stock, 2, 10)
    model = hfopt.optimize(copy.deepcopy(stock), quantization=Int4(group=32))
    norms = sum(each.nbytes for name, each in model.named_parameters() if "norm" in name)
    packed = sum(each.n_bytes for each in model.hfopt.quantized)
    assert sum(each.nbytes for each in roofline.read_weights(model)) == packed + norms
    assert (roofline.step_operations(model, 2, 10), roofline.prefill_operations(model, 2, 10)) == operations


# ---- which ---------------------------------------------------------------------------------------------------


def test_the_head_is_kept_in_8_bits_or_as_told() -> None:
    body = Int4(group=32)
    for head, expected in ((Int8(), Int8()), ("body", body), (None, None)):
        model = hfopt.optimize(llama(), quantization=QuantizationConfig(body, head=head))  # type: ignore[arg-type]
        found = quantized_linears(model)
        assert (found["lm_head"].format if head is not None else None) == expected
        assert {linear.format for name, linear in found.items() if name != "lm_head"} == {body}
        assert len(found) == 14 + (head is not None)
    assert hfopt.explain(model).left == {"lm_head": "head is None"}


@pytest.mark.parametrize(
    "quantization", ["int8", {"format": "int8"}, {"body": {"format": "int8"}}, Int8()], ids=str
)
def test_ways_to_name_a_format(quantization: Any) -> None:
    model = hfopt.optimize(llama(), quantization=quantization)
    assert {linear.format for linear in quantized_linears(model).values()} == {Int8()}


def test_what_cannot_be_packed_stays_with_a_reason() -> None:
    model = hfopt.optimize(llama(intermediate_size=80), quantization=Int4(group=32))
    left = hfopt.explain(model).left
    assert set(left) == {f"model.layers.{index}.mlp.down_proj" for index in range(2)}
    assert left["model.layers.0.mlp.down_proj"] == "groups of 32 do not divide its 80 inputs"
    assert "groups of 32 do not divide its 80 inputs" in str(model.hfopt)


def test_a_format_that_fits_no_layer_is_refused() -> None:
    model = llama()
    with pytest.raises(InvalidInput, match=r"Int4.*q_proj: groups of 128 do not divide its 64 inputs"):
        hfopt.optimize(model, quantization="int4")
    assert not quantized_linears(model)
    model = hfopt.optimize(llama(intermediate_size=80), quantization=Int4(group=32))
    hfopt.optimize(model, quantization=Int4(group=32))  # there is nothing left to do


def test_what_is_outside_the_decoder_stays() -> None:
    model = LlamaForSequenceClassification(llama().config).eval()
    hfopt.optimize(model, quantization="int8")
    assert model.hfopt.left == {"score": "it is outside the decoder"}
    assert len(quantized_linears(model)) == 14


def test_a_tied_head_has_its_own_weights() -> None:
    stock = llama(tie_word_embeddings=True)
    model = hfopt.optimize(copy.deepcopy(stock), quantization="int8")
    before = logits(model)
    assert torch.equal(model.model.embed_tokens.weight, stock.model.embed_tokens.weight)
    model.tie_weights()
    assert "weight" not in model.lm_head._parameters
    assert torch.equal(logits(model), before)
    report = hfopt.explain(model)
    (head,) = (each for each in report.quantized if each.path == "lm_head")
    assert head.tied_to == "model.embed_tokens" and head.saved_bytes == -head.n_bytes
    assert "lm_head has packed weights beside those of model.embed_tokens" in str(report)
    assert sum(each.saved_bytes for each in report.quantized) > 0


def test_a_config_round_trips_through_json() -> None:
    for config in (
        QuantizationConfig(Int4(symmetric=False), head="body", skip=("*.a", "b")),
        QuantizationConfig(NF4(compute="float"), head=Int8(group=64)),
        QuantizationConfig(Int8(), head=None),
    ):
        assert QuantizationConfig.from_dict(config.to_dict()) == config


# ---- errors --------------------------------------------------------------------------------------------------


def test_a_second_time() -> None:
    model = hfopt.optimize(llama(), quantization=Int4(group=32))
    before = logits(model)
    hfopt.optimize(model)
    hfopt.optimize(model, quantization=Int4(group=32))
    assert torch.equal(logits(model), before)
    with pytest.raises(InvalidInput, match="quantised as Int4"):
        hfopt.optimize(model, quantization="int8")
    with pytest.raises(InvalidInput, match="skip names it"):
        hfopt.optimize(model, quantization=QuantizationConfig(Int4(group=32), skip=("*",)))
    assert torch.equal(logits(model), before)


def test_after_optimize_without_quantization() -> None:
    model = hfopt.optimize(hfopt.optimize(llama()), quantization="int8")
    assert torch.equal(logits(model), logits(hfopt.optimize(llama(), quantization="int8")))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_change_nothing(value: float) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.down_proj\.weight must be finite"):
        hfopt.optimize(model, quantization="int8")
    assert not quantized_linears(model) and "hfopt" not in model.__dict__


@pytest.mark.parametrize(
    ("quantization", "match"),
    [
        ("int3", "not known"),
        ({"body": {"format": "int8"}, "tail": 1}, "no options"),
        ({"body": "int8"}, "must be a dictionary"),
        (3, "not known"),
    ],
)
def test_unknown_configs(quantization: Any, match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        hfopt.optimize(llama(), quantization=quantization)


def test_bad_fields_of_a_config() -> None:
    for options in ({"body": "int8"}, {"body": Int8(), "head": "int8"}, {"body": Int8(), "skip": "*"}):
        with pytest.raises(InvalidInput, match="must be"):
            QuantizationConfig(**options)


# ---- the way back --------------------------------------------------------------------------------------------


def test_restore_says_that_the_weights_are_gone() -> None:
    model = hfopt.optimize(llama(), quantization="int8")
    before = logits(model)
    with pytest.raises(UnsupportedModel, match="keep_original"):
        hfopt.restore(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("tied", [False, True])
def test_restore_of_kept_weights_leaves_nothing_behind(tied: bool) -> None:
    stock = llama(tie_word_embeddings=tied)
    model = hfopt.optimize(copy.deepcopy(stock), quantization="int8", keep_original=True)
    hfopt.restore(copy.deepcopy(model))
    hfopt.restore(model)
    assert [type(each) for each in model.modules()] == [type(each) for each in stock.modules()]
    assert [set(vars(each)) for each in model.modules()] == [set(vars(each)) for each in stock.modules()]
    assert list(model.state_dict()) == list(stock.state_dict())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(logits(model), logits(stock))


# ---- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("is_optimized", [False, True])
def test_each_weight_is_freed_before_the_next_is_packed(
    is_optimized: bool, is_calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    if is_optimized:
        hfopt.optimize(model)
        model.generate(**prompts(), max_new_tokens=3)
    weights = [
        weakref.ref(each.weight.untyped_storage()) for each in model.modules() if isinstance(each, nn.Linear)
    ]
    alive = []

    def pack(self: Format, weight: Tensor, inputs: InputStatistics | None = None) -> Packed:
        alive.append(sum(ref() is not None for ref in weights))
        return original(self, weight, inputs)

    original = Format.pack
    monkeypatch.setattr(Format, "pack", pack)
    gc.collect()
    gc.disable()
    try:
        hfopt.optimize(model, quantization="int8", calibration=[[1, 2, 3]] if is_calibrated else None)
    finally:
        gc.enable()
    assert alive == list(range(len(weights), 0, -1))


def test_a_quantized_model_is_as_small_as_its_report_says() -> None:
    model = hfopt.optimize(llama(), quantization=Int4(group=32))
    n_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    saved = sum(each.saved_bytes for each in model.hfopt.quantized)
    assert n_bytes + saved == sum(tensor.nbytes for tensor in llama().state_dict().values())


# ---- what is done to models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_copies_and_files_have_the_same_bits(name: str) -> None:
    model = hfopt.optimize(llama(), quantization=FORMATS[name])
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)

    other = llama()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    hfopt.optimize(other, quantization=FORMATS[name])
    assert not torch.equal(logits(other), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)


def test_the_same_with_empty_weights() -> None:
    model = hfopt.optimize(llama(), quantization=NF4(group=32))
    other = llama()
    for name, linear in quantized_linears(model).items():
        empty_linear(other.get_submodule(name), linear.format)
    assert other.lm_head.weight.is_meta
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(logits(hfopt.optimize(other)), logits(model))


def test_a_conversion_leaves_packed_weights_as_they_are() -> None:
    stock = llama()
    model = hfopt.optimize(copy.deepcopy(stock), quantization=Int4(group=32, symmetric=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "quantized_" in name}
    for convert in (
        lambda: model.to(torch.bfloat16),
        lambda: model.half(),
        lambda: hfopt.optimize(model, dtype=torch.bfloat16),
    ):
        convert()
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert model.dtype is model.lm_head.weight.dtype is torch.bfloat16
    expected = hfopt.optimize(stock, dtype=torch.bfloat16, quantization=Int4(group=32, symmetric=False))
    assert difference(logits(model), logits(expected)) < 0.2  # quantised from other roundings


@pytest.mark.parametrize("part", ["scales", "row_scales"])
def test_scales_that_are_not_finite_are_not_loaded(part: str) -> None:
    model = hfopt.optimize(llama(), quantization=Int4(group=32))
    before = logits(model)
    name = f"model.layers.1.mlp.up_proj.quantized_{part}"
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for value in (float("nan"), float("inf")):
        state[name].view(-1)[5] = value
        with pytest.raises(RuntimeError, match=f"{name} holds NaN or Inf"):
            model.load_state_dict(state)
        assert torch.equal(logits(model), before)


def test_tensors_that_lie_anywhere_are_loaded() -> None:
    """assign=True takes them where they are, out of a file that was read for example."""
    model, other = (hfopt.optimize(llama(), quantization="int8") for _ in range(2))
    state = {
        name: torch.cat([tensor.new_zeros(1), tensor.view(-1)])[1:].view(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    other.load_state_dict(state, assign=True)
    assert all(linear.packed.codes.data_ptr() % 64 == 0 for linear in quantized_linears(other).values())
    assert torch.equal(logits(other), logits(model))


def test_questions_of_transformers() -> None:
    model = hfopt.optimize(llama(), quantization="int8")
    assert model.dtype is torch.float32 and model.device.type == "cpu"
    assert model.num_parameters() > 0 and model.get_memory_footprint() > 0
    assert model.lm_head.weight.shape == (211, 64)
    model.resize_token_embeddings(220)
    assert model(**prompts()).logits.shape[-1] == 220


def test_other_inputs_take_dequantised_weights() -> None:
    linear = nn.Linear(64, 24).eval()
    quantize_linear(linear, Int8(compute="float").pack(linear.weight))
    x = torch.randn(3, 64, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(3, 64))
    half = x.detach().double()
    assert linear.double()(half).dtype is torch.float64
    assert [name for name in BUFFERS if name in dict(linear.named_buffers())] == [
        "quantized_codes",
        "quantized_row_scales",
    ]


def test_a_matrix_of_another_shape_is_refused() -> None:
    with pytest.raises(InvalidInput, match="24 × 64 is needed"):
        quantize_linear(nn.Linear(64, 24), Int8().pack(torch.randn(24, 32)))


def test_hooks_and_adapters_are_called() -> None:
    model = hfopt.optimize(llama(), quantization="int8")
    before, seen = logits(model), []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    assert difference(logits(model), before) < 0.05 and seen
    handle.remove()
    assert torch.equal(logits(model), before)
    inner = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = Doubled(inner).eval()
    assert difference(logits(model), before) > 0.05
    model.model.layers[1].mlp.up_proj = inner
    assert torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model = hfopt.optimize(llama(), quantization="int8")
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    adapted.eval()
    assert difference(logits(adapted), before) < 0.05
    adapted.train()
    adapted(**prompts(), labels=prompts()["input_ids"]).loss.backward()
    grads = [each.grad for name, each in adapted.named_parameters() if "lora_B" in name]
    assert grads and all(grad is not None and bool(grad.any()) for grad in grads)

    fresh = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=4)).eval()
    hfopt.optimize(fresh, quantization="int8")
    assert not any("lora" in name for name in quantized_linears(fresh))
    assert any("base_layer" in name for name in quantized_linears(fresh))
