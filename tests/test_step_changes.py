"""Whoever wants to look inside a step gets the modules, and the program is back when the cause is gone."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import accelerate.hooks
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel
from transformers.generation import BaseStreamer, StoppingCriteria

import hfopt
from hfopt.errors import InvalidInput, UnsupportedModel
from hfopt.functional import choice, choice_file
from hfopt.generation import Installed, installed, keep
from hfopt.program.programs import Programs
from hfopt.program.watch import Watch
from tests.change_cases import register, registered
from tests.generation_cases import (
    CACHE,
    FAMILIES,
    Doubled,
    Model,
    gptj,
    llama,
    needs_programs,
    one_thread,
    opt,
    prompts,
)
from tests.step_cases import (
    assert_program_is_the_modules,
    assert_same_bits,
    generated,
    modules_alone,
    optimized,
    passes,
    programs_of,
    prove,
    rehearsals,
    take_programs,
)

__all__ = ["passes", "rehearsals"]  # fixtures

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

N_TOKENS = 12
Change = Callable[[Model], None]


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class OtherNorm(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states / hidden_states.abs().mean(-1, keepdim=True)


class ByStreamer(BaseStreamer):
    """Makes a change before the step of a certain number."""

    def __init__(self, model: Model, changes: dict[int, Change]) -> None:
        self.model, self.changes, self.n_put = model, changes, -1

    def put(self, value: Tensor) -> None:
        self.n_put += 1  # the prompt comes first
        if self.n_put in self.changes:
            self.changes[self.n_put](self.model)

    def end(self) -> None:
        pass


class ByCriterion(StoppingCriteria):
    """As `ByStreamer`."""

    def __init__(self, model: Model, changes: dict[int, Change]) -> None:
        self.streamer = ByStreamer(model, changes)
        self.streamer.n_put = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.streamer.put(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


# ---- causes: what is done to a model and undone ------------------------------------------------------------


@contextmanager
def hook(model: Model, path: str, is_pre_hook: bool = False) -> Iterator[None]:
    def change(module: nn.Module, args: Any, output: Any = None) -> Any:
        if is_pre_hook:
            return tuple(value * 1.1 if value.is_floating_point() else (value + 1) % 50 for value in args)
        if isinstance(output, Tensor):
            return output * 1.1
        output["logits"] = output["logits"] * 1.1
        return output

    module = model.get_submodule(path)
    register = module.register_forward_pre_hook if is_pre_hook else module.register_forward_hook
    handle = register(change)
    yield
    handle.remove()


@contextmanager
def another(model: Model, path: str, make: Callable[[Any], nn.Module]) -> Iterator[None]:
    own = model.get_submodule(path)
    model.set_submodule(path, make(own).eval())
    yield
    model.set_submodule(path, own)


@contextmanager
def own_forward(model: Model, path: str) -> Iterator[None]:
    module: Any = model.get_submodule(path)
    module.forward = lambda hidden_states: nn.functional.linear(hidden_states, 2 * module.weight)
    yield
    del module.forward


@contextmanager
def training(model: Model, path: str) -> Iterator[None]:
    model.get_submodule(path).train()
    yield
    model.eval()


@contextmanager
def parametrized(model: Model, path: str) -> Iterator[None]:
    parametrize.register_parametrization(model.get_submodule(path), "weight", Half())
    yield
    parametrize.remove_parametrizations(model.get_submodule(path), "weight", leave_parametrized=False)


@contextmanager
def accelerated(model: Model, path: str) -> Iterator[None]:
    module = model.get_submodule(path)
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    yield
    accelerate.hooks.remove_hook_from_module(module)


@contextmanager
def compiled(model: Model, path: str) -> Iterator[None]:
    module = model.get_submodule(path)
    module.compile(backend="eager")
    yield
    del module._compiled_call_impl


@contextmanager
def norm_limit(model: Model) -> Iterator[None]:
    model.model.embed_tokens.max_norm = 1.0
    yield
    model.model.embed_tokens.max_norm = None


@contextmanager
def configured(model: Model, name: str, value: Any = True) -> Iterator[None]:
    before = getattr(model.config, name, ...)
    setattr(model.config, name, value)
    yield
    if before is ...:
        delattr(model.config, name)
    else:
        setattr(model.config, name, before)


@contextmanager
def attribute(model: Model, path: str, name: str, value: Any) -> Iterator[None]:
    module = model.get_submodule(path)
    before = getattr(module, name)
    setattr(module, name, value)
    yield
    setattr(module, name, before)


@contextmanager
def attention(model: Model, name: str | None = None, registration: str | None = None) -> Iterator[None]:
    """Of the user: under a name of its own, or under that of transformers' own."""
    with registered(), configured(model, "_attn_implementation", name or model.config._attn_implementation):
        if registration is not None:
            register(registration)
        yield


_LAYER, _LINEAR = "model.layers.1", "model.layers.1.mlp.down_proj"
# name: the cause, and what `explain` says of it
CAUSES: dict[str, tuple[Callable[[Model], Any], str]] = {
    "hook on a Linear": (lambda model: hook(model, _LINEAR), _LINEAR),
    "hook on a norm": (lambda model: hook(model, "model.norm"), "model.norm"),
    "hook on an activation": (lambda model: hook(model, f"{_LAYER}.mlp.act_fn"), "act_fn"),
    "hook on the embedding": (lambda model: hook(model, "model.embed_tokens"), "embed_tokens"),
    "hook on lm_head": (lambda model: hook(model, "lm_head"), "lm_head"),
    "hook on the model": (lambda model: hook(model, ""), "the model has hooks"),
    "pre-hook on a Linear": (lambda model: hook(model, _LINEAR, True), _LINEAR),
    "pre-hook on the embedding": (lambda model: hook(model, "model.embed_tokens", True), "embed_tokens"),
    "pre-hook on lm_head": (lambda model: hook(model, "lm_head", True), "lm_head"),
    "pre-hook on the model": (lambda model: hook(model, "", True), "the model has hooks"),
    "adapter": (lambda model: another(model, _LINEAR, Doubled), "down_proj"),
    "adapter around lm_head": (lambda model: another(model, "lm_head", Doubled), "lm_head is a Doubled"),
    "adapter around attention": (lambda model: another(model, f"{_LAYER}.mlp", Doubled), "mlp is a Doubled"),
    "unknown norm": (lambda model: another(model, "model.norm", lambda own: OtherNorm()), "OtherNorm"),
    "another activation": (
        lambda model: another(model, f"{_LAYER}.mlp.act_fn", lambda own: nn.Softsign()),
        "Softsign",
    ),
    "forward of a Linear": (lambda model: own_forward(model, _LINEAR), "forward of its own"),
    "training": (lambda model: training(model, ""), "training mode"),
    "training of a part": (lambda model: training(model, f"{_LAYER}.self_attn"), "self_attn is in training"),
    "parametrization": (lambda model: parametrized(model, _LINEAR), "down_proj"),
    "accelerate": (lambda model: accelerated(model, f"{_LAYER}.mlp"), "mlp"),
    "accelerate on the model": (lambda model: accelerated(model, ""), "the model has a forward"),
    "compiled part": (lambda model: compiled(model, f"{_LAYER}.mlp"), "forward of its own"),
    "limited embedding": (norm_limit, "does more than look up"),
    "attribute that nobody reads": (
        lambda model: attribute(model, f"{_LAYER}.mlp", "intermediate_size", 5),
        "intermediate_size is 5 now, not 96",
    ),
    "attribute of another type": (
        lambda model: attribute(model, f"{_LAYER}.self_attn", "scaling", torch.tensor(0.5)),
        "scaling is a Tensor now, not a float",
    ),
    "attention of the user": (
        lambda model: attention(model, "damped"),
        "attention 'damped' is not transformers' own",
    ),
    "attention in place of its own": (
        lambda model: attention(model, registration=f"attention {model.config._attn_implementation}"),
        "is not transformers' own",
    ),
    "masks in place of its own": (
        lambda model: attention(model, registration=f"mask {model.config._attn_implementation}"),
        "is not transformers' own",
    ),
    "attention both ways": (lambda model: configured(model, "is_causal", False), "is_causal=False"),
    "output_attentions": (lambda model: configured(model, "output_attentions"), "output_attentions"),
    "output_hidden_states": (lambda model: configured(model, "output_hidden_states"), "output_hidden_states"),
}
# a request reads these when it begins
SETTINGS = ("output_attentions", "output_hidden_states", "limited embedding")
# another way to call, which `generate` of the class does not see
IN_BETWEEN = [name for name in CAUSES if name not in (*SETTINGS, "accelerate on the model")]


@pytest.mark.parametrize("name", CAUSES)
def test_a_cause_before_a_request(name: str, passes: list[int]) -> None:
    model, stock = llama(attn_implementation="eager"), llama(attn_implementation="eager")
    optimized(model)
    prove(model)
    cause, reason = CAUSES[name]
    given = {"max_new_tokens": N_TOKENS, "do_sample": False}
    with cause(stock):
        expected = generated(stock, given)
    with cause(model):
        assert reason in str(hfopt.explain(model).by_module)
        passes.clear()
        found = generated(model, given)
        assert len(passes) == N_TOKENS
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-3)
    # back again
    assert hfopt.explain(model).by_module is None
    passes.clear()
    generated(model, given)
    assert len(passes) <= 2
    assert_program_is_the_modules(model, passes, **given)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("by", ["streamer", "criterion"])
@pytest.mark.parametrize("name", IN_BETWEEN)
def test_a_cause_in_between(name: str, by: str, passes: list[int], rehearsals: list[str | None]) -> None:
    model = optimized(llama())
    prove(model)
    twin, stock = copy.deepcopy(model), llama()

    def run(which: Model) -> Any:
        entered: list[Any] = []

        def begin(model: Model) -> None:
            entered.append(CAUSES[name][0](model))
            entered[0].__enter__()

        def end(model: Model) -> None:
            entered[0].__exit__(None, None, None)

        given = {"max_new_tokens": N_TOKENS, "do_sample": False}
        changes: dict[int, Change] = {4: begin, 8: end}
        if by == "streamer":
            return generated(which, given, streamer=ByStreamer(which, changes))
        return generated(which, given, stopping_criteria=[ByCriterion(which, changes)])

    passes.clear()
    rehearsals.clear()
    ours = run(model)
    assert len(passes) == 4
    # a model that has changed shows once more that its program is right, where anybody has looked
    assert len(rehearsals) == (name != "training" and not name.endswith("hook on the model"))
    with modules_alone(twin):
        assert_same_bits(ours, run(twin))
    assert torch.equal(ours.sequences, run(stock).sequences)


def test_a_layer_with_another_attention() -> None:
    model, stock = llama(), llama()
    optimized(model)
    prove(model)
    for each in (model, stock):
        attention = each.model.layers[1].self_attn
        attention.config = copy.deepcopy(attention.config)
        attention.config._attn_implementation = "eager"
    assert "masks are for 'sdpa', attention is 'eager'" in str(hfopt.explain(model).by_module)
    given = {**prompts(1), "max_new_tokens": N_TOKENS, "do_sample": False}
    assert torch.equal(generated(model, given).sequences, generated(stock, given).sequences)


@pytest.mark.parametrize("is_proven", [False, True])
def test_a_hook_that_takes_itself_away(is_proven: bool, passes: list[int]) -> None:
    """Its step is the modules'."""
    model = optimized(llama())
    if is_proven:
        prove(model)
    handles: list[Any] = []

    def once(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        handles[0].remove()
        return output * 2

    def register(model: Model) -> None:
        handles.append(model.get_submodule(_LINEAR).register_forward_hook(once))

    streamer = ByStreamer(model, {1: register})
    passes.clear()
    generated(model, max_new_tokens=N_TOKENS, do_sample=False, streamer=streamer)
    assert len(passes) == 1
    assert hfopt.explain(model).by_module is None


def test_an_embedding_that_does_more(passes: list[int]) -> None:
    model, stock = llama(), llama()
    for each in (model, stock):
        own = each.model.embed_tokens
        each.model.embed_tokens = Scaled(own.num_embeddings, own.embedding_dim, _weight=own.weight).eval()
    with pytest.raises(
        UnsupportedModel, match="strict: embed_tokens is a Scaled that does more than look up"
    ):
        hfopt.optimize(model, strict=True)
    assert_all_by_modules(optimized(model), stock, passes, "does more than look up")


class ScaledLlama(LlamaModel):
    """Does something between its parts."""

    @functools.wraps(LlamaModel.forward)
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]  # as above
        kwargs.pop("inputs_embeds", None)
        return super().forward(inputs_embeds=2 * self.embed_tokens(input_ids), **kwargs)


@needs_programs
def test_a_decoder_that_does_more(passes: list[int]) -> None:
    """Nothing tells but the rehearsal."""
    model, stock = llama(), llama()
    for each in (model, stock):
        each.model.__class__ = ScaledLlama
    with pytest.raises(
        UnsupportedModel, match="strict: decode steps go module by module: it gives other logits of a prompt"
    ):
        hfopt.optimize(model, strict=True)
    assert_all_by_modules(optimized(model), stock, passes)


class LateLlama(LlamaForCausalLM):
    """Its logits are others behind so many tokens."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # mypy cannot see through `wraps`
        outputs = super().forward(*args, **kwargs)
        positions, n_keys = kwargs.get("position_ids"), kwargs[CACHE].get_seq_length()
        last = 0 if positions is None else int(positions.max())
        if (last if type(self) is LateByPosition else n_keys) > 500:
            outputs.logits = outputs.logits.roll(1, dims=-1)
        return outputs


class LateByPosition(LateLlama):
    """From some position on."""


@needs_programs
@pytest.mark.parametrize("kind", [LateByPosition, LateLlama])
def test_a_model_that_does_something_else_far_away(kind: type[LateLlama], passes: list[int]) -> None:
    model, stock = llama(max_position_embeddings=1024), llama(max_position_embeddings=1024)
    for each in (model, stock):
        each.__class__ = kind
    # tables of 1,000 positions, as real models have
    for each in (model, stock):
        each.model.embed_tokens.weight.data = each.model.embed_tokens.weight.data.repeat(5, 1)[:1024].clone()
    assert_all_by_modules(optimized(model), stock, passes)
    assert "behind a long text" in str(hfopt.explain(model).by_module)


@needs_programs
def test_what_the_rehearsal_does_not_disturb() -> None:
    model = optimized(llama())
    state, numbers = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    keep(model, Installed(Programs("auto")))
    (name,) = (name for name, value in vars(model).items() if value is installed(model))
    assert hfopt.explain(model).by_module is None
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for module, kind, then in before:
        assert type(module) is kind
        assert {key: value for key, value in vars(module).items() if value is not then.get(key)}.keys() <= {
            name
        }


def assert_all_by_modules(
    model: Model, stock: Model, passes: list[int], reason: str = "than its modules"
) -> None:
    given = {"max_new_tokens": N_TOKENS, "do_sample": False}
    expected = generated(stock, given)
    for _ in range(2):
        passes.clear()
        found = generated(model, given)
        assert len(passes) == N_TOKENS
        assert torch.equal(found.sequences, expected.sequences)
    assert reason in str(hfopt.explain(model).by_module)


# ---- what a request asks for -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_argument", [True, False])
@pytest.mark.parametrize("mode", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_outputs_of_all_layers(name: str, mode: dict[str, Any], is_argument: bool, passes: list[int]) -> None:
    model, stock = llama(attn_implementation="eager"), llama(attn_implementation="eager")
    optimized(model)
    prove(model)
    results = []
    for each in (model, stock):
        given = {"max_new_tokens": 6, **mode}
        if is_argument:
            given[name] = True
        else:
            given["generation_config"] = copy.deepcopy(each.generation_config)
            setattr(given["generation_config"], name, True)
            given["generation_config"].return_dict_in_generate = True
        passes.clear()
        results.append(generated(each, given))
        assert len(passes) == 6
    ours, theirs = (getattr(each, name.removeprefix("output_")) for each in results)
    assert len(ours) == len(theirs) == 6
    for step, others in zip(ours, theirs, strict=True):
        assert [each.shape for each in step] == [each.shape for each in others]
        torch.testing.assert_close(step[-1], others[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", ["static", "dynamic", "none"])
def test_other_caches(cache: str, passes: list[int]) -> None:
    model, stock = llama(), llama()
    optimized(model)
    prove(model)
    results = []
    for each in (model, stock):
        given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        if cache == "static":
            given["cache_implementation"] = "static"
            given["disable_compile"] = True
        elif cache == "dynamic":
            given[CACHE] = DynamicCache()
        else:
            given["use_cache"] = False
        passes.clear()
        results.append(generated(each, given))
        assert len(passes) == 6
    assert torch.equal(results[0].sequences, results[1].sequences)


def test_torchs_kernels(passes: list[int]) -> None:
    model = hfopt.optimize(llama(), kernels="torch")
    assert "torch" in str(hfopt.explain(model).by_module)
    generated(model, max_new_tokens=6, do_sample=False)
    assert len(passes) == 6


def test_explain_says_where_torch_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(choice_file, "path", lambda n_threads: tmp_path / f"choices-{n_threads}.json")
    monkeypatch.setattr(choice, "_used", {})
    model = hfopt.optimize(llama())
    assert hfopt.explain(model).by_module is None  # nothing is measured for it
    key = "linear", torch.float32, 1, torch.get_num_threads()
    monkeypatch.setitem(choice._used, key, choice._Verdict.of(0.5))
    assert "measured" in str(hfopt.explain(model).by_module)
    monkeypatch.setitem(choice._used, key, choice._Verdict.of(2.0))
    assert hfopt.explain(model).by_module is None


def test_a_compiled_model(passes: list[int]) -> None:
    model = optimized(llama())
    prove(model)
    expected = generated(model, max_new_tokens=4, do_sample=False)
    with compiled(model, ""):
        assert "the model has a forward" in str(hfopt.explain(model).by_module)
        found = generated(model, max_new_tokens=4, do_sample=False)
    assert torch.equal(found.sequences, expected.sequences)
    assert hfopt.explain(model).by_module is None


def test_autocast(passes: list[int]) -> None:
    model, stock = llama(), llama()
    optimized(model)
    prove(model)
    given = {"max_new_tokens": 6, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in str(hfopt.explain(model).by_module)
        passes.clear()
        found = generated(model, given)
        assert len(passes) == 6
        assert torch.equal(found.sequences, generated(stock, given).sequences)
    assert_program_is_the_modules(model, passes, **given)


def test_hooks_on_all_modules_of_the_process(passes: list[int]) -> None:
    model = optimized(llama())
    prove(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert hfopt.explain(model).by_module is not None
        passes.clear()
        generated(model, max_new_tokens=6, do_sample=False)
        assert len(passes) == 6
    finally:
        handle.remove()
    assert_program_is_the_modules(model, passes, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad, nullcontext])
def test_under_modes_of_autograd(context: Any, passes: list[int]) -> None:
    model = optimized(llama())
    prove(model)
    with context():
        assert hfopt.explain(model).by_module is None
        assert_program_is_the_modules(model, passes, max_new_tokens=6, do_sample=False)


def test_weights_made_in_inference_mode(passes: list[int]) -> None:
    with torch.inference_mode():
        model = optimized(llama())
    prove(model)
    assert_program_is_the_modules(model, passes, max_new_tokens=6, do_sample=False)


# peft asks transformers for it
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family: str, passes: list[int]) -> None:
    peft = pytest.importorskip("peft")
    model, stock = FAMILIES[family](), FAMILIES[family]()
    optimized(model)
    prove(model)
    given = {"max_new_tokens": 8, "do_sample": False}
    results = []
    for each in (model, stock):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(each, config).eval()
        passes.clear()
        results.append(generated(adapted, given))
        assert len(passes) == (0 if each is model else 8)
        merged = adapted.merge_and_unload()
        results.append(generated(merged, given))
    assert torch.equal(results[0].sequences, results[2].sequences)
    assert torch.equal(results[1].sequences, results[3].sequences)
    assert_program_is_the_modules(model, passes, **given)


# ---- weights -----------------------------------------------------------------------------------------------


def _parameter(model: Model, name: str) -> tuple[Any, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def _multiply(model: Model, name: str) -> None:
    module, last = _parameter(model, name)
    getattr(module, last).data.mul_(1.5)


def _copy(model: Model, name: str) -> None:
    module, last = _parameter(model, name)
    with torch.no_grad():
        getattr(module, last).copy_(getattr(module, last).flip(0))


def _new_data(model: Model, name: str) -> None:
    module, last = _parameter(model, name)
    getattr(module, last).data = getattr(module, last).data * 0.75


def _new_parameter(model: Model, name: str) -> None:
    module, last = _parameter(model, name)
    setattr(module, last, nn.Parameter(getattr(module, last).detach() * 1.25))


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_weights_are_seen(family: str, passes: list[int], rehearsals: list[str | None]) -> None:
    model, stock = FAMILIES[family](), FAMILIES[family]()
    optimized(model)
    prove(model)
    twin = copy.deepcopy(model)
    take_programs(twin)
    names = [name for name, _ in stock.named_parameters() if ".1." in name or "layers" not in name]
    assert len(names) > 8
    for name in names:
        changes: dict[int, Change] = {
            place: functools.partial(change, name=name)
            for place, change in ((2, _multiply), (4, _copy), (6, _new_data), (8, _new_parameter))
        }
        results = []
        for each in (model, twin, stock):
            rehearsals.clear()
            given = {"max_new_tokens": 10, "do_sample": False, "streamer": ByStreamer(each, changes)}
            results.append(generated(each, given))
            # once for new memory, and once for a new parameter
            assert len(rehearsals) == (2 if each is model else 0), name
        assert_same_bits(results[0], results[1])
        torch.testing.assert_close(
            torch.stack(results[0].logits), torch.stack(results[2].logits), rtol=1e-3, atol=1e-2
        )


def test_a_square_weight_turned_where_it_is(passes: list[int]) -> None:
    model, stock = llama(), llama()
    optimized(model)
    prove(model)
    for each in (model, stock):
        weight = each.model.layers[0].self_attn.q_proj.weight
        weight.data = weight.data.t()
    assert hfopt.explain(model).by_module is not None
    given = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(generated(model, given).sequences, generated(stock, given).sequences)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_dtype(family: str, passes: list[int]) -> None:
    model = optimized(FAMILIES[family]())
    prove(model)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        prove(model)
        assert programs_of(model)._made.program.dtype is dtype
        assert_program_is_the_modules(model, passes, max_new_tokens=8, do_sample=False)


def test_another_dtype_in_between() -> None:
    """The cache has keys of the old one: the modules refuse that too."""
    model = optimized(llama())
    prove(model)
    twin = copy.deepcopy(model)
    take_programs(twin)
    for each in (model, twin):
        streamer = ByStreamer(each, {3: lambda model: model.to(torch.bfloat16)})
        with pytest.raises(InvalidInput, match="bfloat16"):
            generated(each, max_new_tokens=8, do_sample=False, streamer=streamer)


def test_weights_of_several_dtypes(passes: list[int]) -> None:
    model = optimized(llama())
    prove(model)
    model.lm_head.to(torch.bfloat16)
    assert "bfloat16" in str(hfopt.explain(model).by_module)
    model.lm_head.to(torch.float32)
    prove(model)
    assert_program_is_the_modules(model, passes, max_new_tokens=8, do_sample=False)


def test_restored_in_between() -> None:
    model, stock = optimized(llama()), llama()
    prove(model)

    def restore(model: Model) -> None:
        hfopt.restore(model)

    given = {"max_new_tokens": 8, "do_sample": False}
    found = generated(model, given, streamer=ByStreamer(model, {3: restore}))
    assert torch.equal(found.sequences, generated(stock, given).sequences)
    assert programs_of(model) is None


# ---- the watch ---------------------------------------------------------------------------------------------


class _Other(nn.Linear):
    pass


def _other_class(model: Model) -> None:
    model.lm_head.__class__ = _Other


# what is noticed on any module, even between the steps of a request that runs no code of its user
SEEN_BY_STEPS: dict[str, Change] = {
    "class": _other_class,
    "new attribute": lambda model: setattr(model.model.layers[0].mlp, "forward", print),
    "new attribute of the model": lambda model: setattr(model, "forward", print),
    "less attributes": lambda model: delattr(model.model.layers[0].mlp, "hidden_size"),
    "hook": lambda model: model.model.norm.register_forward_hook(lambda *_: None),
    "pre-hook": lambda model: model.model.norm.register_forward_pre_hook(lambda *_: None),
    "hook on the model": lambda model: model.register_forward_hook(lambda *_: None),
    "training": lambda model: model.model.norm.train(),
    "training of the model alone": lambda model: setattr(model, "training", True),
    "child": lambda model: setattr(model.model, "norm", nn.Identity()),
    "child of the model": lambda model: setattr(model, "lm_head", nn.Identity()),
    "child taken away": lambda model: setattr(model.model.layers[0].mlp, "act_fn", None),
    "layer added": lambda model: model.model.layers.append(nn.Identity()),
    "layer taken away": lambda model: model.model.layers.__delitem__(1),
    "parameter": lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight.data)),
    "parameter taken away": lambda model: model.model.norm.register_parameter("weight", None),
    "memory": lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight.data.clone()),
    "dtype": lambda model: model.to(torch.bfloat16),
    "buffer": lambda model: setattr(
        model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq.clone()
    ),
}
# what each look at the whole model notices
SEEN_BY_LOOKS: dict[str, Change] = {
    "number": lambda model: setattr(model.model.norm, "variance_epsilon", 1e-3),
    "number of another type": lambda model: setattr(model.model.norm, "variance_epsilon", torch.ones(2)),
    "another attribute in its place": lambda model: setattr(
        model.model.norm, "epsilon", vars(model.model.norm).pop("variance_epsilon")
    ),
    "attribute of the model": lambda model: setattr(model, "vocab_size", 5),
    "function": lambda model: setattr(model.model.norm, "function", torch.sin),
    "object": lambda model: setattr(model.model.norm, "object", [1, [2]]),
    "in a list": lambda model: model.model.norm.object.append(3),
    "in a list in a list": lambda model: model.model.norm.object[1].append(3),
    "in a dictionary": lambda model: model.model.norm.table["numbers"].append(3),
    "number of equal value": lambda model: setattr(model.model.norm, "flag", True),
    "tensor": lambda model: setattr(model.model.norm, "tensor", torch.ones(3)),
    "numbers in a tensor": lambda model: model.model.norm.tensor.mul_(2),
    "memory of a tensor": lambda model: setattr(model.model.norm.tensor, "data", torch.ones(3)),
    "field of the config": lambda model: setattr(model.config, "num_hidden_layers", 1),
    "field of equal value": lambda model: vars(model.config).update(num_hidden_layers=2.0),
    "new field of the config": lambda model: setattr(model.config, "another", 1),
    "in a field of the config": lambda model: model.config.rope_parameters.update(rope_theta=5.0),
    "name of the attention": lambda model: model.set_attn_implementation("eager"),
    "another config": lambda model: setattr(model.model, "config", copy.deepcopy(model.config)),
    "attention function": lambda model: register("attention sdpa"),
    "mask function": lambda model: register("mask sdpa"),
    "numbers in a buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    "layout": lambda model: setattr(
        model.model.layers[0].self_attn.q_proj.weight,
        "data",
        model.model.layers[0].self_attn.q_proj.weight.data.t(),
    ),
}


@pytest.mark.parametrize("name", SEEN_BY_STEPS)
def test_a_watch_of_steps(name: str) -> None:
    model = llama()
    watch = Watch(model)
    assert watch.holds() and all(watch.holds_in_part() for _ in range(64))
    SEEN_BY_STEPS[name](model)
    assert not watch.holds() and not all(watch.holds_in_part() for _ in range(64))


@pytest.mark.parametrize("name", SEEN_BY_LOOKS)
def test_a_watch_of_requests(name: str) -> None:
    model = llama()
    norm = model.model.norm
    norm.function, norm.object, norm.table, norm.tensor = torch.cos, [1, [2]], {"numbers": [2]}, torch.ones(3)
    norm.flag = 1
    watch = Watch(model)
    with registered():  # another name
        assert watch.holds()
        SEEN_BY_LOOKS[name](model)
        assert not watch.holds()


@pytest.mark.parametrize("make", [llama, gptj, opt])
def test_a_watch_of_a_model_that_is_used(make: Callable[[], Model]) -> None:
    model = optimized(make())
    prove(model)
    watch = Watch(model)
    generated(model, max_new_tokens=4)
    model.lm_head.weight.data.mul_(2)
    hfopt.explain(model)
    assert watch.holds()


def test_a_watch_of_a_model_that_is_gone() -> None:
    model = llama()
    watch = Watch(model)
    del model
    assert not watch.holds() and not watch.holds_in_part()


def test_a_change_of_numbers_is_in_the_next_request(passes: list[int]) -> None:
    model, stock = llama(), llama()
    optimized(model)
    prove(model)
    given = {"max_new_tokens": 8, "do_sample": False}
    for each in (model, stock):
        each.model.norm.variance_epsilon = 0.5
        each.model.rotary_emb.inv_freq.mul_(0.5)
    assert torch.equal(generated(model, given).sequences, generated(stock, given).sequences)
    assert_program_is_the_modules(model, passes, **given)


class _Wrapper(Tensor):
    """A tensor without memory of its own, as quantised weights are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.own = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def unwrapped(value: Any) -> Any:
            return value.own if isinstance(value, _Wrapper) else value

        found = func(*map(unwrapped, args), **(kwargs or {}))
        return _Wrapper(found) if func is torch.ops.aten.detach.default else found


def test_weights_without_memory_of_their_own(passes: list[int]) -> None:
    model, stock = llama(), llama()
    own = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(_Wrapper(own.detach()), requires_grad=False)
    optimized(model)
    assert "mlp" in str(hfopt.explain(model).by_module)
    given = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(generated(model, given).sequences, generated(stock, given).sequences)
