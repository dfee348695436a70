"""Quantised models in transformers' own files: save_pretrained and from_pretrained."""

import copy
import json
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import hfopt
from hfopt import HfoptConfig
from hfopt.errors import CorruptCheckpoint, InvalidInput, UnsupportedDevice
from hfopt.modules.quantized import QuantizedLinear
from hfopt.quantization import NF4, Int4, Int8, QuantizationConfig
from tests.generation_cases import FAMILIES, Model, llama
from tests.pairs import pairs_of
from tests.reference import DTYPES
from tests.test_load import change_weights

CONFIGS = {
    "int8": QuantizationConfig(Int8()),
    "int4": QuantizationConfig(Int4(group=32, symmetric=False), head="body"),
    "nf4": QuantizationConfig(NF4(group=32, compute="float"), head=None, skip=("*.1.*",)),
}


def from_pretrained(*args: Any, **kwargs: Any) -> Model:
    """transformers' own, which refuses quantised models before its fifth release."""
    pytest.importorskip("transformers.core_model_loading")
    return AutoModelForCausalLM.from_pretrained(*args, **kwargs)


def same_tensors(one: Model, other: Model) -> bool:
    """Bit by bit, and under the same names."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def formats(model: Model) -> dict[str, Any]:
    return {
        path: module.format for path, module in model.named_modules() if isinstance(module, QuantizedLinear)
    }


@pytest.mark.parametrize(("family", "tied", "quantization"), pairs_of(FAMILIES, [True, False], CONFIGS))
def test_from_pretrained_quantises_as_optimize_does_and_reads_what_was_saved(
    tmp_path, family, tied, quantization
):
    model = FAMILIES[family](tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "float")
    config = HfoptConfig.of(CONFIGS[quantization])
    expected = hfopt.optimize(model, quantization=CONFIGS[quantization])
    loaded = from_pretrained(tmp_path / "float", quantization_config=config)
    assert same_tensors(loaded, expected)
    assert formats(loaded) == formats(expected) != {}

    loaded.save_pretrained(tmp_path / "packed")
    again = from_pretrained(tmp_path / "packed")
    assert same_tensors(again, expected)
    assert formats(again) == formats(expected)
    again.tie_weights()
    assert same_tensors(again, expected)
    input_ids = torch.randint(3, 200, (2, 7))
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, loaded(input_ids).logits)
        assert torch.equal(hfopt.optimize(again)(input_ids).logits, expected(input_ids).logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_what_is_not_quantised(tmp_path, dtype):
    llama(dtype=dtype).to(dtype).save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, quantization_config=HfoptConfig("int8"), dtype="auto")
    assert loaded.dtype is loaded.model.norm.weight.dtype is dtype
    input_ids = torch.randint(3, 200, (2, 7))
    with torch.no_grad():
        expected = hfopt.load(tmp_path, quantization="int8")(input_ids).logits
        assert torch.equal(hfopt.optimize(loaded)(input_ids).logits, expected)


def test_layers_that_a_format_does_not_fit(tmp_path, caplog):
    model = llama(intermediate_size=80)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, quantization_config=HfoptConfig(Int4(group=32)))
    assert "2 linear layers are not quantised, model.layers.0.mlp.down_proj among them" in caplog.text
    assert same_tensors(loaded, hfopt.optimize(model, quantization=Int4(group=32)))
    with pytest.raises(InvalidInput, match=r"Int4.* fits no layer"):
        from_pretrained(tmp_path, quantization_config=HfoptConfig("int4"))


def test_config_json_says_what_is_quantised(tmp_path):
    config = QuantizationConfig(Int4(group=32), head=None, skip=("*.up_proj",))
    model = hfopt.optimize(llama(), quantization=config)
    hfopt.save(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "hfopt"
    assert written["body"] == Int4(group=32).to_dict()
    assert written["head"] is None
    assert written["modules"] == {f"model.layers.{layer}.mlp.up_proj": None for layer in (0, 1)}
    assert isinstance(AutoConfig.from_pretrained(tmp_path).quantization_config, dict)
    read = HfoptConfig.from_dict(written)
    assert read.to_dict() == written


def test_files_are_aligned_so_that_weights_stay_in_their_pages(tmp_path):
    hfopt.save(hfopt.optimize(llama(), quantization="int8"), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).data_ptr() % 64 == 0 for name in file.keys())  # noqa: SIM118
    loaded = from_pretrained(tmp_path)
    starts_and_ends = [
        [int(number, 16) for number in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(tmp_path) in line
    ]
    codes = loaded.model.layers[0].mlp.up_proj.quantized_codes
    assert any(start <= codes.data_ptr() < end for start, end in starts_and_ends)


def test_weights_that_files_hold_unaligned_are_copied(tmp_path):
    """A tensor of an odd size pushes everything behind it off."""
    model = hfopt.optimize(llama(dtype=torch.bfloat16), quantization="int8")
    model.model.norm.register_buffer("odd", torch.zeros(3, dtype=torch.bfloat16))
    hfopt.save(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        name = "model.layers.0.mlp.up_proj.quantized_codes"
        assert file.get_tensor(name).data_ptr() % 64
    loaded = from_pretrained(tmp_path)
    assert all(buffer.data_ptr() % 64 == 0 for _, buffer in loaded.model.layers.named_buffers())


def test_header_ends_on_a_boundary_whatever_the_names(tmp_path):
    sizes = set()
    for size in (96, 100, 1000, 1001, 10000):
        hfopt.save(hfopt.optimize(llama(intermediate_size=size), quantization="int8"), tmp_path)
        first_8_bytes = (tmp_path / "model.safetensors").read_bytes()[:8]
        sizes.add(8 + int.from_bytes(first_8_bytes, "little"))
    assert all(size % 64 == 0 for size in sizes)


def test_copies_and_pickles_can_be_saved(tmp_path):
    hfopt.save(hfopt.optimize(llama(), quantization="int8"), tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    for number, twin in enumerate((copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)))):
        twin.save_pretrained(tmp_path / str(number))
        assert same_tensors(from_pretrained(tmp_path / str(number)), loaded)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_of_what_optimize_quantised_and_restore_brought_back(tmp_path, family):
    model = FAMILIES[family]()
    hfopt.optimize(model, quantization="int8", keep_original=True)
    model.save_pretrained(tmp_path / "packed")
    assert same_tensors(from_pretrained(tmp_path / "packed"), model)
    hfopt.restore(model).save_pretrained(tmp_path / "float")
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    assert same_tensors(from_pretrained(tmp_path / "float"), model)


def test_a_model_without_quantised_layers_is_saved_as_ever(tmp_path):
    hfopt.save(hfopt.optimize(llama()), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(InvalidInput, match="model is a Linear"):
        hfopt.save(torch.nn.Linear(1, 1), tmp_path)  # type: ignore[arg-type]
    wrong: Any
    for wrong in (None, tmp_path / "config.json"):
        with pytest.raises(InvalidInput, match=r"folder=.* is no folder"):
            hfopt.save(llama(), wrong)


def test_a_file_that_an_earlier_model_left_is_not_taken_for_this_one(tmp_path):
    model = hfopt.optimize(llama(), quantization="int8")
    for size in ("1GB", "50KB", "1GB"):
        hfopt.save(model, tmp_path, max_shard_size=size)
        assert same_tensors(hfopt.load(tmp_path), model)


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}])
def test_device_map(tmp_path, device_map):
    llama().save_pretrained(tmp_path)
    loaded = from_pretrained(
        tmp_path, quantization_config=HfoptConfig(), device_map=device_map, dtype=torch.bfloat16
    )
    assert loaded.dtype == torch.bfloat16
    assert set(formats(loaded).values()) == {Int8()}


def test_refusals(tmp_path):
    llama().save_pretrained(tmp_path)
    for device_map in ("cuda", {"model": "cpu", "lm_head": "disk"}):
        with pytest.raises(UnsupportedDevice, match="device_map"):
            from_pretrained(tmp_path, quantization_config=HfoptConfig(), device_map=device_map)
    with pytest.raises(InvalidInput, match="'int5' is not known"):
        HfoptConfig("int5")
    with pytest.raises(InvalidInput, match="no options"):
        HfoptConfig("int8", heads=None)
    with pytest.raises(InvalidInput, match="quant_method='gptq'"):
        HfoptConfig("int8", quant_method="gptq")


UP = "model.layers.1.mlp.up_proj."


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [UP + "weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_finite(tmp_path, name, value):
    llama().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors[name].view(-1)[1:2].fill_(value))
    with pytest.raises(CorruptCheckpoint, match=rf"tensor '{name}'.*(NaN or Inf|must be finite; row 0)"):
        from_pretrained(tmp_path, quantization_config=HfoptConfig())


def test_weights_of_another_size(tmp_path):
    llama().save_pretrained(tmp_path)
    change_weights(
        tmp_path, lambda tensors: tensors.update({UP + "weight": tensors[UP + "weight"][1:].clone()})
    )
    with pytest.raises(CorruptCheckpoint, match=rf"'{UP}weight': packed is 95 × 64"):
        from_pretrained(tmp_path, quantization_config=HfoptConfig())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop(UP + "quantized_codes"), r"up_proj in Int8.* consists of .*quantized_codes"),
        (lambda tensors: tensors.update({UP + "quantized_codes": tensors[UP + "quantized_codes"][1:].clone()}),
         rf"'{UP}quantized_codes' is U8 \[5, 16, 64\]"),
        (lambda tensors: tensors[UP + "quantized_scales"].view(-1)[:1].fill_(float("nan")),
         rf"'{UP}quantized_scales' holds NaN"),
        (lambda tensors: tensors["model.norm.weight"][:1].fill_(float("nan")), r"'model.norm.weight' holds NaN"),
    ],
    ids=["lost", "short", "nan", "nan in floats"],
)  # fmt: skip
def test_saved_folders_that_were_damaged(tmp_path, change, match):
    """transformers would fill up what is missing."""
    hfopt.save(hfopt.optimize(llama(), quantization=Int8(group=32)), tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(CorruptCheckpoint, match=match):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("is_packed", [False, True])
def test_shards_that_are_cut_short_or_lost(tmp_path, is_packed):
    model = hfopt.optimize(llama(), quantization="int8") if is_packed else llama()
    options = {} if is_packed else {"quantization_config": HfoptConfig()}
    hfopt.save(model, tmp_path, max_shard_size="50KB")
    shard = max(tmp_path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=f"{shard.name} is cut short or damaged"):
        from_pretrained(tmp_path, **options)
    shard.unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{shard.name} is cut short or damaged .*No such file"):
        from_pretrained(tmp_path, **options)


def test_header_alignment_is_that_of_the_widest_elements_first(tmp_path):
    """The order that `padding` counts on."""
    hfopt.save(hfopt.optimize(llama(dtype=torch.bfloat16), quantization=Int4(group=32)), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        sizes = [file.get_tensor(name).element_size() for name in file.offset_keys()]
    assert all(one >= other for one, other in pairwise(sizes))
