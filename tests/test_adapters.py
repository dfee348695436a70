"""LoRA adapters of peft keep the program: the tokens are those of peft's own layers, in every mode, however adapters are
switched, and prompts and steps go through no module.
"""

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import hfopt
from hfopt import host
from hfopt.patches.replacement import Replacement
from tests.generation_cases import Model, gptj, llama, needs_programs, one_thread, opt, phi3, prompts
from tests.model_types import tiny
from tests.step_cases import programs_of

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.usefixtures(one_thread.__name__),
    needs_programs,
    # peft asks transformers for it
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*merged:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*(multiple adapters|[Aa]dapter):UserWarning"),
]

MODELS: dict[str, Callable[[], Model]] = {
    "llama": llama,
    "gptj": gptj,
    "opt": opt,
    "phi3": phi3,
    "gpt_neox": lambda: tiny("gpt_neox"),
    "gpt2": lambda: tiny("gpt2"),
}
BASE = host.NO_ADAPTER
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 4},
    "named rows": {"adapter_names": ["red", BASE, "blue"]},
    "named beams": {"num_beams": 4, "adapter_names": ["blue", "red", BASE]},
}


def config(rank: int = 4, **options: Any) -> Any:
    # OPT has Linears around its layers, too
    around = ["project_in", "project_out"]
    given = {
        "target_modules": "all-linear",
        "exclude_modules": around,
        "init_lora_weights": False,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
    }
    return peft.LoraConfig(r=rank, **{**given, **options})


def with_adapters(model: Model, **options: Any) -> Any:
    """The model with adapters "red" around all Linears of its layers, and "blue" of a rank that is no power of two."""
    torch.manual_seed(9)
    adapted = peft.get_peft_model(model, config(**options), "red")
    adapted.add_adapter("blue", config(rank=21, **options))
    return adapted.eval()


def pair(family: str = "llama", **options: Any) -> tuple[Any, Any]:
    """(optimized, stock) with the same adapters."""
    return hfopt.optimize(with_adapters(MODELS[family](), **options), kernels="hfopt"), with_adapters(
        MODELS[family](), **options
    )


def base_of(model: Any) -> Model:
    return next(each for each in model.modules() if isinstance(each, PreTrainedModel))


def tokens(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(5)
    given = prompts()
    given["input_ids"] = given["input_ids"] % base_of(model).config.vocab_size
    found: Tensor = model.generate(**given, **{"max_new_tokens": 8, "do_sample": False, **options})
    return found


def assert_program_gives_the_same(ours: Any, stock: Any, **options: Any) -> None:
    """The tokens of stock's own modules, without a call of ours."""
    expected = tokens(stock, **options)
    assert torch.equal(tokens(ours, **options), expected)  # the first time may rehearse
    with no_calls(ours):
        assert torch.equal(tokens(ours, **options), expected)


@contextlib.contextmanager
def no_calls(model: Any) -> Iterator[None]:
    """Within, no module of the model's layers may be called."""

    def called(*args: Any) -> None:
        raise AssertionError("a module was called")

    # found by the watch, were it a hook of the model: the embedding's class is asked instead
    embedding = base_of(model).get_input_embeddings()
    kind: Any = type(embedding)
    forward = kind.forward
    kind.forward = lambda self, *args: called() if self is embedding else forward(self, *args)
    try:
        yield
    finally:
        kind.forward = forward


@pytest.mark.parametrize("family", MODELS)
def test_all_modes(family: str) -> None:
    ours, stock = pair(family)
    assert hfopt.explain(ours).by_module is None and not hfopt.explain(ours).idle
    # OPT lays rows and tokens together, which peft cannot tell the adapters of any more
    modes = {name: each for name, each in MODES.items() if family != "opt" or "adapter_names" not in each}
    for options in modes.values():
        assert_program_gives_the_same(ours, stock, **options)
    for model in (ours, stock):
        model.set_adapter("blue")
    assert_program_gives_the_same(ours, stock)
    for model in (ours, stock):
        model.base_model.set_adapter(["red", "blue"])
    assert_program_gives_the_same(ours, stock)
    with ours.disable_adapter(), stock.disable_adapter():
        assert_program_gives_the_same(ours, stock)
        assert_program_gives_the_same(ours, stock, **MODES["beams"])
    assert_program_gives_the_same(ours.unload(), stock.unload())


def both(models: tuple[Any, Any], change: Callable[[Any], Any]) -> None:
    for model in models:
        change(model)


def layer(model: Any) -> Any:
    """One of peft's layers."""
    return base_of(model).model.layers[1].self_attn.q_proj


def a_of(model: Any) -> Any:
    return layer(model).lora_A["red"]


def _replace(model: Any) -> None:
    a_of(model).weight = nn.Parameter(a_of(model).weight.detach() * 3)


def _move(model: Any) -> None:
    a_of(model).weight.data = a_of(model).weight.data * 2


def _in_place(model: Any) -> None:
    a_of(model).weight.data.mul_(-1.5)


def _add(model: Any) -> None:
    torch.manual_seed(3)
    model.add_adapter("green", config(rank=3, target_modules=["v_proj", "gate_proj"], lora_dropout=0))
    model.set_adapter("green")  # its modules are in training mode, as peft makes them


def _change_base(model: Any) -> None:
    layer(model).base_layer.weight = nn.Parameter(layer(model).base_layer.weight.detach() * 0.5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "switched": lambda model: model.set_adapter("blue"),
    "back": lambda model: model.set_adapter("red"),
    "scaled": lambda model: layer(model).set_scale("red", 3.0),
    "scaled by hand": lambda model: layer(model).scaling.update(red=-2.0),
    "in place": _in_place,
    "moved": _move,
    "replaced": _replace,
    "two of one layer": lambda model: layer(model).set_adapter(["red", "blue"]),
    "off": lambda model: model.base_model.disable_adapter_layers(),
    "on": lambda model: model.base_model.enable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "unmerged": lambda model: model.unmerge_adapter(),
    "base": _change_base,
    "added": _add,
    "deleted": lambda model: model.delete_adapter("green"),
    "red again": lambda model: model.set_adapter("red"),
}


def test_whatever_changes_is_seen() -> None:
    models = pair()
    for name, change in CHANGES.items():
        both(models, change)
        assert torch.equal(*(tokens(model) for model in models)), name
        assert hfopt.explain(models[0]).by_module is None, name
        with no_calls(models[0]):
            tokens(models[0])


def test_an_adapter_that_drops_inputs_as_in_training() -> None:
    ours, stock = pair()
    for model in (ours, stock):
        torch.manual_seed(5)
        model.add_adapter("new", config(lora_dropout=0.5))
        model.set_adapter("new")
    assert "adapter 'new' drops inputs, as in training" in str(hfopt.explain(ours).by_module)
    both((ours, stock), lambda model: model.eval())
    assert_program_gives_the_same(ours, stock)


def test_switching_makes_no_other_program() -> None:
    ours, _ = pair()
    tokens(ours)
    programs = programs_of(base_of(ours))
    made = programs._made
    for name in ("switched", "scaled", "in place", "moved", "replaced", "off", "on", "back"):
        CHANGES[name](ours)
        tokens(ours)
        assert programs._made is made, name
    tokens(ours, adapter_names=["blue", BASE, "red"])
    assert programs._made is made


def test_explain_names_adapters() -> None:
    ours, _ = pair()
    text = str(hfopt.explain(ours))
    assert "a decode step is one call; LoRA adapters: red (rank 4, active), blue (rank 21)" in text
    assert "adapters" in {line.name for line in hfopt.explain(ours).program.instructions}  # type: ignore[union-attr]
    with ours.disable_adapter():
        assert "red (rank 4), blue (rank 21)" in str(hfopt.explain(ours))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantised_bases(family: str) -> None:
    """peft's own layers around the same packed matrices are what the program is compared with."""
    model = hfopt.optimize(MODELS[family](), quantization="int8", kernels="hfopt")
    ours = with_adapters(model)
    for options in MODES.values():
        found = tokens(ours, **options)
        with no_calls(ours):
            assert torch.equal(tokens(ours, **options), found)
        layers = [each for each in ours.modules() if host.is_adapted(each)]
        hooks = [each.register_forward_hook(lambda *_: None) for each in layers]
        assert "has hooks" in str(hfopt.explain(ours).by_module)
        assert torch.equal(tokens(ours, **options), found)
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("is_wide", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_close_as_stock(dtype: torch.dtype, is_wide: bool) -> None:
    """Adapters are float32 beside them, unless they are told not to be."""
    models = [with_adapters(llama()) for _ in range(3)]
    exact, stock, ours = models
    for model in (stock, ours):
        model.to(dtype)
        for name, weight in model.named_parameters():
            if "lora" in name and is_wide:
                weight.data = weight.data.float()
    state = {name: each.float() for name, each in stock.state_dict().items()}
    exact.load_state_dict(state)
    hfopt.optimize(ours, kernels="hfopt")
    assert hfopt.explain(ours).by_module is None
    found = {}
    for name, model in zip(("exact", "stock", "ours"), models, strict=True):
        model.base_model.set_adapter(["red", "blue"])
        with torch.no_grad():
            found[name] = model(**prompts()).logits[:, -4:].float()
    errors = [(found[name] - found["exact"]).square().mean().sqrt() for name in ("ours", "stock")]
    assert 0 < errors[0] <= 1.5 * errors[1]
    with no_calls(ours):
        tokens(ours, adapter_names=["blue", BASE, "red"])


OTHERS: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: config(use_dora=True),
    "bias": lambda: config(lora_bias=True, target_modules=["fc1", "q_proj", "v_proj", "down_proj"]),
    "lm_head": lambda: config(target_modules=["q_proj", "lm_head"]),
    "embedding": lambda: config(target_modules=["q_proj", "embed_tokens"]),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "saved modules": lambda: config(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_others_go_module_by_module(name: str) -> None:
    models: list[Any] = []
    for _ in range(2):
        torch.manual_seed(4)
        models.append(peft.get_peft_model(llama(), OTHERS[name]()).eval())
    ours, stock = models
    hfopt.optimize(ours, kernels="hfopt")
    assert hfopt.explain(ours).by_module is not None
    assert torch.equal(tokens(ours), tokens(stock))
    assert torch.equal(tokens(ours, num_beams=4), tokens(stock, num_beams=4))


@pytest.mark.parametrize(
    ("kind", "reason"), [("use_dora", "is a DoraLinearVariant"), ("lora_bias", "has more than two matrices")]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_layer_of_another_kind_leaves_the_others_alone(kind: str, reason: str) -> None:
    torch.manual_seed(4)
    adapter = config(**{kind: True}, target_modules=r".*layers\.0\.self_attn\.q_proj")
    model = hfopt.optimize(peft.get_peft_model(llama(), adapter).eval(), kernels="hfopt")
    kept = {each.path.partition("layers.")[2]: each.reason for each in hfopt.explain(model).kept}
    assert kept["0.self_attn"] == f"q_proj is called itself: adapter 'default' {reason}"
    assert "1.self_attn" not in kept


def test_an_adapter_of_another_kind_beside_one() -> None:
    models = pair()
    for model in models:
        torch.manual_seed(2)
        model.add_adapter("dora", config(use_dora=True))
        model.eval()
    assert_program_gives_the_same(*models)
    both(models, lambda model: model.set_adapter("dora"))
    assert "adapter 'dora' is a DoraLinearVariant" in str(hfopt.explain(models[0]).by_module)
    assert torch.equal(*(tokens(model) for model in models))
    both(models, lambda model: model.set_adapter("blue"))
    assert_program_gives_the_same(*models)


def test_optimized_before_and_merged() -> None:
    models = with_adapters(hfopt.optimize(llama(), kernels="hfopt")), with_adapters(llama())
    assert_program_gives_the_same(*models)
    assert_program_gives_the_same(*(model.merge_and_unload() for model in models))


def test_layers_in_the_model_itself() -> None:
    """As `load_adapter` and `add_adapter` of transformers put them there."""
    models: list[Any] = [hfopt.optimize(llama(), kernels="hfopt"), llama()]
    for model in models:
        torch.manual_seed(6)
        peft.inject_adapter_in_model(config(), model, "red")
        peft.inject_adapter_in_model(config(rank=8, target_modules=["o_proj", "up_proj"]), model, "blue")
        model.eval()
    ours, stock = models
    assert_program_gives_the_same(ours, stock)
    for change in (
        lambda each: each.set_adapter("blue"),
        lambda each: each.enable_adapters(False),
        lambda each: each.enable_adapters(True),
        lambda each: each.set_adapter("red"),
        lambda each: each.delete_adapter("blue") if "blue" in each.lora_A else None,
    ):
        for model in models:
            for each in model.modules():
                if host.is_adapted(each):
                    change(each)
        assert_program_gives_the_same(ours, stock)


def test_copies_and_pickles() -> None:
    ours, stock = pair()
    tokens(ours)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        other.set_adapter("blue")
        stock.set_adapter("blue")
        assert_program_gives_the_same(other, stock)
    stock.set_adapter("red")
    assert_program_gives_the_same(ours, stock)
    hfopt.restore(ours)
    assert not any(isinstance(each, Replacement) for each in ours.modules())
    assert torch.equal(tokens(ours), tokens(stock))


def test_training_changes_what_is_generated() -> None:
    models = pair()
    for model in models:
        model.train()
        torch.manual_seed(1)
        loss = model(**prompts(), labels=prompts()["input_ids"]).loss
        loss.backward()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        assert gradients
        torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5).step()
        model.zero_grad()
        model.eval()
    assert_program_gives_the_same(*models)


def test_a_wrong_number_of_names() -> None:
    models = pair()
    for model in models:
        with pytest.raises(ValueError, match="non-existing"):
            tokens(model, adapter_names=["red", "grey", "blue"])
        # which peft finds in its layers, and leaves its hooks on them
        with pytest.raises(ValueError, match="should be the same as the number of inputs"):
            tokens(model, adapter_names=["red"])


def test_switching_in_the_middle_of_a_request() -> None:
    from transformers.generation import StoppingCriteria, StoppingCriteriaList

    class Switches(StoppingCriteria):
        def __init__(self, model: Any) -> None:
            self.model, self.n = model, 0

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            self.n += 1
            self.model.set_adapter("blue" if self.n % 4 >= 2 else "red")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    ours, stock = pair()
    found = [tokens(each, stopping_criteria=StoppingCriteriaList([Switches(each)])) for each in (ours, stock)]
    assert torch.equal(*found)
    for each in (ours, stock):
        each.set_adapter("red")
    assert not torch.equal(found[0], tokens(ours))


def test_classes_of_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """That compute something else, or have an attribute that nobody knows, are called themselves."""
    ours, stock = pair()
    assert_program_gives_the_same(ours, stock)
    layer(ours).gate, layer(stock).gate = 0.5, 0.5
    assert not host.is_adapted(layer(ours))
    assert hfopt.explain(ours).by_module is not None
    assert torch.equal(tokens(ours), tokens(stock))
    del layer(ours).gate, layer(stock).gate
    assert_program_gives_the_same(ours, stock)
    kind: Any = type(layer(ours))
    forward = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda self, x, *args, **kwargs: forward(self, 2 * x, *args, **kwargs)
    )
    assert not host.is_adapted(layer(ours))
    assert torch.equal(tokens(ours), tokens(stock))
