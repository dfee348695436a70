"""hfopt.load: floats, weights that are quantised while they are read, and checkpoints of other tools."""

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

import hfopt
import hfopt.checkpoints.hf_quantizer
from hfopt.errors import CorruptCheckpoint, HfoptError, InvalidInput, UnsupportedModel
from hfopt.modules.quantized import QuantizedLinear
from hfopt.quantization import NF4, Int4, Int8, QuantizationConfig
from tests import fresh
from tests.checkpoint_cases import Known, awq, compressed, gptq
from tests.generation_cases import FAMILIES, Model, llama
from tests.pairs import pairs_of
from tests.reference import DTYPES

QUANTIZATIONS: dict[str, Any] = {
    "int8": "int8",
    "int4": QuantizationConfig(Int4(group=32), head="body", skip=("*.0.*",)),
    "nf4": QuantizationConfig(NF4(group=32), head=None),
}


def logits(model: Model) -> Tensor:
    input_ids = torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids, attention_mask=torch.ones_like(input_ids)).logits


def same_tensors(one: Model, other: Model) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def change_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path)
    return tmp_path


# ---- floats, and weights that are quantised while they are read ------------------------------------------------


@pytest.mark.parametrize(("family", "tied", "shard"), pairs_of(FAMILIES, [True, False], ["1GB", "40KB"]))
def test_floats(tmp_path, family, tied, shard):
    model = FAMILIES[family](tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard == "40KB"
    loaded = hfopt.load(tmp_path)
    assert same_tensors(loaded, model)
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [name for name, _ in loaded.named_buffers()] == [name for name, _ in stock.named_buffers()]
    for (_, buffer), (_, other) in zip(loaded.named_buffers(), stock.named_buffers(), strict=True):
        assert torch.equal(buffer, other)
    torch.testing.assert_close(logits(loaded), logits(stock), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "tied", "quantization", "shard"),
    pairs_of(FAMILIES, [True, False], QUANTIZATIONS, ["1GB", "40KB"]),
)
def test_quantised_while_it_is_read(tmp_path, family, tied, quantization, shard):
    model = FAMILIES[family](tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "float", max_shard_size=shard)
    expected = hfopt.optimize(model, quantization=QUANTIZATIONS[quantization])
    loaded = hfopt.load(tmp_path / "float", quantization=QUANTIZATIONS[quantization])
    assert same_tensors(loaded, expected)
    assert torch.equal(logits(loaded), logits(expected))

    hfopt.save(loaded, tmp_path / "packed", max_shard_size=shard)
    again: Model = hfopt.load(tmp_path / "packed")
    assert same_tensors(again, expected)
    assert torch.equal(logits(again), logits(expected))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 2, "do_sample": False}
    input_ids = torch.randint(3, 200, (2, 7))
    assert torch.equal(again.generate(input_ids, **options), expected.generate(input_ids, **options))


@pytest.mark.parametrize("stored", [*DTYPES, torch.float64], ids=str)
def test_dtypes(tmp_path, stored, caplog):
    model = llama(dtype=stored).to(stored)
    model.save_pretrained(tmp_path)
    loaded = hfopt.load(tmp_path)
    assert loaded.dtype == (stored if stored in DTYPES else torch.bfloat16)
    assert ("becomes bfloat16" in caplog.text) == (stored not in DTYPES)
    for dtype in DTYPES:
        loaded = hfopt.load(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert same_tensors(loaded, copy.deepcopy(model).to(dtype))
    assert hfopt.load(tmp_path, dtype="float16").dtype is torch.float16
    assert hfopt.load(tmp_path, dtype="auto").dtype == (stored if stored in DTYPES else torch.bfloat16)
    wrong: Any
    for wrong in (torch.float64, "float64", 16):
        with pytest.raises(InvalidInput, match="dtype = "):
            hfopt.load(tmp_path, dtype=wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_class_keeps_in_float32(folder, monkeypatch, dtype):
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["lm_head"])
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm", "up_proj"])
    stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loaded = hfopt.load(folder, dtype=dtype)
    dtypes = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    assert dtypes == {name: tensor.dtype for name, tensor in stock.state_dict().items()}
    assert dtypes["model.layers.1.input_layernorm.weight"] is torch.float32
    assert dtypes["lm_head.weight"] is (torch.float32 if dtype is torch.float16 else dtype)
    assert same_tensors(loaded, stock)


def test_float16_weights_are_quantised_before_they_are_rounded(tmp_path):
    model = llama().to(torch.float16)
    model.save_pretrained(tmp_path)
    loaded = hfopt.load(tmp_path, quantization="int8")
    packed = Int8().pack(model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.quantized_codes, packed.codes)


def test_float64_weights_are_quantised(folder):
    expected = hfopt.load(folder, quantization="int8")
    change_weights(folder, lambda tensors: tensors.update({k: v.double() for k, v in tensors.items()}))
    assert same_tensors(hfopt.load(folder, quantization="int8"), expected)


def test_generation_config(folder):
    GenerationConfig(max_new_tokens=3, min_new_tokens=3, do_sample=False).save_pretrained(folder)
    model: Model = hfopt.load(folder)
    assert model.generate(torch.ones(1, 4, dtype=torch.long)).shape == (1, 7)
    (folder / "generation_config.json").unlink()
    assert hfopt.load(folder).generation_config.max_new_tokens is None


def test_names_with_and_without_the_prefix_of_the_base_model(folder):
    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    expected = hfopt.load(folder, quantization="int8")
    change_weights(folder, strip)
    assert same_tensors(hfopt.load(folder, quantization="int8"), expected)


def test_a_tied_head_of_its_own_weights_is_believed(tmp_path):
    model = llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    assert same_tensors(hfopt.load(tmp_path), model)
    change_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    tied = hfopt.load(tmp_path)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_what_cannot_be_quantised_stays_with_a_reason(tmp_path):
    model = llama(intermediate_size=80)
    model.save_pretrained(tmp_path)
    config = QuantizationConfig(Int4(group=32), skip=("*.0.mlp.up_proj",))
    expected = hfopt.optimize(model, quantization=config)
    loaded = hfopt.load(tmp_path, quantization=config)
    assert same_tensors(loaded, expected)
    left = hfopt.explain(loaded).left
    assert left == hfopt.explain(expected).left
    assert left["model.layers.1.mlp.down_proj"] == "groups of 32 do not divide its 80 inputs"
    assert left.keys() == {f"model.layers.{name}" for name in (
        "0.mlp.up_proj", "0.mlp.down_proj", "1.mlp.down_proj")}  # fmt: skip
    hfopt.save(loaded, tmp_path / "packed")
    assert same_tensors(hfopt.load(tmp_path / "packed"), expected)


def test_patterns_that_name_nothing_are_told(folder, caplog):
    config = QuantizationConfig(Int8(), skip=("*.up_proj", "*.upproj"))
    model = hfopt.load(folder, quantization=config)
    assert [each.getMessage() for each in caplog.records] == [
        "skip: '*.upproj' names no linear layer of the model"
    ]
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad
    hfopt.optimize(llama(), quantization=config)
    assert len(caplog.records) == 2


def test_large_matrices_are_quantised_in_slices(folder, monkeypatch):
    import hfopt.checkpoints.fill

    expected = hfopt.load(folder, quantization=Int4(group=32, symmetric=False))
    monkeypatch.setattr(hfopt.checkpoints.fill, "SLICE", 1 << 12)
    assert same_tensors(hfopt.load(folder, quantization=Int4(group=32, symmetric=False)), expected)
    half = hfopt.load(folder, dtype=torch.bfloat16)
    assert torch.equal(half.lm_head.weight, hfopt.load(folder).lm_head.weight.bfloat16())


# ---- checkpoints of other tools --------------------------------------------------------------------------------


def write_foreign(folder: Path, write: Any, bits: int, group: int, **options: Any) -> Model:
    """A folder whose Linears in layers are quantised by `write`; returns the float model that it stands for."""
    model = llama(hidden_size=128, intermediate_size=256)
    tensors: dict[str, Tensor] = {}
    scatter = options.pop("scatter", False)
    for seed, (path, linear) in enumerate(model.model.layers.named_modules()):
        if not isinstance(linear, torch.nn.Linear):
            continue
        known = Known(bits, group, linear.out_features, linear.in_features, seed=seed, scatter=scatter)
        known.scales = (known.scales / 2**bits).astype("float16")
        parts, config = write(known, **options)
        tensors |= {f"model.layers.{path}.{name}": tensor for name, tensor in parts.items()}
        if write is gptq:
            tensors[f"model.layers.{path}.bias"] = torch.zeros(linear.out_features)
        middle = 2 ** (bits - 1) if write is compressed else None
        scales = parts["weight_scale"].float().numpy() if write is compressed else None
        linear.weight.data = known.dequantised(middle, scales)
    kept = {name: tensor for name, tensor in model.state_dict().items() if "_proj" not in name}
    kept.pop("lm_head.weight" if model.config.tie_word_embeddings else "", None)
    model.config.save_pretrained(folder)
    change_config(folder, quantization_config=config)
    save_file({name: t.clone() for name, t in (tensors | kept).items()}, folder / "model.safetensors")
    return model


@pytest.mark.parametrize(
    ("write", "bits", "group", "options"),
    [
        (gptq, 4, 128, {}),
        (gptq, 4, 32, {"desc_act": True, "scatter": True}),
        (gptq, 8, 64, {"checkpoint_format": "gptq_v2"}),
        (awq, 4, 64, {}),
        (compressed, 8, -1, {}),
        (compressed, 4, 128, {"packed": True}),
    ],
)
def test_checkpoints_of_other_tools(tmp_path, write, bits, group, options):
    float_model = write_foreign(tmp_path / "foreign", write, bits, group, **options)
    loaded = hfopt.load(tmp_path / "foreign")
    for path, linear in float_model.model.layers.named_modules():
        if isinstance(linear, torch.nn.Linear):
            packed = loaded.model.layers.get_submodule(path)
            assert isinstance(packed, QuantizedLinear)
            assert torch.equal(packed.weight, linear.weight)
    assert not isinstance(loaded.lm_head, QuantizedLinear)
    expected = logits(float_model)
    assert (logits(loaded) - expected).norm() < 0.05 * expected.norm()
    half: Model = hfopt.load(tmp_path / "foreign", dtype=torch.float16)
    assert half.dtype is torch.float16 and not hfopt.explain(half).idle
    assert torch.equal(
        half.model.layers[1].mlp.up_proj.quantized_codes, loaded.model.layers[1].mlp.up_proj.quantized_codes
    )
    assert (logits(half) - expected).norm() < 0.05 * expected.norm()

    hfopt.save(loaded, tmp_path / "own")
    again = hfopt.load(tmp_path / "own")
    assert same_tensors(again, loaded)
    assert torch.equal(logits(again), logits(loaded))
    with_head = hfopt.load(tmp_path / "foreign", quantization="int8")
    assert with_head.lm_head.format == Int8()
    assert torch.equal(
        with_head.model.layers[0].mlp.up_proj.weight, float_model.model.layers[0].mlp.up_proj.weight
    )


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_from_pretrained_of_transformers_4_is_refused(folder, monkeypatch):
    monkeypatch.setattr(hfopt.checkpoints.hf_quantizer, "ConversionOps", object)
    with pytest.raises(UnsupportedModel, match=r"from_pretrained of transformers 4 .* hfopt.load reads"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=hfopt.HfoptConfig())


def test_arguments(folder):
    with pytest.raises(InvalidInput, match=r"no arguments \['stricht'\]"):
        hfopt.load(folder, stricht=True)
    with pytest.raises(InvalidInput, match="'int5' is not known"):
        hfopt.load(folder, quantization="int5")
    with pytest.raises(
        InvalidInput, match=r"Int4.* fits no layer .*q_proj: groups of 128 do not divide its 64"
    ):
        hfopt.load(folder, quantization="int4")
    with pytest.raises(InvalidInput, match="path_or_id='no/model' is neither a folder nor an id"):
        hfopt.load("no/model")
    wrong: Any
    for wrong in (None, 3, b"model"):
        with pytest.raises(InvalidInput, match=f"path_or_id={wrong!r}: a folder or an id"):
            hfopt.load(wrong)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_attention_heads": 0}, HfoptError, "ZeroDivisionError"),
        ({"hidden_size": "large"}, HfoptError, "TypeError"),
        ({"hidden_act": "no"}, UnsupportedModel, "no causal language model of transformers .*'no'"),
        ({"dtype": "no"}, HfoptError, "config.json cannot be used .*'no'"),
        ({"quantization_config": [1]}, CorruptCheckpoint, "config.json cannot be used .*list"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, UnsupportedModel, r"quant_method=\['gptq'\]"),
        ({"quantization_config": {"quant_method": "hfopt", "modules": 3}}, CorruptCheckpoint, "modules=3"),
        ({"quantization_config": {"quant_method": "hfopt", "ordered": 3}}, CorruptCheckpoint, "ordered=3"),
        (
            {"quantization_config": {"quant_method": "hfopt", "body": {"format": "int3"}}},
            CorruptCheckpoint,
            "quantization_config of its config.json .*'int3' is not known",
        ),
    ],
    ids=str,
)
def test_configurations_that_make_no_sense(folder, fields, error, message):
    change_config(folder, **fields)
    with pytest.raises(error, match=f"{folder}.*{message}"):
        hfopt.load(folder)


def test_threads_that_load_at_once(folder):
    """Making a model empty changes how modules take parameters, and the default dtype, for all threads."""
    dtypes = [torch.float32, torch.bfloat16] * 4
    with ThreadPoolExecutor(len(dtypes)) as pool:
        models = list(pool.map(lambda dtype: hfopt.load(folder, dtype=dtype, quantization="int8"), dtypes))
    assert [model.dtype for model in models] == dtypes
    assert all(same_tensors(model, models[index % 2]) for index, model in enumerate(models))
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.get_default_dtype() is torch.float32


def test_other_files_than_safetensors(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"pytorch_model.bin: hfopt reads safetensors only"):
        hfopt.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(
        CorruptCheckpoint, match=r"neither model.safetensors nor model.safetensors.index.json"
    ):
        hfopt.load(folder)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_files_that_are_cut_short(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CorruptCheckpoint, match=r"model.safetensors is cut short or damaged"):
        hfopt.load(folder)


def test_shards(tmp_path):
    whole = tmp_path / "whole"
    llama().save_pretrained(whole, max_shard_size="40KB")
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    first, last = index["weight_map"]["lm_head.weight"], index["weight_map"]["model.norm.weight"]

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    folder = damaged("lost")
    (folder / last).unlink()
    with pytest.raises(CorruptCheckpoint, match=f"lacks {last}"):
        hfopt.load(folder)
    folder = damaged("cut")
    (folder / last).write_bytes((folder / last).read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=f"{last} is cut short"):
        hfopt.load(folder)
    folder = damaged("exchanged")
    shutil.copy(folder / first, folder / last)
    with pytest.raises(CorruptCheckpoint, match="twice"):
        hfopt.load(folder)
    for name, text, message in (
        ("no-json", "{", "is no index"),
        ("no-map", "{}", "is no index"),
        ("empty", '{"weight_map": {}}', "is dict, or empty"),
        ("outside", '{"weight_map": {"a": "../a.safetensors"}}', "no file of the folder"),
        ("other", json.dumps({"weight_map": index["weight_map"] | {"x": first}}), "'x' is in"),
    ):
        folder = damaged(name)
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CorruptCheckpoint, match=message):
            hfopt.load(folder)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_tensors_that_contradict_the_configuration(folder, quantization):
    whole = (folder / "model.safetensors").read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"
    changes: dict[str, Any] = {
        f"lacks 1 tensors, '{name}'": lambda t: t.pop(name),
        r"holds 1 tensors .* 'model.extra'": lambda t: t.update({"model.extra": torch.ones(2)}),
        r"holds 1 tensors .* 'model.layers.1.mlp.up_proj.bias'": lambda t: t.update(
            {name.replace("weight", "bias"): torch.ones(96)}
        ),
        r"holds 1 tensors .* 'model.layers.1.mlp.up_proj.qweight'": lambda t: t.update(
            {name.replace("weight", "qweight"): torch.ones(96)}
        ),
        rf"'{name}' is F32 \[95, 64\], where .* \[96, 64\]": lambda t: t.update({name: t[name][1:].clone()}),
        rf"'{name}' is I32 \[96, 64\]": lambda t: t.update({name: t[name].int()}),
    }
    for message, change in changes.items():
        (folder / "model.safetensors").write_bytes(whole)
        change_weights(folder, change)
        with pytest.raises(CorruptCheckpoint, match=message):
            hfopt.load(folder, quantization=quantization)
    (folder / "model.safetensors").write_bytes(whole)
    change_config(folder, hidden_size=32)
    with pytest.raises(CorruptCheckpoint, match=r"where the model of its config.json has"):
        hfopt.load(folder, quantization=quantization)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder, name, value, quantization):
    change_weights(folder, lambda tensors: tensors[name].view(-1)[1:2].fill_(value))
    with pytest.raises(
        CorruptCheckpoint, match=rf"{name.removesuffix('.weight')}.*(NaN or Inf|must be finite)"
    ):
        hfopt.load(folder, quantization=quantization)


def test_configurations_that_cannot_be_used(folder):
    change_config(folder, quantization_config={"quant_method": "aqlm"})
    with pytest.raises(UnsupportedModel, match="quant_method='aqlm'"):
        hfopt.load(folder)
    change_config(folder, quantization_config=None, model_type="unheard-of")
    with pytest.raises(CorruptCheckpoint, match=r"config.json cannot be used"):
        hfopt.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"config.json cannot be used"):
        hfopt.load(folder)


def test_saved_folders_that_were_damaged(tmp_path):
    hfopt.save(hfopt.optimize(llama(), quantization=Int8(group=32)), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    path = "model.layers.1.mlp.up_proj.quantized_"
    changes: dict[str, Any] = {
        "consists of": lambda t: t.pop(path + "scales"),
        r"quantized_codes' is U8 \[5, 16, 64\]": lambda t: t.update(
            {path + "codes": t[path + "codes"][1:].clone()}
        ),
        "holds NaN or Inf": lambda t: t[path + "scales"].view(-1)[:1].fill_(float("nan")),
        "row_scales' holds NaN or Inf": lambda t: t[path + "row_scales"].view(-1)[:1].fill_(float("inf")),
    }
    for message, change in changes.items():
        (tmp_path / "model.safetensors").write_bytes(whole)
        change_weights(tmp_path, change)
        with pytest.raises(CorruptCheckpoint, match=message):
            hfopt.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    change_config(tmp_path, hidden_size=80)
    with pytest.raises(CorruptCheckpoint, match=r"q_proj is in Int8.* groups of 32 do not divide its 80"):
        hfopt.load(tmp_path)
    change_config(tmp_path, hidden_size=64)
    config = json.loads((tmp_path / "config.json").read_text())
    change_config(tmp_path, quantization_config={**config["quantization_config"], "skip": ["*.up_proj"]})
    with pytest.raises(CorruptCheckpoint, match="up_proj is quantised, and its config"):
        hfopt.load(tmp_path)
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptCheckpoint, match="no place for"):
        hfopt.load(tmp_path)


# ---- memory -----------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, torch, hfopt
from hfopt import calibration
from hfopt.machine import env
from hfopt.quantization import format
calibration._BUDGET, format.FEEDBACK_SLICE = 1 << 24, 1 << 20
options = json.loads(sys.argv[3])
hfopt.load(sys.argv[1], **options)  # imports, and kernels
before = env.resident_memory()
env.reset_peak_memory()
model = hfopt.load(sys.argv[2], **options)
size = sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
print(json.dumps([size, env.peak_memory() - before]))
"""


def measured(small: Path, folder: Path, **options: Any) -> tuple[int, int]:
    """(bytes of the model, growth of this process at the peak) of loading in a process of its own."""
    size, growth = json.loads(fresh.run(MEASURE, str(small), str(folder), json.dumps(options)))
    return size, growth


def test_memory_at_the_peak(tmp_path):
    """The file is twice as large as the result, and what is above that does not grow with it.

    Pages of the file are let go of slice by slice (16 MB), a slice is packed into memory of its own first, and the
    allocator keeps what temporaries of such sizes have freed: together 40 to 90 MB were measured, and how much is kept
    varies.
    """
    small = llama(dtype=torch.bfloat16).to(torch.bfloat16)
    small.save_pretrained(tmp_path / "small")
    sizes = {"num_hidden_layers": 14, "hidden_size": 1024, "intermediate_size": 4096}
    config = LlamaConfig(**{**small.config.to_dict(), **sizes})
    with torch.device("meta"):
        large: Any = LlamaForCausalLM(config)
    large.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in large.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    large.save_pretrained(tmp_path / "float", max_shard_size="100MB")
    file_size = sum(file.stat().st_size for file in (tmp_path / "float").glob("*.safetensors"))
    size, growth = measured(tmp_path / "small", tmp_path / "float", quantization="int8")
    assert growth < size + (160 << 20) < file_size


@pytest.mark.slow
def test_memory_at_the_peak_of_calibration(tmp_path):
    """Above the result by the products of inputs and the slices of a weight that are in memory at a time, few here.

    With what temporaries leave in the allocator, 90 to 170 MB were measured, whatever the number of layers.
    """
    sizes = {"num_hidden_layers": 6, "hidden_size": 1024, "intermediate_size": 4096}
    llama().save_pretrained(tmp_path / "small")
    llama(**sizes).save_pretrained(tmp_path / "float")
    options = {"quantization": "int8", "calibration": [[1, 2, 3] * 100]}
    size, growth = measured(tmp_path / "small", tmp_path / "float", **options)
    assert growth < size + (3 << 26) < (tmp_path / "float/model.safetensors").stat().st_size
