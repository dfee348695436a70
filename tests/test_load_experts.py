"""hfopt.load of models whose experts transformers keeps in one tensor, and checkpoints in one each."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import hfopt
from hfopt.errors import CorruptCheckpoint, UnsupportedModel
from hfopt.quantization import Int8
from tests.generation_cases import VOCABULARY, Model
from tests.test_load import change_config, change_weights, logits, same_tensors

pytest.importorskip("transformers.core_model_loading")

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
# the tenth expert is behind the second
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 12},
    "qwen2_moe": {"num_experts": 12, "shared_expert_intermediate_size": 64},
    # keeps a bias in float32
    "dots1": {"n_routed_experts": 12, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}  # fmt: skip


def stock(family: str) -> Model:
    torch.manual_seed(7)
    config = CONFIG_MAPPING[family](**SIZES, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stock("mixtral").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_put_together(tmp_path: Path, family: str, shard: str, dtype: torch.dtype) -> None:
    stock(family).save_pretrained(tmp_path, max_shard_size=shard)
    expected: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    loaded = hfopt.load(tmp_path, dtype=dtype)
    assert same_tensors(loaded, expected)
    dtypes = [tensor.dtype for tensor in loaded.state_dict().values()]
    assert dtypes == [tensor.dtype for tensor in expected.state_dict().values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_experts_is_quantised(tmp_path: Path, family: str) -> None:
    model = stock(family)
    model.save_pretrained(tmp_path / "float")
    expected = hfopt.optimize(model, quantization=Int8(group=32))
    loaded: Any = hfopt.load(tmp_path / "float", quantization=Int8(group=32))
    assert same_tensors(loaded, expected)
    assert hfopt.explain(loaded).left == hfopt.explain(expected).left
    hfopt.save(loaded, tmp_path / "packed")
    again = hfopt.load(tmp_path / "packed")
    assert same_tensors(again, expected)
    assert torch.equal(logits(again), logits(loaded))
    assert same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), expected)


def test_experts_that_are_together_already(tmp_path: Path) -> None:
    model = stock("mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert same_tensors(hfopt.load(tmp_path), model)


NAME = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop(NAME), r"gate_up_proj' is F32 \[11, 192, 64\], where"),
        (lambda tensors: tensors.update({NAME: tensors[NAME][1:].clone()}), "gate_up_proj is made of tensors that"),
        (lambda tensors: tensors[NAME].view(-1)[5:6].fill_(float("nan")), f"{NAME}' holds NaN or Inf"),
    ],
    ids=["lost", "short", "nan"],
)  # fmt: skip
def test_damaged_experts(folder: Path, change: Any, match: str) -> None:
    change_weights(folder, change)
    with pytest.raises(CorruptCheckpoint, match=match):
        hfopt.load(folder)


def test_quantised_experts_of_other_tools(folder: Path) -> None:
    def quantise(tensors: dict[str, Tensor]) -> None:
        tensors[NAME.replace("weight", "qweight")] = tensors.pop(NAME).int()

    change_weights(folder, quantise)
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(UnsupportedModel, match="quantised expert"):
        hfopt.load(folder)


def test_conversions_of_other_kinds(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["hrm_text"](**SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "hrm_text"
    with pytest.raises(UnsupportedModel, match=r"by \[Chunk.*load the model by from_pretrained"):
        hfopt.load(tmp_path)
