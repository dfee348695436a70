"""optimize(), restore() and the report: the same results over the same parameters, and a way back."""

import copy
import functools
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DynamicCache,
    GemmaConfig,
    GlmConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    StaticCache,
)

import hfopt
from hfopt.patches.replacement import Replacement
from tests.generation_cases import (
    CACHE,
    FAMILIES,
    IS_WHOLE,
    VOCABULARY,
    gptj,
    llama,
    needs_programs,
    one_thread,
    opt,
    opt_with_plain_norms,
    prompts,
)
from tests.reference import DTYPES

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.3 * i for i in range(8)],
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "rope_theta": 500.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 500.0,
    },
}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, one key head": lambda: llama(num_key_value_heads=1),
    "llama, a key head each": lambda: llama(num_key_value_heads=4),
    "llama, biases": lambda: _with_biases(llama(attention_bias=True, mlp_bias=True)),
    "llama, wide heads": lambda: llama(head_dim=24),
    "llama, narrow heads": lambda: llama(head_dim=8, num_attention_heads=2, num_key_value_heads=2),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, gelu": lambda: llama(hidden_act="gelu"),
    "llama, an activation that kernels lack": lambda: llama(hidden_act="mish"),
    "llama, eager": lambda: llama(attn_implementation="eager"),
    **{f"llama, {name} rope": functools.partial(llama, rope_parameters=rope) for name, rope in ROPES.items()},
    "gptj": gptj,
    "gptj, all channels": lambda: gptj(rotary_dim=16),
    "gptj, two channels": lambda: gptj(rotary_dim=2),
    "gptj, ten channels": lambda: gptj(rotary_dim=10),
    "gptj, relu": lambda: gptj(activation_function="relu"),
    "gptj, quick_gelu": lambda: gptj(activation_function="quick_gelu"),
    "gptj, narrow inner": lambda: _with_biases(gptj(n_inner=40)),
    "opt, post-norm, narrow embedding": lambda: _with_biases(opt()),
    "opt, pre-norm": lambda: _with_biases(opt(do_layer_norm_before=True, word_embed_proj_dim=64)),
    "opt, gelu": lambda: opt(activation_function="gelu"),
    "opt, silu, no biases": lambda: opt(activation_function="silu", enable_bias=False),
    "opt, an activation that kernels lack": lambda: opt(activation_function="relu6"),
    "opt, norms without weights": opt_with_plain_norms,
    "opt, eager": lambda: opt(attn_implementation="eager"),
}

# torch computes a part of them
WITHOUT_PROGRAM = {
    "llama, an activation that kernels lack",
    "opt, an activation that kernels lack",
}

# what each kind of layer consists of
PER_LAYER = {
    "llama": {"layer": 1, "attention": 1, "mlp": 1, "norm": 2},
    "gptj": {"layer": 1, "attention": 1, "mlp": 1, "norm": 1},
    "opt": {"layer": 1, "attention": 1, "norm": 2},
}


def _with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Biases and norms begin as zeros and ones, which hides mistakes."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def rotary_dim_none() -> PreTrainedModel:
    """transformers' own configuration class refuses None, older checkpoints have it."""
    model = gptj(n_head=1, rotary_dim=64)
    for block in model.transformer.h:
        block.attn.rotary_dim = None
    return model


MODELS["gptj, rotary_dim None"] = rotary_dim_none


@torch.no_grad()
def logits(model: nn.Module, **arguments: Any) -> Tensor:
    """Of the tokens that are no padding."""
    inputs = prompts()
    return model(**inputs, **arguments).logits[inputs["attention_mask"].bool()].float()


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each call of the attention kernel."""
    from hfopt import functional

    calls: list[int] = []
    kernel = functional.attend

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(functional, "attend", attend)
    return calls


def caches(model: PreTrainedModel) -> Iterator[tuple[dict[str, Any], bool]]:
    """Arguments of a forward, and whether our attention does that one."""
    yield {"use_cache": False}, True
    yield {CACHE: hfopt.IndirectCache()}, True
    yield {CACHE: DynamicCache()}, False
    yield {CACHE: StaticCache(config=model.config, max_cache_len=32)}, False


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same(name: str, attended: list[int]) -> None:
    model = MODELS[name]()
    stock = copy.deepcopy(model)
    assert hfopt.optimize(model, strict=IS_WHOLE and name not in WITHOUT_PROGRAM) is model
    for arguments, is_ours in caches(model):
        attended.clear()
        found = logits(model, **copy.deepcopy(arguments))
        if IS_WHOLE:
            assert len(attended) == (model.config.num_hidden_layers if is_ours else 0)
        torch.testing.assert_close(found, logits(stock, **arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_step_of_generate_is_the_same(name: str, attended: list[int]) -> None:
    model = MODELS[name]()
    arguments = {**prompts(), "max_new_tokens": 12, "do_sample": False, "output_logits": True}
    arguments["return_dict_in_generate"] = True
    expected = model.generate(**arguments)
    hfopt.optimize(model)
    attended.clear()
    found = model.generate(**arguments)
    n_calls = 0 if hfopt.explain(model).by_module is None else 12
    if IS_WHOLE:
        assert len(attended) == n_calls * model.config.num_hidden_layers
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_16_bits_are_as_close_to_float32_as_before(name: str, dtype: torch.dtype) -> None:
    exact = MODELS[name]()
    model = copy.deepcopy(exact).to(dtype)
    # both start from the same weights
    for parameter, rounded in zip(exact.parameters(), model.parameters(), strict=True):
        parameter.data = rounded.data.float()
    reference = logits(exact, use_cache=False)
    before = (logits(model, use_cache=False) - reference).square().mean().sqrt()
    hfopt.optimize(model, strict=IS_WHOLE and name not in WITHOUT_PROGRAM)
    after = (logits(model, use_cache=False) - reference).square().mean().sqrt()
    assert 0 < after <= 1.5 * before


@needs_programs
@pytest.mark.parametrize("family", PER_LAYER)
def test_report_counts_what_was_swapped(family: str) -> None:
    model: Any = opt(word_embed_proj_dim=64) if family == "opt" else FAMILIES[family]()
    hfopt.optimize(model)
    expected = {kind: 2 * number for kind, number in PER_LAYER[family].items()}
    expected["linear"] = 1
    if family != "opt":
        expected["norm"] += 1
    assert model.hfopt.counts == expected
    assert not model.hfopt.idle
    for swapped in model.hfopt.swapped:
        assert isinstance(model.get_submodule(swapped.path), Replacement)
        assert 0 <= swapped.proof < 1e-4


def test_report_lists_every_module_that_has_a_forward() -> None:
    model = hfopt.optimize(llama())
    report = hfopt.explain(model)
    listed = {module.path for module in report.swapped} | {module.path for module in report.kept}
    containers = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    assert listed == {name for name, _ in model.named_modules()} - containers
    assert all(module.reason for module in report.kept)
    assert report.dtype == "float32" and report.threads == torch.get_num_threads()
    assert str(report.cores) in str(report) and report.to_dict()["cores"]["online"] == os.cpu_count()


def test_report_is_readable_and_json() -> None:
    model = hfopt.optimize(llama(num_hidden_layers=3))
    text = str(hfopt.explain(model))
    assert "3 attention" in text and "model.layers.0-2.self_attn" in text and "RotaryAttention" in text
    assert "model.embed_tokens" in text and "it matches no pattern" in text
    assert len(text.splitlines()) < 30
    data = json.loads(json.dumps(hfopt.explain(model).to_dict()))
    assert data["counts"]["attention"] == 3 and data["memory_before"] > 0
    assert {"path", "old_class", "new_class", "proof"} <= set(data["swapped"][0])


def test_explain_of_an_untouched_model_says_what_would_be() -> None:
    model = llama()
    before = _everything(model)
    report = hfopt.explain(model)
    assert not report.is_applied and report.counts["attention"] == 2
    assert "not optimized" in str(report)
    assert _everything(model) == before


def test_explain_sees_what_changed_since() -> None:
    model = hfopt.optimize(llama())
    model.model.layers[1].mlp.up_proj = nn.Sequential(nn.Linear(64, 96, bias=False))
    report = hfopt.explain(model)
    assert report.idle == {"model.layers.1.mlp": "up_proj is a Sequential now"}
    assert "up_proj is a Sequential now" in str(report)


def _everything(model: nn.Module) -> list[Any]:
    """All that restore() has to bring back; attributes in their order, tensors by identity."""
    found: list[Any] = []
    for name, module in model.named_modules():
        state = {
            key: (list(value.items()) if isinstance(value, (dict, OrderedDict)) else id(value))
            for key, value in vars(module).items()
        }
        found.append((name, type(module), list(state.items())))
    return found


@pytest.mark.parametrize("family", [llama, gptj, opt])
def test_restore_leaves_nothing_behind(family: Callable[[], Any]) -> None:
    model = family()
    before = _everything(model)
    hfopt.optimize(model)
    logits(model)
    model.generate(**prompts(), max_new_tokens=3, num_beams=2)
    assert hfopt.restore(model) is model
    assert _everything(model) == before
    assert _everything(hfopt.restore(model)) == before


@pytest.mark.parametrize("family", [llama, gptj, opt])
def test_parameters_stay_where_they_are(family: Callable[[], PreTrainedModel]) -> None:
    model = family()
    state = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    hfopt.optimize(model)
    logits(model)
    after = model.state_dict()
    assert list(after) == list(state)
    for name, value in after.items():
        assert value.data_ptr() == state[name][0] and torch.equal(value, state[name][1])


def test_optimizing_twice_changes_nothing_more() -> None:
    model = hfopt.optimize(llama())
    before = [(name, type(module)) for name, module in model.named_modules()]
    swapped, n_hooks = model.hfopt.swapped, len(model._forward_hooks)
    hfopt.optimize(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert model.hfopt.swapped == swapped and len(model._forward_hooks) == n_hooks
    assert _everything(hfopt.restore(model))[0][1] is type(llama())
    assert not any(isinstance(module, Replacement) for module in model.modules())


def test_a_second_optimize_takes_what_has_become_known() -> None:
    model = llama()
    mlp = model.model.layers[0].mlp
    plain, mlp.up_proj = mlp.up_proj, nn.Sequential(mlp.up_proj)
    hfopt.optimize(model)
    assert not isinstance(mlp, Replacement) and isinstance(mlp.down_proj, Replacement)
    expected = logits(model)
    mlp.up_proj = plain
    hfopt.optimize(model, strict=IS_WHOLE)
    assert isinstance(mlp, Replacement)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_converts_the_weights_and_no_table(dtype: torch.dtype) -> None:
    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    model = llama(tie_word_embeddings=True).to(other)
    frequencies = model.model.rotary_emb.inv_freq
    hfopt.optimize(model, dtype=dtype, strict=IS_WHOLE)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.rotary_emb.inv_freq is frequencies
    assert model.hfopt.dtype == str(dtype).removeprefix("torch.")


def test_other_dtypes_are_kept_with_their_reason() -> None:
    model = hfopt.optimize(llama().to(torch.float64))
    assert model.hfopt.counts == {}
    reasons = {module.path: module.reason for module in model.hfopt.kept}
    assert (
        reasons["model.layers.0.self_attn"] == "dtype float64 is not supported (float32, bfloat16, float16)"
    )
    assert reasons["lm_head"] == reasons["model.norm"] == reasons["model.layers.0.self_attn"]


def test_weights_of_several_dtypes_are_kept_with_their_reason() -> None:
    model = llama().to(torch.bfloat16)
    model.model.layers[0].mlp.down_proj.float()
    hfopt.optimize(model)
    reasons = {module.path: module.reason for module in model.hfopt.kept}
    assert reasons["model.layers.0.mlp"] == "its weights have several dtypes (bfloat16, float32)"
    assert isinstance(model.model.layers[1].mlp, Replacement)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "llama"}, hfopt.InvalidInput, "model is a str"),
        ({"model": None}, hfopt.InvalidInput, "model is a NoneType"),
        (
            {"dtype": torch.float64},
            hfopt.InvalidInput,
            "dtype = torch.float64: .*torch.float16 or None is allowed",
        ),
        ({"dtype": "bfloat16"}, hfopt.InvalidInput, "dtype = 'bfloat16'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hfopt.optimize(**{"model": nn.Linear(2, 2), **arguments})


def test_parameters_without_storage_are_named() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.to("meta")
    before = _everything(model)
    with pytest.raises(
        hfopt.UnsupportedDevice, match=r"model\.layers\.1\.mlp\.up_proj\.weight has no storage"
    ):
        hfopt.optimize(model, dtype=torch.bfloat16)
    assert _everything(model) == before


def _two_sided(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.is_causal = False


def _transposed(model: PreTrainedModel) -> None:
    weight = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(weight.data.T.contiguous().T)


def _not_a_number(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.o_proj.weight.data[3, 3] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_two_sided, r"model\.layers\.1\.self_attn \(its attention is not causal"),
        (_transposed, r"lm_head \(its weights are not contiguous\)"),
        (_not_a_number, r"model\.layers\.0\.self_attn \(its output is not finite"),
    ],
)
def test_strict_raises_for_a_part_that_stays(change: Callable[[PreTrainedModel], None], message: str) -> None:
    model = llama()
    change(model)
    before = _everything(model)
    with pytest.raises(hfopt.UnsupportedModel, match=message):
        hfopt.optimize(model, strict=True)
    assert _everything(model) == before
    hfopt.optimize(model)


@needs_programs
@pytest.mark.parametrize("name", sorted(WITHOUT_PROGRAM))
def test_strict_raises_for_a_decoder_that_is_no_program(name: str) -> None:
    with pytest.raises(
        hfopt.UnsupportedModel, match=r"depends on more than a token|no activation of the kernels"
    ):
        hfopt.optimize(MODELS[name](), strict=True)


def test_strict_raises_for_a_decoder_without_a_record() -> None:
    model = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=64, num_hidden_layers=2)).eval()
    with pytest.raises(
        hfopt.UnsupportedModel, match="MambaForCausalLM is no decoder whose parts hfopt knows"
    ):
        hfopt.optimize(model, strict=True)


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from hfopt import functional

    def broken(*args: Any, **kwargs: Any) -> None:
        raise hfopt.KernelError("no compiler")

    model = llama()
    before = _everything(model)
    monkeypatch.setattr(functional, "norm", broken)
    with pytest.raises(hfopt.KernelError, match="no compiler"):
        hfopt.optimize(model)
    assert _everything(model) == before


def _small(config_class: Any, **changes: Any) -> Any:
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "vocab_size": VOCABULARY}
    return config_class(**{**sizes, **ids, "num_key_value_heads": 2, "initializer_range": 0.3, **changes})


OTHERS: dict[str, tuple[Any, dict[str, int]]] = {
    "qwen2": (_small(Qwen2Config), {"attention": 2, "mlp": 2, "norm": 5, "layer": 2, "linear": 1}),
    "mistral": (_small(MistralConfig), {"attention": 2, "mlp": 2, "norm": 5, "layer": 2, "linear": 1}),
    "mistral, sliding window": (_small(MistralConfig, sliding_window=4), {"attention": 2, "norm": 5}),
    # its norm adds 1 to the weight
    "gemma": (_small(GemmaConfig), {"attention": 2, "mlp": 2, "norm": 5, "layer": 2, "linear": 1}),
    # Llama's attention in every line but the rotation
    "glm": (_small(GlmConfig), {"attention": 2, "mlp": 2, "norm": 5, "layer": 2, "linear": 1}),
    # with norms of groups of channels in its attention
    "diffllama": (_small(DiffLlamaConfig), {"mlp": 2, "norm": 7}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_get_what_is_known_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    config, expected = OTHERS[name]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    stock = copy.deepcopy(model)
    counts = hfopt.optimize(model).hfopt.counts
    known = {kind: number for kind, number in expected.items() if IS_WHOLE or kind != "layer"}
    assert {kind: counts.get(kind) for kind in known} == known
    assert ("attention" in counts) == ("attention" in expected) and ("norm" in counts) == ("norm" in expected)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    for arguments in ({"use_cache": False}, {CACHE: hfopt.IndirectCache()}):
        ours, theirs = logits(model, **arguments), logits(stock, use_cache=False)
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    if dtype is torch.float32:
        arguments = {**prompts(), "max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(**arguments), stock.generate(**arguments))


def test_models_that_do_not_generate_are_optimized_too() -> None:
    torch.manual_seed(5)
    model = LlamaForSequenceClassification(llama().config).eval()
    model.config.pad_token_id = 0
    inputs = prompts()
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        hfopt.optimize(model, strict=IS_WHOLE)
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    assert "generate" not in vars(model)
    block: Any = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval()
    assert hfopt.optimize(block).hfopt.counts == {"linear": 1, "norm": 1}


def test_other_models_in_the_process_are_untouched() -> None:
    model, other = llama(), llama()
    before = _everything(other)
    forwards = {type(module): type(module).forward for module in other.modules()}
    hfopt.optimize(model)
    assert _everything(other) == before
    assert all(kind.forward is forward for kind, forward in forwards.items())


def test_optimize_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    hfopt.optimize(gptj())
    model = gptj()
    torch.set_rng_state(state)
    hfopt.optimize(model)
    assert torch.equal(torch.get_rng_state(), state)
