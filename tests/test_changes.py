"""Whatever is changed between two requests: generate, forward and functional calls go on doing what stock does."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.activations import GELUActivation
from transformers.generation import BaseStreamer

import hfopt
from hfopt.cache import IndirectCache
from hfopt.patches.facts import Facts
from tests.change_cases import PATTERNS, Change, changes, damped, registered
from tests.generation_cases import CACHE, Model, gptj, llama, needs_programs, one_thread, prompts
from tests.step_cases import assert_program_is_the_modules, passes, prove, rehearsals

__all__ = ["passes", "rehearsals"]  # fixtures

pytestmark = [pytest.mark.usefixtures(one_thread.__name__), needs_programs]

LENGTH, N_TOKENS = 7, 5
# floats of two ways to compute the same thing, as shares of the largest
TOLERANCE = 2e-4
MODES: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}}


@functools.cache
def _models(pattern: str) -> tuple[Model, Model]:
    stock = PATTERNS[pattern]()
    return stock, hfopt.optimize(copy.deepcopy(stock), kernels="hfopt")


def copies(pattern: str) -> tuple[Model, Model]:
    """The same model twice: stock, and optimised."""
    stock, fast = map(copy.deepcopy, _models(pattern))
    return stock, fast


def outcome(call: Any) -> Any:
    """What it returns or raises."""
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return call()
    except Exception as error:  # noqa: BLE001  (whatever a changed model raises)
        return error


def generated(model: Model, mode: str, n_rows: int = 2, change: Change | None = None) -> Any:
    """n_rows: of which the second one is padded. change: made before the third token."""
    given = {**prompts(n_rows, LENGTH), **MODES[mode], "do_sample": False, "max_new_tokens": N_TOKENS}
    given |= {"return_dict_in_generate": True, "output_logits": True}
    if change is not None:
        given["streamer"] = Changing(model, change)
    return outcome(lambda: model.generate(**given))


class Changing(BaseStreamer):
    """Makes a change in the middle of a request."""

    def __init__(self, model: Model, change: Change) -> None:
        self.model, self.change, self.n_put = model, change, 0

    def put(self, value: Tensor) -> None:
        self.n_put += 1  # the prompt comes first
        if self.n_put == 3:
            self.change.make(self.model)

    def end(self) -> None:
        pass


def logits(model: Model, n_rows: int = 2) -> Any:
    """[n_rows, length, n_tokens]; zeros where there is padding, of which nothing is promised."""
    given = prompts(n_rows, LENGTH)
    return outcome(lambda: model(**given, return_dict=True).logits * given["attention_mask"][..., None])


def called_with_others(model: Model) -> Any:
    """Logits of the model with another parameter for this call alone."""
    parameters = dict(model.named_parameters())
    name = list(parameters)[len(parameters) // 2]
    others = {name: parameters[name] * 1.5}
    call = torch.func.functional_call
    return outcome(lambda: call(model, others, (), {**prompts(1, 5), "return_dict": True}).logits)


def is_close(ours: Tensor, stock: Tensor) -> bool:
    scale = float(stock.abs().nan_to_num(0, 0, 0).max())
    return torch.allclose(ours, stock, rtol=0, atol=TOLERANCE * scale + 1e-6, equal_nan=True)


def assert_same_outcome(ours: Any, stock: Any) -> None:
    """Equal tokens, unless those that differ were as likely; close logits; the same kind of error."""
    if isinstance(stock, Exception) or isinstance(ours, Exception):
        assert isinstance(ours, type(stock)), f"stock {stock!r}"
        return
    if isinstance(stock, Tensor):
        assert is_close(ours, stock)
        return
    if hasattr(stock, "beam_indices"):
        if not torch.equal(ours.sequences, stock.sequences):
            torch.testing.assert_close(ours.sequences_scores, stock.sequences_scores, rtol=1e-3, atol=1e-3)
        return
    for step, (one, other) in enumerate(zip(ours.logits, stock.logits, strict=True)):
        alike = (ours.sequences == stock.sequences)[:, : LENGTH + step].all(dim=1)
        assert not alike.any() or is_close(one[alike], other[alike]), f"logits of step {step}"


def check(pattern: str, when: str, made: list[Change]) -> None:
    stock, fast = copies(pattern)
    # masks have the length of a layer that may be no longer there, and then show keys of padding
    n_rows = 1 if any(change.kind == "layers" for change in made) else 2
    if when != "first":
        generated(fast, "greedy")
    with registered():
        for change in made:
            note(f"{pattern}: {change}")
            if change.kind == "registered":
                change.make(stock)  # for all
            elif when == "in between":
                # another mask may show what was padding
                ours, theirs = (generated(each, "greedy", 1, change) for each in (fast, stock))
                assert_same_outcome(ours, theirs)
            else:
                try:
                    change.make(stock)
                except Exception:  # noqa: BLE001  (transformers checks some fields when they are set)
                    continue
                change.make(fast)
            for mode in ("beams", "greedy"):
                ours, theirs = generated(fast, mode, n_rows), generated(stock, mode, n_rows)
                assert_same_outcome(ours, theirs)
            whole, their_whole = logits(fast, n_rows), logits(stock, n_rows)
            assert_same_outcome(whole, their_whole)
            assert_same_outcome(called_with_others(fast), called_with_others(stock))
            if agree(theirs, their_whole):
                assert agree(ours, whole), "the first token of generate is another one than that of forward"


def agree(generated: Any, whole: Any) -> bool:
    """Whether a greedy request began with the logits that a call gave."""
    if isinstance(generated, Exception) or isinstance(whole, Exception):
        return False
    return is_close(generated.logits[0], whole[:, -1])


@st.composite
def examples(draw: Any) -> tuple[str, str, list[Change]]:
    """(pattern, when the changes are made: before the first request, later, or in one, changes)."""
    pattern = draw(st.sampled_from(sorted(PATTERNS)))
    made = draw(st.lists(changes(_models(pattern)[0]), min_size=1, max_size=2))
    return pattern, draw(st.sampled_from(("first", "later", "in between"))), made


# examples are slow to draw, because models are made for them
COMMON = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(COMMON, max_examples=30, derandomize=True)
@given(examples())
@example(("llama", "later", [Change("config", "", "num_hidden_layers", 2)]))
@example(("llama", "in between", [Change("config", "", "_attn_implementation", "damped")]))
@example(("gptj", "later", [Change("config", "", "_attn_implementation", "sdpa")]))
@example(("llama", "later", [Change("registered", "", "mask sdpa")]))
@example(("llama", "later", [Change("config", "", "is_causal", False)]))
@example(
    (
        "llama",
        "later",
        [Change("another config", "model.layers.1.self_attn", "_attn_implementation", "eager")],
    )
)
@example(("opt", "later", [Change("attribute", "model.decoder.embed_positions", "offset", 2.0)]))
@example(
    ("llama, leaky relu", "later", [Change("attribute", "model.layers.1.mlp.act_fn", "negative_slope", 0.5)])
)
@example(("gptj", "later", [Change("buffer", "transformer.h.1.attn", "embed_positions", "end")]))
@example(("gptj", "later", [Change("child", "transformer.h.2.attn", "attn_dropout", "wrapped")]))
@example(("gptj", "later", [Change("child", "transformer", "drop", "wrapped")]))
@example(
    ("opt", "later", [Change("layers", "model.decoder.layers", "", each) for each in ("turned", "less")])
)
def test_a_change_is_seen(example: tuple[str, str, list[Change]]) -> None:
    check(*example)


@pytest.mark.slow
@settings(COMMON, max_examples=3000)
@given(examples())
def test_many_changes_are_seen(example: tuple[str, str, list[Change]]) -> None:
    check(*example)


# ---- depth and attention, which stock looks up in each call ----------------------------------------------------------


@pytest.fixture
def pair() -> tuple[Model, Model]:
    """Stock, and optimised."""
    return copies("llama")


@pytest.mark.parametrize("when", ["before optimize", "before the first request", "later"])
def test_less_layers_by_the_configuration(when: str, passes: list[int]) -> None:
    stock, fast = llama(num_hidden_layers=4), llama(num_hidden_layers=4)
    stock.config.num_hidden_layers = 2
    if when == "before optimize":
        fast.config.num_hidden_layers = 2
    hfopt.optimize(fast, kernels="hfopt")
    if when == "later":
        prove(fast)
    fast.config.num_hidden_layers = 2
    for mode in MODES:
        assert_same_outcome(generated(fast, mode), generated(stock, mode))
    listing = hfopt.explain(fast).program
    assert listing is not None and {each.layer for each in listing.instructions} == {0, 1, None}
    assert_program_is_the_modules(fast, passes, max_new_tokens=N_TOKENS, do_sample=False)
    stock.config.num_hidden_layers = fast.config.num_hidden_layers = 4
    for mode in MODES:
        assert_same_outcome(generated(fast, mode), generated(stock, mode))
    assert_program_is_the_modules(fast, passes, max_new_tokens=N_TOKENS, do_sample=False)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_a_cache_of_another_depth(n_layers: int, pair: tuple[Model, Model]) -> None:
    """Stock raises for the layer that a cache lacks."""
    stock, fast = pair
    prove(fast)

    def run(model: Model, kind: Any) -> Any:
        model.config.num_hidden_layers = n_layers
        cache = kind(config=model.config)
        model.config.num_hidden_layers = 2
        given = {**prompts(2, LENGTH), CACHE: cache}
        return outcome(lambda: model.generate(**given, do_sample=False, max_new_tokens=N_TOKENS))

    ours, theirs = run(fast, IndirectCache), run(stock, DynamicCache)
    if n_layers == 3:
        assert torch.equal(ours, theirs)
    else:
        assert type(ours) is type(theirs) is IndexError


def test_attention_of_the_user(pair: tuple[Model, Model]) -> None:
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return damped(*args, **kwargs)

    with registered():
        AttentionInterface.register("damped", counted)
        n_calls, results = [], []
        for model in pair:
            model.set_attn_implementation("damped")
            calls.clear()
            results.append(generated(model, "greedy"))
            n_calls.append(len(calls))
        assert n_calls == [3 * N_TOKENS] * 2
        assert_same_outcome(*reversed(results))
        stock, fast = pair
        idle = hfopt.explain(fast).idle
        assert "'damped'" in idle["model.layers.0.self_attn"] and "model.layers.0.mlp" not in idle
        again = hfopt.optimize(copy.deepcopy(stock))
        kept = {each.path: each.reason for each in again.hfopt.kept}
        assert "'damped'" in kept["model.layers.0.self_attn"]
        assert_same_outcome(generated(again, "greedy"), results[0])
        hfopt.restore(fast)
        assert_same_outcome(generated(fast, "greedy"), results[0])
    for model in pair:
        model.set_attn_implementation("sdpa")
    hfopt.optimize(fast)
    assert hfopt.explain(fast).by_module is None


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_a_changed_fact_is_explained_and_taken_back(pair: tuple[Model, Model]) -> None:
    stock, fast = pair
    for model in pair:
        model.model.layers[0].self_attn.is_causal = False
    assert hfopt.explain(fast).idle == {"model.layers.0.self_attn": "is_causal is False now, not True"}
    assert_same_outcome(logits(fast), logits(stock))
    assert "is_causal" in str(hfopt.explain(fast).by_module)
    fast.model.layers[0].self_attn.is_causal = True
    assert hfopt.explain(fast).idle == {} and hfopt.explain(fast).by_module is None


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_facts_of_a_copy_are_those_of_the_proof(
    make: Callable[[Model], Model], pair: tuple[Model, Model]
) -> None:
    _, fast = pair
    assert hfopt.explain(make(fast)).idle == {}
    fast.model.layers[0].self_attn.is_causal = False
    assert hfopt.explain(make(fast)).idle == hfopt.explain(fast).idle != {}


class Reader(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.size, self._hidden, self.made, self.scale = config, 3, 0.5, torch.sin, 2.0
        self._unread = self.layer_idx = 1

    def forward(self, x: Tensor) -> Tensor:
        return self._shift(x) * self.scale

    def _shift(self, x: Tensor) -> Tensor:
        return x + self._hidden + self.config.vocab_size + getattr(self.config, "n_head")  # noqa: B009


FACTS: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "attribute": (lambda module: setattr(module, "size", 4), "size is 4 now, not 3"),
    "of another type": (lambda module: setattr(module, "size", 3.0), "size is 3.0 now, not 3"),
    "an equal number": (lambda module: setattr(module, "_hidden", float("0.5")), None),
    "private, but read": (lambda module: setattr(module, "_hidden", 1.5), "_hidden is 1.5 now, not 0.5"),
    "private": (lambda module: setattr(module, "_unread", 2), None),
    "harmless": (lambda module: setattr(module, "layer_idx", 2), None),
    "object": (lambda module: setattr(module, "made", len), "made is another builtin_function_or_method now"),
    "gone": (lambda module: delattr(module, "made"), "made is gone"),
    "live": (lambda module: setattr(module, "scale", 5.0), None),
    "live, of another type": (lambda module: setattr(module, "scale", 5), "scale is a int now, not a float"),
    "live, gone": (lambda module: delattr(module, "scale"), "scale is gone"),
    "field": (lambda module: setattr(module.config, "vocab_size", 5), "config.vocab_size is 5 now, not 211"),
    "field of another name": (
        lambda module: setattr(module.config, "num_attention_heads", 2),
        "config.n_head is 2 now",
    ),
    "field that is not read": (lambda module: setattr(module.config, "n_layer", 5), None),
    "config": (lambda module: setattr(module, "config", None), "config.n_head is gone"),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts(name: str) -> None:
    module = Reader(gptj().config)
    facts = Facts.of(module, ("scale", "absent"))
    assert facts.hold(module) and facts.change(module) is None
    change, words = FACTS[name]
    change(module)
    assert facts.hold(module) is (words is None)
    found = facts.change(module)
    assert found is None if words is None else str(found).startswith(words)


def test_an_activation_that_changes(pair: tuple[Model, Model]) -> None:
    """What it computes follows from an attribute."""
    for model in pair:
        for layer in model.model.layers:
            layer.mlp.act_fn = GELUActivation().eval()
    stock, fast = pair
    assert_same_outcome(logits(fast), logits(stock))
    for model in pair:
        model.model.layers[0].mlp.act_fn.act = nn.functional.relu
        model.model.layers[1].mlp.act_fn.act = torch.cos
    assert_same_outcome(logits(fast), logits(stock))
    assert_same_outcome(generated(fast, "greedy"), generated(stock, "greedy"))
    assert "GELUActivation is no activation of the kernels" in str(hfopt.explain(fast).by_module)
