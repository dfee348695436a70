"""Patterns, proofs and the way out: what is recognised, what is refused, what the original forward does."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Cache, DiffLlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

import hfopt
from hfopt import functional
from hfopt.modules.weights import original_class
from hfopt.patches.activation import match_activation
from hfopt.patches.probe import undisturbed
from hfopt.patches.replacement import Replacement
from tests.generation_cases import CACHE, FAMILIES, Doubled, gptj, llama, one_thread, opt, prompts
from tests.reference import DTYPES, assert_as_exact_as_torch

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Name of each call of attend and linear, in their order."""
    calls: list[str] = []

    def counted(name: str) -> None:
        kernel = getattr(functional, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(functional, name, call)

    counted("attend")
    counted("linear")
    return calls


@torch.no_grad()
def logits(model: nn.Module, **arguments: Any) -> Tensor:
    inputs = prompts()
    output: Tensor = model(**{**inputs, "use_cache": False, **arguments}).logits
    return output[inputs["attention_mask"].bool()]


# ---- activations -------------------------------------------------------------------------------------------

MATCHES = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "gelu_10": None,
    "relu6": None,
    "relu2": "relu_squared",
    "leaky_relu": None,
    "mish": None,
    "laplace": None,
    "hardswish": None,
    "linear": None,
    "prelu": None,
}


@pytest.mark.parametrize("name", MATCHES)
def test_activations_are_told_by_their_values(name: str) -> None:
    assert match_activation(ACT2FN[name]) == MATCHES[name]


def test_an_activation_in_place_is_told_and_changes_nothing() -> None:
    for _ in range(2):
        assert match_activation(nn.LeakyReLU(0.5, inplace=True)) is None
        assert match_activation(nn.ReLU(inplace=True)) == "relu"


def test_an_exchanged_activation_is_noticed() -> None:
    model, stock = llama(), llama()
    hfopt.optimize(model)
    logits(model)
    for each in (model, stock):
        each.model.layers[0].mlp.act_fn = nn.GELU()
        each.model.layers[1].mlp.act_fn = nn.Softplus()
    assert_close(logits(model), logits(stock))


# ---- what the proof refuses --------------------------------------------------------------------------------


class SoftCapped(LlamaAttention):
    @functools.wraps(LlamaAttention.forward)
    def forward(self, *args, **kwargs):  # type: ignore[override]
        output, weights = super().forward(*args, **kwargs)
        return 2.0 * torch.tanh(output / 2.0), weights


class ScaledQuery(LlamaAttention):
    @functools.wraps(LlamaAttention.forward)
    def forward(self, *args, position_embeddings, **kwargs):  # type: ignore[override]
        cos, sin = position_embeddings
        return super().forward(*args, position_embeddings=(cos * 1.01, sin), **kwargs)


class Clamped(LlamaMLP):
    def forward(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-50, 50))


class OneAdded(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + hidden_states


class OtherEps(LlamaRMSNorm):
    def forward(self, hidden_states):
        return nn.functional.rms_norm(
            hidden_states, self.weight.shape, self.weight, 3 * self.variance_epsilon
        )


class Scaled(LlamaDecoderLayer):
    @functools.wraps(LlamaDecoderLayer.forward)
    def forward(self, hidden_states, **kwargs):  # type: ignore[override]
        attended = self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states = hidden_states + 0.9 * attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (SoftCapped, "model.layers.0.self_attn"),
        (Clamped, "model.layers.0.mlp"),
        (OneAdded, "model.norm"),
        (Scaled, "model.layers.1"),
    ],
)
def test_what_computes_something_else_is_kept(kind: type[nn.Module], path: str, dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    module = model.get_submodule(path)
    module.__class__ = kind
    stock = copy.deepcopy(model)
    hfopt.optimize(model)
    assert type(module) is kind
    reasons = {kept.path: kept.reason for kept in model.hfopt.kept}
    assert "it computes something else" in reasons[path]
    if dtype is torch.float32:
        assert_as_exact_as_torch(logits(model), logits(stock), logits(copy.deepcopy(stock).double()))


@pytest.mark.parametrize(
    ("kind", "path"), [(OtherEps, "model.norm"), (ScaledQuery, "model.layers.0.self_attn")]
)
def test_small_differences_are_seen_in_float32(kind: type[nn.Module], path: str) -> None:
    model = llama()
    model.get_submodule(path).__class__ = kind
    hfopt.optimize(model)
    assert type(model.get_submodule(path)) is kind


def test_a_forward_with_other_arguments_is_kept() -> None:
    class Renamed(LlamaAttention):
        def forward(self, hidden_states, position_embeddings, mask=None, kept: Cache | None = None, **kwargs):
            return super().forward(hidden_states, position_embeddings, mask, kept)

    model = llama()
    model.model.layers[0].self_attn.__class__ = Renamed
    hfopt.optimize(model)
    reasons = {kept.path: kept.reason for kept in model.hfopt.kept}
    assert reasons["model.layers.0.self_attn"].startswith(
        "its forward has no argument that is known as its attention_mask (hidden_states, position_"
    )


def _other(config_class: Any) -> Any:
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    config = config_class(**sizes, num_key_value_heads=2, vocab_size=211, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("config_class", "reason"),
    [
        (DiffLlamaConfig, "unknown children beside its projections (groupnorm)"),
    ],
)
def test_a_half_match_is_kept_with_its_reason(config_class: Any, reason: str) -> None:
    model = _other(config_class)
    hfopt.optimize(model)
    reasons = {kept.path: kept.reason for kept in model.hfopt.kept}
    assert reasons["model.layers.1.self_attn"] == reason


def test_an_attention_that_is_not_causal_is_kept() -> None:
    model = llama()
    model.model.layers[1].self_attn.is_causal = False
    hfopt.optimize(model)
    reasons = {kept.path: kept.reason for kept in model.hfopt.kept}
    assert reasons["model.layers.1.self_attn"] == "its attention is not causal"


def test_weights_of_zeros_prove_nothing() -> None:
    model = llama()
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    hfopt.optimize(model)
    reasons = {kept.path: kept.reason for kept in model.hfopt.kept}
    assert reasons["model.layers.0.self_attn"] == "its output is all zeros, which proves nothing"
    assert isinstance(model.model.layers[1].self_attn, Replacement)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_large_biases_in_16_bits_are_no_reason_to_refuse(dtype: torch.dtype) -> None:
    model = llama(attention_bias=True).to(dtype)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.normal_(std=60, generator=torch.Generator().manual_seed(1))
        layer.self_attn.q_proj.bias.data.normal_(std=5, generator=torch.Generator().manual_seed(2))
    assert hfopt.optimize(model).hfopt.counts["attention"] == 2


def test_the_proof_leaves_no_trace() -> None:
    model = llama(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0},
        max_position_embeddings=8,
    )
    with torch.no_grad():
        model(**prompts(length=12))  # longer than the table: the rotary module has other frequencies now
    model.train()
    fired: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: fired.append(module))
        module.register_forward_pre_hook(lambda module, args: fired.append(module))
    frequencies = model.model.rotary_emb.inv_freq
    values, length = frequencies.clone(), model.model.rotary_emb.max_seq_len_cached
    hfopt.optimize(model)
    assert not fired
    assert model.model.rotary_emb.inv_freq is frequencies and torch.equal(frequencies, values)
    assert model.model.rotary_emb.max_seq_len_cached == length
    assert all(module.training for module in model.modules())


def test_undisturbed_mends_whatever_happens_within() -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    mean = block[1].running_mean
    with pytest.raises(KeyError), undisturbed(block):
        assert not block.training and not block[0].training
        block[0].__class__ = nn.Identity
        block[1].running_mean = torch.ones(3)
        vars(block[0])["extra"] = 1
        raise KeyError
    assert type(block[0]) is nn.Linear and block[1].running_mean is mean and block.training
    assert not hasattr(block[0], "extra")


# ---- the way out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_pre_hook", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_any_module_fire_and_take_part(family: str, is_pre_hook: bool) -> None:
    model, stock = FAMILIES[family](), FAMILIES[family]()
    hfopt.optimize(model)
    containers = (nn.ModuleList, type(stock))
    paths = [path for path, module in stock.named_modules() if not isinstance(module, containers)]
    for path in paths:
        calls: dict[int, list[Any]] = {}
        for each in (model, stock):
            seen = calls[id(each)] = []
            module = each.get_submodule(path)

            def note(module: nn.Module, args: Any, output: Any = None, seen: list[Any] = seen) -> Any:
                tensors = [value for value in args if isinstance(value, Tensor) and value.is_floating_point()]
                seen.append([value.shape for value in tensors])
                if is_pre_hook:
                    return (
                        tuple(value * 1.1 if value in tensors else value for value in args)
                        if len(args) == 1
                        else None
                    )
                if isinstance(output, Tensor) and output.is_floating_point():
                    return output * 1.1
                return None

            register = module.register_forward_pre_hook if is_pre_hook else module.register_forward_hook
            handle = register(note)
            calls[id(each)].append(logits(each))
            handle.remove()
        ours, theirs = calls[id(model)], calls[id(stock)]
        assert len(ours) == len(theirs) and ours[:-1] == theirs[:-1], path
        assert_close(ours[-1], theirs[-1])


def test_hooks_on_all_modules_of_the_process_fire(kernels: list[str]) -> None:
    model, stock = llama(), llama()
    hfopt.optimize(model)
    kernels.clear()
    counts = []
    for each in (model, stock):
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_, seen=seen: seen.append(1))
        try:
            logits(each)
        finally:
            handle.remove()
        counts.append(len(seen))
    assert counts[0] == counts[1] and not kernels


@pytest.mark.parametrize(
    "path", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm"]
)
def test_a_replaced_child_is_called(path: str, kernels: list[str]) -> None:
    model, stock = llama(), llama()
    hfopt.optimize(model)
    for each in (model, stock):
        each.model.layers[0].set_submodule(path, Doubled(each.model.layers[0].get_submodule(path)).eval())
    kernels.clear()
    assert_close(logits(model), logits(stock))
    assert kernels.count("attend") == (1 if path.startswith("self_attn") else 2)


def test_a_forward_of_the_instance_is_called() -> None:
    model, stock = opt(), opt()
    hfopt.optimize(model)
    for each in (model, stock):
        linear = each.model.decoder.layers[1].fc1
        linear.forward = lambda hidden_states, linear=linear: nn.functional.linear(
            hidden_states, 2 * linear.weight
        )
    assert_close(logits(model), logits(stock))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_and_hidden_states_are_those_of_the_model(
    family: str, implementation: str, kernels: list[str]
) -> None:
    if family == "gptj" and implementation == "sdpa":
        pytest.skip("GPT-J has no sdpa")
    model, stock = (FAMILIES[family](attn_implementation=implementation) for _ in range(2))
    hfopt.optimize(model)
    wanted = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        ours, theirs = model(**prompts(), **wanted), stock(**prompts(), **wanted)
    valid = prompts()["attention_mask"].bool()
    assert len(ours.attentions) == len(theirs.attentions) and len(ours.hidden_states) == len(
        theirs.hidden_states
    )
    for our_weights, their_weights in zip(ours.attentions, theirs.attentions, strict=True):
        assert_close(our_weights.transpose(1, 2)[valid], their_weights.transpose(1, 2)[valid])
    for our_states, their_states in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_close(our_states[valid], their_states[valid])
    # the hooks that transformers leaves in the model slow nothing down
    kernels.clear()
    assert_close(logits(model), logits(stock))
    assert kernels.count("attend") == 2


def test_hidden_states_alone_run_in_kernels(kernels: list[str]) -> None:
    model = hfopt.optimize(llama())
    kernels.clear()
    with torch.no_grad():
        assert len(model(**prompts(), output_hidden_states=True, use_cache=False).hidden_states) == 3
    assert kernels.count("attend") == 2


def test_a_hook_on_eager_attention_gets_the_weights() -> None:
    model = llama(attn_implementation="eager")
    hfopt.optimize(model)
    seen: list[Any] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    logits(model)
    assert seen[0].shape == (3, 4, 9, 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_model(family: str, kernels: list[str]) -> None:
    model, stock = FAMILIES[family](), FAMILIES[family]()
    hfopt.optimize(model)
    kernels.clear()
    for each in (model, stock):
        each(**prompts(), labels=prompts()["input_ids"], use_cache=False).loss.backward()
    assert not kernels
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_gradients_of_the_input_through_frozen_weights() -> None:
    model, stock = llama().requires_grad_(False), llama().requires_grad_(False)
    hfopt.optimize(model)
    found = []
    for each in (model, stock):
        embedded = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(4)).requires_grad_()
        each(inputs_embeds=embedded, use_cache=False).logits.square().sum().backward()
        found.append(embedded.grad)
    assert_close(*found)


def test_frozen_weights_run_in_kernels_while_grad_is_enabled(kernels: list[str]) -> None:
    model = hfopt.optimize(llama().requires_grad_(False))
    kernels.clear()
    model(**prompts(), use_cache=False)
    assert kernels.count("attend") == 2


def test_training_mode_runs_the_original_forward(kernels: list[str]) -> None:
    model, stock = gptj(resid_pdrop=0.5).train(), gptj(resid_pdrop=0.5).train()
    hfopt.optimize(model)
    kernels.clear()
    found = []
    for each in (model, stock):
        torch.manual_seed(1)
        found.append(logits(each))
    assert not kernels and torch.equal(*found)


def test_one_dropout_in_training_mode_drops_out() -> None:
    model, stock = gptj(resid_pdrop=0.5), gptj(resid_pdrop=0.5)
    hfopt.optimize(model)
    found = []
    for each in (model, stock):
        each.transformer.h[0].mlp.dropout.train()
        each.transformer.h[1].attn.resid_dropout.train()
        torch.manual_seed(1)
        found.append(logits(each))
    assert_close(*found)


def test_autocast_runs_the_original_forward(kernels: list[str]) -> None:
    model, stock = llama(), llama()
    hfopt.optimize(model)
    kernels.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model), logits(stock))
    assert not kernels


def test_inference_mode_runs_in_kernels(kernels: list[str]) -> None:
    for family in FAMILIES.values():
        model, stock = family(), family()
        hfopt.optimize(model)
        kernels.clear()
        with torch.inference_mode():
            assert_close(logits(model), logits(stock))
        assert kernels.count("attend") == 2


def test_modes_that_watch_operations_see_them_all() -> None:
    model, stock = llama(), llama()
    hfopt.optimize(model)
    counts = []
    for each in (model, stock):
        with FlopCounterMode(display=False) as counter:
            logits(each)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_traces_hold_torch_operations() -> None:
    model, stock = llama(), llama()
    hfopt.optimize(model)
    first, second = (torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    with torch.no_grad():
        traced = torch.jit.trace(model.model.layers[0].mlp, first)
        assert_close(traced(second), stock.model.layers[0].mlp(second))
        batched = torch.vmap(model.model.layers[0].mlp)(second)
        assert_close(batched, stock.model.layers[0].mlp(second))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_that_change_scores_or_heads(implementation: str) -> None:
    model, stock = (llama(attn_implementation=implementation) for _ in range(2))
    hfopt.optimize(model)
    ids = prompts()["input_ids"][:2]
    causal = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)
    for mask in (
        causal.expand(2, 1, 9, 9),
        causal + torch.randn(2, 1, 9, 9),
        (causal + torch.randn(2, 4, 9, 9)) if implementation == "eager" else causal.expand(2, 4, 9, 9),
        causal.expand(1, 1, 9, 9),
    ):
        with torch.no_grad():
            ours, theirs = (
                each(input_ids=ids, attention_mask=mask, use_cache=False).logits for each in (model, stock)
            )
        assert_close(ours, theirs)


def test_a_mask_written_in_place_between_steps() -> None:
    model, stock = llama(), llama()
    hfopt.optimize(model)
    ids = prompts()["input_ids"][:1]
    found: dict[int, list[Tensor]] = {}
    for each in (model, stock):
        cache = hfopt.IndirectCache()
        seen = torch.ones(1, 1, 1, 4, dtype=torch.bool)
        with torch.no_grad():
            each(input_ids=ids[:, :3], **{CACHE: cache})
            results = found[id(each)] = []
            for hidden in (0, 1, 2):
                seen.fill_(True)[..., hidden] = False
                results.append(each(input_ids=ids[:, 3:4], attention_mask=seen, **{CACHE: cache}).logits)
                cache.crop(-1)
    for ours, theirs in zip(found[id(model)], found[id(stock)], strict=True):
        assert_close(ours, theirs)


def test_positions_written_in_place_between_steps() -> None:
    model, stock = gptj(), gptj()
    hfopt.optimize(model)
    ids = prompts()["input_ids"][:1]
    for guard in (torch.no_grad, torch.inference_mode):
        found = []
        for each in (model, stock):
            with guard():
                cache, results = hfopt.IndirectCache(), []
                positions = torch.tensor([[5]])
                for token in range(4):
                    arguments = {"position_ids": positions, CACHE: cache}
                    results.append(each(input_ids=ids[:, token : token + 1], **arguments).logits)
                    positions += 3
            found.append(torch.cat(results))
        assert_close(*found)


@pytest.mark.parametrize("position", [-1, 96])
def test_positions_outside_the_table_are_named(position: int) -> None:
    model = hfopt.optimize(gptj())
    positions = torch.arange(9)[None].clone()
    positions[0, 4] = position
    if "embed_positions" in model.transformer.h[0].attn._buffers:
        with pytest.raises(hfopt.InvalidInput, match=rf"position_ids: {position} is outside .* 0 to 95"):
            logits(model, position_ids=positions)
    elif position < 0:  # the model looks them up, before its layers
        assert_close(logits(model, position_ids=positions), logits(gptj(), position_ids=positions))
    else:
        with pytest.raises(IndexError):
            logits(model, position_ids=positions)


def test_bidirectional_calls_go_to_the_original(kernels: list[str]) -> None:
    model, stock = llama(), llama()
    hfopt.optimize(model)
    kernels.clear()
    with torch.no_grad():
        arguments = {"input_ids": prompts()["input_ids"], "use_cache": False, "is_causal": False}
        ours, theirs = model(**arguments).logits, stock(**arguments).logits
    assert_close(ours, theirs)
    assert "attend" not in kernels


@pytest.mark.parametrize("family", FAMILIES)
def test_several_tokens_after_a_past(family: str, kernels: list[str]) -> None:
    model, stock = FAMILIES[family](), FAMILIES[family]()
    hfopt.optimize(model)
    kernels.clear()
    inputs = prompts()
    cache = hfopt.IndirectCache()
    found = []
    with torch.no_grad():
        for begin, end in ((0, 4), (4, 5), (5, 9)):
            arguments = {
                "input_ids": inputs["input_ids"][:, begin:end],
                "attention_mask": inputs["attention_mask"][:, :end],
            }
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)[:, begin:end]
            found.append(model(**arguments, position_ids=positions, **{CACHE: cache}).logits)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        expected = stock(**inputs, position_ids=positions, use_cache=False).logits
    # in two of the calls there is a row of nothing but padding: eager attention gives it equal weights, and no zeros
    assert kernels.count("attend") == (2 if model.config._attn_implementation == "eager" else 6)
    valid = inputs["attention_mask"].bool()
    assert_close(torch.cat(found, dim=1)[valid], expected[valid])


def test_strided_inputs() -> None:
    for family in FAMILIES.values():
        model, stock = family(), family()
        hfopt.optimize(model)
        size = stock.get_input_embeddings().embedding_dim
        embedded = torch.randn(9, 2, size, generator=torch.Generator().manual_seed(3)).transpose(0, 1)
        with torch.no_grad():
            ours, theirs = (each(inputs_embeds=embedded, use_cache=False).logits for each in (model, stock))
        assert_close(ours, theirs)


def test_no_tokens_at_all() -> None:
    model, stock = llama(), llama()
    hfopt.optimize(model)
    with torch.no_grad():
        empty = torch.empty(2, 0, 64)
        assert model.model.layers[0].mlp(empty).shape == stock.model.layers[0].mlp(empty).shape == (2, 0, 64)
        assert model.lm_head(empty).shape == (2, 0, 211)


# ---- weights that change -----------------------------------------------------------------------------------


def _new_parameter(linear: Any) -> None:
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


def _new_data(linear: Any) -> None:
    linear.weight.data = linear.weight.data * 2


def _in_place(linear: Any) -> None:
    with torch.no_grad():
        linear.weight.mul_(2)


def _new_bias(linear: Any) -> None:
    linear.bias = nn.Parameter(torch.ones(linear.out_features))


@pytest.mark.parametrize("change", [_new_parameter, _new_data, _in_place, _new_bias])
@pytest.mark.parametrize("path", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "lm_head"])
def test_changed_weights_are_read(path: str, change: Callable[[Any], None], kernels: list[str]) -> None:
    model, stock = llama(), llama()
    hfopt.optimize(model)
    before = logits(model)
    for each in (model, stock):
        change(each.get_submodule(path))
    kernels.clear()
    after = logits(model)
    assert not torch.allclose(before, after)
    assert_close(after, logits(stock))
    assert kernels.count("attend") == 2


def test_a_conversion_after_optimize(kernels: list[str]) -> None:
    model, stock = llama(), llama()
    hfopt.optimize(model)
    logits(model)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        kernels.clear()
        ours, theirs = logits(model.to(dtype)), logits(stock.to(dtype))
        assert (ours - theirs).norm() < 0.1 * theirs.norm()
        assert bool(kernels) == (dtype is not torch.float64)
        assert ours.dtype is dtype


def test_classes_keep_their_name_and_ancestry() -> None:
    model, stock = hfopt.optimize(llama()), llama()
    assert repr(model) == repr(stock)
    for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
        assert isinstance(ours, type(theirs)) and original_class(ours) is type(theirs)
