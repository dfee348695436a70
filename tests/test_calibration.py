"""Quantising with regard to what the inputs of layers are on given texts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfopt
from hfopt import calibration as calibration_module
from hfopt.bench.accuracy_sums import Sums
from hfopt.calibration import Calibrator
from hfopt.errors import InvalidInput
from hfopt.modules.quantized import QuantizedLinear
from hfopt.quantization import InputStatistics, Int4, Int8, QuantizationConfig, block_inputs
from tests.generation_cases import FAMILIES, Model, llama, one_thread

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

INT4 = Int4(group=32)
# in the manner of what the embedded model was trained on, and not in heldout.txt
TEXTS = [
    "Return the number of items in the list, or raise ValueError if it is empty.",
    "Read at most n characters from the stream.\n\nRead from the underlying buffer until there are n characters.",
    "Create a new file object. The mode can be 'r', 'w' or 'a' for reading, writing or appending.",
    "Split the string at the first occurrence of the separator, and return a tuple of three strings.",
    "Test whether a path is a symbolic link. Always returns False on systems that do not support them.",
    "A context manager that changes the working directory, and returns to the old one at the end.",
    "Return a copy of the dictionary with all keys in lower case; values are not copied.",
    "Parse the arguments of the command line. If args is None, they are taken from sys.argv.",
]


def tokens(n_tokens: int, vocabulary: int = 211, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (n_tokens,), generator=torch.Generator().manual_seed(seed))


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}


def quantized_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "quantized_" in name}


def everything(calibrator: Calibrator, linears: dict[str, nn.Module]) -> list[dict[str, Any]]:
    return list(calibrator.measure(linears))


# ---- what is measured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_optimized", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_inputs(family: str, is_optimized: bool) -> None:
    model = FAMILIES[family]()
    texts = [tokens(40), tokens(9, seed=1)]
    seen: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        return lambda module, args: seen.setdefault(name, []).append(args[0].double().flatten(0, -2))

    stock = copy.deepcopy(model).double()
    for name, linear in linears_of(stock).items():
        linear.register_forward_pre_hook(note(name))
    with torch.no_grad():
        for text in texts:
            stock(text[None])

    if is_optimized:
        hfopt.optimize(model)
    (found,) = everything(Calibrator(model, texts), linears_of(model))
    assert found.keys() == seen.keys()
    for name, inputs in seen.items():
        x = torch.cat(inputs)
        assert len(x) == 49
        block = block_inputs(x.shape[1])
        blocks = x.view(49, -1, block).transpose(0, 1)
        expected = InputStatistics.of(blocks.mT @ blocks, 49)
        torch.testing.assert_close(
            found[name].mean_squares.double(), expected.mean_squares, rtol=1e-3, atol=0
        )
        torch.testing.assert_close(found[name].factor.double(), expected.factor, rtol=1e-2, atol=1e-2)
    # and nothing is left behind
    assert not any(linear._forward_pre_hooks for linear in linears_of(model).values())


def test_layers_with_the_same_input_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    texts = [tokens(20)]
    (found,) = everything(Calibrator(model, texts), linears_of(model))
    layer = "model.layers.0"
    q, k, v = (found[f"{layer}.self_attn.{name}_proj"] for name in "qkv")
    assert q is k is v is not found[f"{layer}.self_attn.o_proj"]
    assert found[f"{layer}.mlp.gate_proj"] is found[f"{layer}.mlp.up_proj"]
    assert len({id(each) for each in found.values()}) == 2 * 4 + 1

    # with little memory, the texts are read for one input after the other
    monkeypatch.setattr(calibration_module, "_BUDGET", 1)
    several = everything(Calibrator(model, texts), linears_of(model))
    assert len(several) == 2 * 4 + 1
    for name, one in found.items():
        (other,) = (batch[name] for batch in several if name in batch)
        assert torch.equal(one.factor, other.factor)


def test_long_texts_are_cut() -> None:
    model: Any = llama(max_position_embeddings=24)
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    everything(Calibrator(model, [tokens(50), tokens(24), tokens(48).view(2, 24)]), linears_of(model))
    handle.remove()
    assert lengths == [1, 24, 24, 2, 24, 24, 24]


def test_layers_that_no_text_reaches_are_packed_without() -> None:
    model = llama()
    unused = nn.Linear(64, 32)
    model.model.layers[0].unused = unused
    plain = copy.deepcopy(model)
    hfopt.optimize(model, quantization=INT4, calibration=[tokens(90)])
    hfopt.optimize(plain, quantization=INT4)
    one, other = quantized_tensors(model), quantized_tensors(plain)
    different = {name.rpartition(".")[0] for name in one if not torch.equal(one[name], other[name])}
    assert different == set(linears_of(model)) - {"model.layers.0.unused"}


def test_a_training_model_reads_without_dropout_and_stays_one() -> None:
    model: Any = llama(attention_dropout=0.5)
    expected = quantized_tensors(
        hfopt.optimize(copy.deepcopy(model), quantization=INT4, calibration=[tokens(60)])
    )
    model.train()
    model.model.layers[1].mlp.eval()
    modes = [each.training for each in model.modules()]
    hfopt.optimize(model, quantization=INT4, calibration=[tokens(60)])
    assert [each.training for each in model.modules()] == modes
    for name, tensor in quantized_tensors(model).items():
        assert (tensor == expected[name]).float().mean() > 0.95, name


def test_inputs_that_are_not_finite_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    plain = hfopt.optimize(copy.deepcopy(model), quantization=INT4)
    hfopt.optimize(model, quantization=INT4, calibration=[tokens(30)])
    assert "lm_head" in caplog.text and "not finite" in caplog.text
    assert torch.equal(quantized_tensors(model)["lm_head.quantized_codes"], plain.lm_head.quantized_codes)


# ---- what it is good for ---------------------------------------------------------------------------------------


def embedded() -> Any:
    return AutoModelForCausalLM.from_pretrained(hfopt.embedded_model(), dtype=torch.float32).eval()


@torch.no_grad()
def divergence(model: Model) -> float:
    """Mean KL divergence to the embedded model on a part of the held-out text."""
    text = Path(hfopt.embedded_model(), "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(hfopt.embedded_model())(text[:6000])["input_ids"][:1001])
    sums, stock = Sums(), embedded()
    for inputs, targets in zip(ids[:-1].split(500), ids[1:].split(500), strict=True):
        sums.add(model(inputs[None]).logits[0], stock(inputs[None]).logits[0], targets)
    return sums.figures().divergence


def test_the_embedded_model_is_nearer_to_what_it_was() -> None:
    plain = divergence(hfopt.optimize(embedded(), quantization="int4"))
    model = hfopt.optimize(embedded(), quantization="int4", calibration=TEXTS)
    calibrated = divergence(model)
    assert calibrated < 0.8 * plain
    # loaded from the folder, where a quantised model reads the texts
    loaded = hfopt.load(hfopt.embedded_model(), dtype=torch.float32, quantization="int4", calibration=TEXTS)
    assert divergence(loaded) == pytest.approx(calibrated, rel=0.15)


def test_nothing_of_it_is_saved(tmp_path: Path) -> None:
    folder = hfopt.embedded_model()
    plain: Any = hfopt.load(folder, quantization="int4")
    model: Any = hfopt.load(folder, quantization="int4", calibration=TEXTS[:2])
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.hfopt.left == plain.hfopt.left
    hfopt.save(model, tmp_path)
    expected, found = quantized_tensors(model), quantized_tensors(hfopt.load(tmp_path))
    assert found.keys() == expected.keys() == quantized_tensors(plain).keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_loading_packs_again_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from hfopt.checkpoints.fill import Weights

    addresses: dict[str, int] = {}
    original = Weights.quantise_again

    def quantise_again(self: Weights, inputs: Any, advance: Any) -> Any:
        model = self.model
        addresses.update({name: each.data_ptr() for name, each in quantized_tensors(model).items()})
        return original(self, inputs, advance)

    monkeypatch.setattr(Weights, "quantise_again", quantise_again)
    config = QuantizationConfig(Int4(), head=None, skip=("*.k_proj",))
    model = hfopt.load(hfopt.embedded_model(), quantization=config, calibration=TEXTS[:2])
    assert {name: each.data_ptr() for name, each in quantized_tensors(model).items()} == addresses
    assert not any("k_proj" in name or "lm_head" in name for name in addresses)


def test_weights_that_were_kept_come_back() -> None:
    stock = llama()
    model = copy.deepcopy(stock)
    hfopt.optimize(model, quantization=INT4, calibration=[tokens(30)], keep_original=True)
    hfopt.restore(model)
    assert [type(each) for each in model.modules()] == [type(each) for each in stock.modules()]
    assert [set(vars(each)) for each in model.modules()] == [set(vars(each)) for each in stock.modules()]
    assert all(
        torch.equal(one, other) for one, other in zip(model.parameters(), stock.parameters(), strict=True)
    )


def test_a_model_that_is_quantised_stays_as_it_is() -> None:
    model = hfopt.optimize(llama(), quantization=INT4)
    before = copy.deepcopy(quantized_tensors(model))
    hfopt.optimize(model, quantization=INT4, calibration=[tokens(30)])
    assert all(torch.equal(each, before[name]) for name, each in quantized_tensors(model).items())


# ---- what is given ---------------------------------------------------------------------------------------------


def test_texts_and_their_ids_are_the_same() -> None:
    ids = [AutoTokenizer.from_pretrained(hfopt.embedded_model())(text)["input_ids"] for text in TEXTS[:2]]
    given: list[Any] = [
        TEXTS[:2],
        tuple(ids),
        [torch.tensor(ids[0]), torch.tensor([ids[1]]).int()],
        [TEXTS[0], ids[1]],
    ]
    results = [
        quantized_tensors(hfopt.optimize(embedded(), quantization="int8", calibration=texts))
        for texts in given
    ]
    for result in results[1:]:
        assert all(torch.equal(result[name], tensor) for name, tensor in results[0].items())


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ("a text", "calibration is a str: a list"),
        (torch.tensor([1, 2]), "calibration is a Tensor: a list"),
        (7, "calibration is a int: a list"),
        ([], "calibration is empty"),
        ([[1, 2], []], r"calibration\[1\] is empty"),
        ([torch.zeros(0, dtype=torch.int64)], r"calibration\[0\] is empty"),
        ([[1, 2], [0.5]], r"calibration\[1\] holds torch.float32"),
        ([torch.tensor([True])], r"calibration\[0\] holds torch.bool"),
        ([None], r"calibration\[0\] is a NoneType"),
        ([{"input_ids": [1]}], r"calibration\[0\] is a dict"),
        ([[1, "a"]], r"calibration\[0\] is a list"),
        ([3], r"calibration\[0\] has shape \[\]"),
        ([torch.zeros(1, 2, 3, dtype=torch.int64)], r"calibration\[0\] has shape \[1, 2, 3\]"),
        ([[5], [3, 211]], r"calibration\[1\] holds id 211: ids from 0 to 210"),
        ([[-1, 300]], r"calibration\[0\] holds id -1"),
        (["a text"], "comes from no folder with a tokenizer"),
    ],
)
def test_texts_that_cannot_be_read_change_nothing(texts: Any, match: str) -> None:
    model = llama()
    with pytest.raises(InvalidInput, match=match):
        hfopt.optimize(model, dtype=torch.bfloat16, quantization="int8", calibration=texts)
    assert not any(isinstance(each, QuantizedLinear) for each in model.modules())
    assert model.dtype is torch.float32 and "hfopt" not in vars(model)


def test_texts_need_a_tokenizer(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    for call in (
        lambda: hfopt.load(tmp_path, quantization="int8", calibration=["a text"]),
        lambda: hfopt.optimize(
            AutoModelForCausalLM.from_pretrained(tmp_path), quantization="int8", calibration=["a text"]
        ),
    ):
        with pytest.raises(InvalidInput, match=r"has no tokenizer .* give token ids"):
            call()
    hfopt.load(tmp_path, quantization=Int8(), calibration=[[1, 2, 3]])


def test_without_quantization_there_is_nothing_to_calibrate(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="calibration is for quantization"):
        hfopt.optimize(llama(), calibration=[[1]])
    hfopt.optimize(llama(), quantization="int8").save_pretrained(tmp_path)
    for quantization in (None, "int8"):
        with pytest.raises(InvalidInput, match="nothing is to be quantised"):
            hfopt.load(tmp_path, quantization=quantization, calibration=[[1]])


def test_modules_of_no_model_cannot_read() -> None:
    with pytest.raises(InvalidInput, match="a model of transformers, not a Linear"):
        hfopt.optimize(nn.Linear(64, 32), quantization="int8", calibration=[[1]])


def test_a_model_that_fails_to_read_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(type(model), "forward", None)
    before = [type(each) for each in model.modules()]
    with pytest.raises(TypeError):
        hfopt.optimize(model, quantization="int8", calibration=[[1]])
    assert [type(each) for each in model.modules()] == before
