"""Copies, pickles, adapters, offloading, compilation, training: what works with a model still works."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline

import hfopt
from hfopt import functional
from hfopt.patches.replacement import Replacement
from tests import fresh
from tests.generation_cases import FAMILIES, IS_WHOLE, gptj, llama, one_thread, opt, prompts

pytestmark = [
    pytest.mark.usefixtures(one_thread.__name__),
    # peft asks transformers for it
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TARGETS = {
    "llama": ["q_proj", "down_proj", "lm_head"],
    "gptj": ["v_proj", "fc_in"],
    "opt": ["k_proj", "out_proj", "fc2"],
}


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each call of the attention kernel."""
    calls: list[int] = []
    kernel = functional.attend

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(functional, "attend", attend)
    return calls


@torch.no_grad()
def logits(model: Any, **arguments: Any) -> Tensor:
    inputs = prompts()
    output: Tensor = model(**{**inputs, "use_cache": False, **arguments}).logits
    return output[inputs["attention_mask"].bool()]


def tokens(model: Any, **arguments: Any) -> Tensor:
    found: Tensor = model.generate(**prompts(), **{"max_new_tokens": 8, "do_sample": False, **arguments})
    return found


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


# ---- copies ------------------------------------------------------------------------------------------------


def _deepcopied(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model)


def _pickled(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


def _pickled_long_ago(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model, protocol=2))


def _saved(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: PreTrainedModel = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [_deepcopied, _pickled, _pickled_long_ago, _saved])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_optimised_and_independent(
    family: str, duplicate: Callable[[Any], Any], attended: list[int]
) -> None:
    model, stock = FAMILIES[family](), FAMILIES[family]()
    hfopt.optimize(model)
    logits(model)
    twin = duplicate(model)
    assert classes(twin) == classes(model) and twin.hfopt == model.hfopt
    attended.clear()
    assert_close(logits(twin), logits(stock))
    assert len(attended) == 2
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert_close(logits(model), logits(stock))
    assert torch.equal(tokens(model, num_beams=2), tokens(stock, num_beams=2))
    before = classes(model)
    assert classes(hfopt.restore(twin)) == classes(stock) and classes(model) == before
    assert not hasattr(twin, "hfopt") and "generate" not in vars(twin)


def test_a_fresh_process_reads_the_pickle(tmp_path: Path) -> None:
    model = hfopt.optimize(opt())
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    torch.save({**prompts(), "logits": logits(model)}, tmp_path / "inputs.pt")
    code = (
        "import pickle, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "model = pickle.loads(open(sys.argv[1] + '/model.pickle', 'rb').read())\n"
        "inputs = torch.load(sys.argv[1] + '/inputs.pt')\n"
        "expected, valid = inputs.pop('logits'), inputs['attention_mask'].bool()\n"
        "with torch.no_grad(): found = model(**inputs, use_cache=False).logits[valid]\n"
        "torch.testing.assert_close(found, expected)\n"
        "kind = type(model.model.decoder.layers[0].self_attn).__mro__[1]\n"
        "print(model.hfopt.counts['attention'], kind.__name__)\n"
        "import hfopt; hfopt.restore(model)\n"
        "print(type(model.model.decoder.layers[0].self_attn).__module__)\n"
    )
    assert fresh.run(code, str(tmp_path)).split() == [
        "2",
        "UnrotatedAttention",
        "transformers.models.opt.modeling_opt",
    ]


def test_pickles_hold_no_derived_data() -> None:
    model = hfopt.optimize(llama())
    before = len(pickle.dumps(model))
    logits(model)
    assert len(pickle.dumps(model)) == before


def test_a_checkpoint_is_what_it_was(tmp_path: Path) -> None:
    model, stock = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    hfopt.optimize(model)
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert classes(loaded) == classes(stock)
    assert_close(logits(loaded), logits(model))


def test_a_loaded_state_is_used() -> None:
    model, stock = hfopt.optimize(llama()), llama(initializer_range=0.2)
    logits(model)
    model.load_state_dict(stock.state_dict())
    assert_close(logits(model), logits(stock))
    other = llama(initializer_range=0.1)
    model.load_state_dict(other.state_dict(), assign=True)
    assert_close(logits(model), logits(other))


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights_stay_tied(family: str) -> None:
    model, stock = (FAMILIES[family](tie_word_embeddings=True) for _ in range(2))
    hfopt.optimize(model)
    for each in (model, stock):
        each.tie_weights()
        with torch.no_grad():
            each.get_input_embeddings().weight.mul_(1.5)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert_close(logits(model), logits(stock))


def test_resized_embeddings_are_used() -> None:
    model, stock = llama(), llama()
    hfopt.optimize(model)
    for each in (model, stock):
        torch.manual_seed(2)
        each.resize_token_embeddings(220)
    assert logits(model).shape[-1] == 220
    assert_close(logits(model), logits(stock))


# ---- adapters ----------------------------------------------------------------------------------------------


def with_adapter(model: PreTrainedModel, family: str) -> Any:
    torch.manual_seed(9)
    config = peft.LoraConfig(r=4, target_modules=TARGETS[family], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_added_after(family: str, attended: list[int]) -> None:
    model, stock = FAMILIES[family](), FAMILIES[family]()
    expected = classes(hfopt.optimize(copy.deepcopy(model)))
    adapted, reference = with_adapter(hfopt.optimize(model), family), with_adapter(stock, family)
    assert_close(logits(adapted), logits(reference))
    assert torch.equal(tokens(adapted), tokens(reference))
    assert not hfopt.explain(model).idle and hfopt.explain(adapted).is_applied
    with adapted.disable_adapter(), reference.disable_adapter():
        assert_close(logits(adapted), logits(reference))
    merged, expected_merged = adapted.merge_and_unload(), reference.merge_and_unload()
    assert classes(merged) == expected
    attended.clear()
    assert_close(logits(merged), logits(expected_merged))
    assert len(attended) == 2
    assert classes(hfopt.restore(merged)) == classes(expected_merged)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_added_before(family: str) -> None:
    adapted, reference = (with_adapter(FAMILIES[family](), family) for _ in range(2))
    before = classes(adapted)
    assert hfopt.optimize(adapted) is adapted
    assert any(isinstance(module, Replacement) for module in adapted.modules())
    assert_close(logits(adapted), logits(reference))
    assert torch.equal(tokens(adapted), tokens(reference))
    assert torch.equal(tokens(adapted, num_beams=3), tokens(reference, num_beams=3))
    if "lm_head" in TARGETS[family]:
        with pytest.raises(hfopt.UnsupportedModel, match="lm_head has adapters"):
            hfopt.optimize(adapted, strict=True)
    elif IS_WHOLE:
        hfopt.optimize(adapted, strict=True)
    merged, expected = adapted.merge_and_unload(), reference.merge_and_unload()
    hfopt.optimize(merged, strict=True)
    assert_close(logits(merged), logits(expected))
    hfopt.restore(adapted)
    assert classes(merged) == classes(expected)
    assert len(before) > len(classes(merged))


def test_an_adapter_is_trained_as_before() -> None:
    adapted, reference = with_adapter(hfopt.optimize(llama()), "llama"), with_adapter(llama(), "llama")
    losses: list[list[float]] = []
    for each in (adapted, reference):
        each.train()
        optimizer = torch.optim.SGD([weight for weight in each.parameters() if weight.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(3):
            loss = each(**prompts(), labels=prompts()["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        each.eval()
    assert losses[0] == losses[1] and losses[0][0] > losses[0][-1]
    assert_close(logits(adapted), logits(reference))


# ---- accelerate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_on_disk(family: str, when: str, tmp_path: Path) -> None:
    model, stock = FAMILIES[family](), FAMILIES[family]()
    original = classes(stock)
    if when == "before":
        hfopt.optimize(model)
        logits(model)
    accelerate.disk_offload(model, offload_dir=str(tmp_path), execution_device=torch.device("cpu"))
    if when == "after":
        hfopt.optimize(model)
    for _ in range(2):
        assert_close(logits(model), logits(stock))
    assert torch.equal(tokens(model), tokens(stock))
    assert all(parameter.is_meta for parameter in model.model.parameters()) if family == "llama" else True
    hfopt.restore(model)
    assert classes(model) == original
    assert_close(logits(model), logits(stock))
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_close(logits(model), logits(stock))


def test_hooks_of_accelerate_come_and_go(attended: list[int], tmp_path: Path) -> None:
    model, stock = hfopt.optimize(llama()), llama()
    accelerate.hooks.add_hook_to_module(model.model.layers[0], accelerate.hooks.ModelHook())
    accelerate.hooks.add_hook_to_module(model.model.layers[1].self_attn.q_proj, accelerate.hooks.ModelHook())
    assert_close(logits(model), logits(stock))
    accelerate.hooks.remove_hook_from_submodules(model)
    attended.clear()
    assert_close(logits(model), logits(stock))
    hfopt.restore(model)
    assert_close(logits(model), logits(stock))


# ---- compilation and training ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_models_run_the_original_forward(family: str, attended: list[int]) -> None:
    model, stock = FAMILIES[family](), FAMILIES[family]()
    hfopt.optimize(model)
    attended.clear()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_close(logits(compiled), logits(stock))
        assert not attended
    finally:
        torch._dynamo.reset()
    assert_close(logits(model), logits(stock))
    assert len(attended) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_training_with_checkpointed_gradients(family: str) -> None:
    model, stock = FAMILIES[family](), FAMILIES[family]()
    hfopt.optimize(model)
    for each in (model, stock):
        each.train()
        enable = getattr(each, "activation_checkpointing_enable", None) or each.gradient_checkpointing_enable
        enable()
        torch.manual_seed(1)
        each(**prompts(), labels=prompts()["input_ids"], use_cache=False).loss.backward()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert_close(logits(model.eval()), logits(stock.eval()))


def test_a_parametrization_comes_and_goes() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model, stock = hfopt.optimize(llama()), llama()
    for each in (model, stock):
        torch.nn.utils.parametrize.register_parametrization(each.lm_head, "weight", Doubled())
        torch.nn.utils.parametrize.register_parametrization(
            each.model.layers[0].mlp.up_proj, "weight", Doubled()
        )
    assert_close(logits(model), logits(stock))
    with pytest.raises(hfopt.UnsupportedModel, match="lm_head has become a Parametrized"):
        hfopt.restore(model)
    for each in (model, stock):
        torch.nn.utils.parametrize.remove_parametrizations(each.lm_head, "weight")
        torch.nn.utils.parametrize.remove_parametrizations(each.model.layers[0].mlp.up_proj, "weight")
    assert_close(logits(model), logits(stock))
    assert classes(hfopt.restore(model)) == classes(stock)


def test_a_functional_call_with_other_weights() -> None:
    model, stock, other = hfopt.optimize(gptj()), gptj(), gptj(initializer_range=0.1)
    weights = dict(other.named_parameters())
    with torch.no_grad():
        found = torch.func.functional_call(model, weights, kwargs={**prompts(), "use_cache": False}).logits
        expected = other(**prompts(), use_cache=False).logits
    valid = prompts()["attention_mask"].bool()
    assert_close(found[valid], expected[valid])
    assert_close(logits(model), logits(stock))


def test_pruned_layers() -> None:
    model, stock = hfopt.optimize(llama()), llama()
    for each in (model, stock):
        del each.model.layers[0]
        each.config.num_hidden_layers = 1
        each.model.layers[0].self_attn.layer_idx = 0
    assert_close(logits(model), logits(stock))
    assert torch.equal(tokens(model), tokens(stock))


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_a_pipeline(arguments: dict[str, Any]) -> None:
    texts = []
    for is_ours in (False, True):
        generator = pipeline("text-generation", hfopt.embedded_model(), dtype=torch.float32)
        if is_ours:
            hfopt.optimize(generator.model, strict=True)
        torch.manual_seed(4)
        prompts = ["Return the number of", "Open a file"]
        texts.append(generator(prompts, max_new_tokens=8, batch_size=2, **{"do_sample": False, **arguments}))
    assert texts[0] == texts[1]
