"""A decode step by the program has the bits that the modules give."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hfopt
from hfopt.cache import IndirectCache
from hfopt.kernels.linear.rows import ROW_LIMIT
from tests.generation_cases import (
    CACHE,
    FAMILIES,
    RELATIVES,
    VOCABULARY,
    Model,
    cache_of,
    gptj,
    llama,
    needs_programs,
    one_thread,
    opt,
    opt_with_plain_norms,
    prompts,
)
from tests.pairs import pairs_of
from tests.reference import DTYPES
from tests.step_cases import (
    ALL_OUTPUTS,
    MODES,
    assert_program_is_the_modules,
    assert_same_bits,
    generated,
    modules_alone,
    optimized,
    passes,
    programs_of,
    prove,
    proven,
    proven_family,
    rehearsals,
)

__all__ = ["passes", "rehearsals"]  # fixtures

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

VARIANTS: dict[str, Callable[[], Model]] = {
    **FAMILIES,
    **RELATIVES,
    "llama, a key head each": lambda: llama(num_key_value_heads=4),
    "llama, one key head": lambda: llama(num_key_value_heads=1),
    "llama, biases": lambda: with_biases(llama(attention_bias=True, mlp_bias=True)),
    "llama, heads of 24": lambda: llama(head_dim=24),
    "llama, heads of 10": lambda: llama(
        head_dim=10, hidden_size=60, num_attention_heads=6, num_key_value_heads=3
    ),
    "llama, odd sizes": lambda: llama(hidden_size=76, intermediate_size=53, head_dim=18),
    "llama, tied, one layer": lambda: llama(tie_word_embeddings=True, num_hidden_layers=1),
    "llama, gelu": lambda: llama(hidden_act="gelu"),
    "gptj, whole heads": lambda: gptj(rotary_dim=16),
    "gptj, rotary_dim None": lambda: unlimited(gptj(rotary_dim=24, n_embd=24, n_head=1)),
    "opt, pre-norm": lambda: with_biases(opt(do_layer_norm_before=True)),
    "opt, pre-norm, no projections": lambda: opt(do_layer_norm_before=True, word_embed_proj_dim=64),
    "opt, post-norm, no projections": lambda: opt(word_embed_proj_dim=64),
    "opt, no biases": lambda: opt_with_plain_norms(enable_bias=False),
}


def unlimited(model: Model) -> Model:
    """Rotates all channels; transformers 5 does not take None from a configuration any more."""
    for layer in model.transformer.h:
        layer.attn.rotary_dim = None
    return model


def with_biases(model: Model) -> Model:
    """Biases begin as zeros, which would hide one that is left out."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def small() -> Model:
    return proven_family("llama")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_fifty_steps(name: str, dtype: torch.dtype, passes: list[int]) -> None:
    model = proven(VARIANTS[name]().to(dtype))
    for mode in MODES.values() if name in (*FAMILIES, *RELATIVES) else (MODES["greedy"], MODES["beams"]):
        assert_program_is_the_modules(model, passes, max_new_tokens=51, **mode)


def test_tokens_are_those_of_transformers() -> None:
    for make in (*FAMILIES.values(), *RELATIVES.values()):
        model = make()
        expected = {name: generated(model, mode, max_new_tokens=30) for name, mode in MODES.items()}
        optimized(model)
        for name, mode in MODES.items():
            found = generated(model, mode, max_new_tokens=30)
            assert torch.equal(found.sequences, expected[name].sequences), name
            torch.testing.assert_close(
                torch.stack(found.logits), torch.stack(expected[name].logits), rtol=1e-4, atol=2e-4
            )


@pytest.mark.parametrize("n_rows", [1, 2, 3, 8, ROW_LIMIT - 1, ROW_LIMIT, ROW_LIMIT + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(n_rows: int, dtype: torch.dtype, passes: list[int]) -> None:
    given = {**prompts(n_rows), "max_new_tokens": 6, "do_sample": False}
    assert_program_is_the_modules(proven_family("llama", dtype), passes, **given)


@pytest.mark.parametrize("name", FAMILIES)
def test_threads(name: str) -> None:
    model = proven_family(name)
    for mode in MODES.values():
        results = []
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            results.append(generated(model, mode, max_new_tokens=12, **prompts(5)))
        assert_same_bits(*results)


@pytest.mark.parametrize(
    ("mode", "length"),
    [
        *(("greedy", length) for length in (1, 63, 64, 65)),
        # what beams and samples add grows by itself, whatever the length of the prompt
        *(("beams", length) for length in (63, 64)),
        *(("several of a prompt", length) for length in (1, 65)),
        *(pytest.param("beams", length, marks=pytest.mark.slow) for length in (1, 65)),
        *(pytest.param("several of a prompt", length, marks=pytest.mark.slow) for length in (63, 64)),
    ],
)
def test_the_cache_grows(mode: str, length: int, small: Model, passes: list[int]) -> None:
    given = {**prompts(2, length), "max_new_tokens": 140, **MODES[mode]}
    assert_program_is_the_modules(small, passes, **given)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize(
    ("length", "max_new_tokens"), [(205, 70), pytest.param(7, 300, marks=pytest.mark.slow)]
)
def test_a_mask_longer_than_its_steps(
    mode: str, length: int, max_new_tokens: int, small: Model, passes: list[int]
) -> None:
    # the mask grows in steps of 256
    given = {**prompts(2, length), "max_new_tokens": max_new_tokens, **MODES[mode]}
    assert_program_is_the_modules(small, passes, **given)


def test_without_a_mask(small: Model, passes: list[int]) -> None:
    ids = prompts(2)["input_ids"].clamp(min=2)
    given = {"input_ids": ids, "attention_mask": None, "max_new_tokens": 20, "do_sample": False}
    assert_program_is_the_modules(small, passes, **given)


def test_another_default_device(small: Model, passes: list[int]) -> None:
    model, given = optimized(small), {"input_ids": prompts(1)["input_ids"], "attention_mask": None}
    known = generated(model, given, max_new_tokens=12, do_sample=False)
    with torch.device("meta"):  # where torch would put what is made from sizes alone
        result = generated(model, given, max_new_tokens=12, do_sample=False)
    assert_same_bits(result, known)
    assert passes == []


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16], ids=str)
def test_types_of_masks(dtype: torch.dtype, small: Model, passes: list[int]) -> None:
    given = prompts()
    given["attention_mask"] = given["attention_mask"].to(dtype)
    assert_program_is_the_modules(small, passes, **given, max_new_tokens=8, do_sample=False)


def test_positions_of_the_caller(small: Model, passes: list[int]) -> None:
    given = prompts()
    given["position_ids"] = torch.arange(9)[None] * 3 + torch.arange(3)[:, None]
    assert_program_is_the_modules(small, passes, **given, max_new_tokens=12, do_sample=False)


def test_a_mask_with_holes(small: Model, passes: list[int]) -> None:
    given = prompts()
    given["attention_mask"] = torch.rand(3, 9, generator=torch.Generator().manual_seed(3)).gt(0.4).long()
    given["attention_mask"][:, -1] = 1
    for mode in MODES.values():
        assert_program_is_the_modules(small, passes, **given, max_new_tokens=12, **mode)


# ---- angles ------------------------------------------------------------------------------------------------

STATIC: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def with_rope(parameters: dict[str, Any]) -> Model:
    return llama(max_position_embeddings=128, rope_parameters={"rope_theta": 1000.0, **parameters})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STATIC)
def test_static_rotations(name: str, dtype: torch.dtype, passes: list[int]) -> None:
    model = proven(with_rope(STATIC[name]).to(dtype))
    assert_program_is_the_modules(model, passes, max_new_tokens=51, do_sample=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_rotation_that_changes_at_a_length(mode: str, dtype: torch.dtype, passes: list[int]) -> None:
    """Steps that are made in one call end there."""
    model, stock = with_rope(LONG).to(dtype), with_rope(LONG).to(dtype)
    expected = generated(stock, max_new_tokens=40, **MODES[mode])
    optimized(model)
    prove(model)
    found = assert_program_is_the_modules(model, passes, max_new_tokens=40, **MODES[mode])
    if dtype is torch.float32:
        assert torch.equal(found.sequences, expected.sequences)


@needs_programs
def test_a_rotation_that_depends_on_the_length(passes: list[int]) -> None:
    model = with_rope(DYNAMIC)
    expected = generated(model, max_new_tokens=40, do_sample=False)
    optimized(model)
    assert hfopt.explain(model).by_module is None
    passes.clear()
    found = generated(model, max_new_tokens=40, do_sample=False)
    assert not passes
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions_past_the_table_of_angles(dtype: torch.dtype, passes: list[int]) -> None:
    model = proven(llama(max_position_embeddings=4096).to(dtype))
    for first in (1015, 2040, 3000, 1015):
        given = prompts(2)
        given["position_ids"] = torch.arange(first - 9, first).repeat(2, 1)
        assert_program_is_the_modules(model, passes, **given, max_new_tokens=20, do_sample=False)


# ---- a cache from before -----------------------------------------------------------------------------------


def second_turn(model: Model, mode: dict[str, Any], has_mask: bool, n_cropped: int) -> Any:
    """Goes on from the cache of an earlier request, of which a few tokens are taken back."""
    given = {**prompts(2), "do_sample": False, **ALL_OUTPUTS, "max_new_tokens": 12}
    if not has_mask:
        given = {**given, "input_ids": given["input_ids"].clamp(min=2), "attention_mask": None}
    before = model.generate(**given)
    cache, sequences = cache_of(before), before.sequences
    if n_cropped:
        cache.crop(-n_cropped)
        sequences = sequences[:, :-n_cropped]
    more = torch.randint(2, VOCABULARY, (2, 3), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([sequences, more], 1)
    mask = None
    if has_mask:
        mask = torch.cat([given["attention_mask"], torch.ones(2, ids.shape[1] - 9, dtype=torch.long)], 1)
    torch.manual_seed(3)
    return model.generate(
        ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=30, **mode, **ALL_OUTPUTS
    )


@pytest.mark.parametrize(
    ("name", "mode", "has_mask", "n_cropped"),
    pairs_of(FAMILIES, ["greedy", "sampling"], [True, False], [0, 1, 5, 14]),
)
def test_a_second_turn(name: str, mode: str, has_mask: bool, n_cropped: int, passes: list[int]) -> None:
    model = proven_family(name)
    passes.clear()
    ours = second_turn(model, MODES[mode], has_mask, n_cropped)
    assert not passes
    with modules_alone(model):
        assert_same_bits(ours, second_turn(model, MODES[mode], has_mask, n_cropped))


@pytest.mark.parametrize("is_proven", [False, True])
def test_layers_cropped_one_by_one(is_proven: bool, passes: list[int]) -> None:
    model = optimized(llama())
    if is_proven:
        prove(model)
    ids, mask = prompts(2)["input_ids"].clamp(min=2), torch.ones(2, 9, dtype=torch.long)

    def run() -> Any:
        cache = IndirectCache(model.config)
        with torch.no_grad():
            model(input_ids=ids[:, :7], **{CACHE: cache})
        for layer in cache.layers:
            layer.crop(-2)  # each has its own map of rows now
        return model.generate(
            ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=10, do_sample=False, **ALL_OUTPUTS
        )

    passes.clear()
    ours = run()
    assert len(passes) == 11  # such a cache is left to the modules
    with modules_alone(model):
        assert_same_bits(ours, run())


def test_beams_go_on_from_a_cache_of_beams(small: Model, passes: list[int]) -> None:
    given = {**prompts(1), "num_beams": 4, "num_return_sequences": 4, "do_sample": False, **ALL_OUTPUTS}

    def run() -> Any:
        before = small.generate(**given, max_new_tokens=10)
        ids = torch.cat([before.sequences, torch.full((4, 2), 5)], 1)
        cache = copy.deepcopy(cache_of(before))
        return small.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE: cache},
            max_new_tokens=40,
            do_sample=False,
            **ALL_OUTPUTS,
        )

    passes.clear()
    ours = run()
    assert not passes
    with modules_alone(small):
        assert_same_bits(ours, run())


def test_layers_that_the_model_has_not(passes: list[int]) -> None:
    """A model that was made shorter has a cache for more layers than it fills."""
    model = llama(num_hidden_layers=3)
    model.model.layers = model.model.layers[:2]  # in training mode, as a new list is
    expected = generated(model, max_new_tokens=10, do_sample=False).sequences
    optimized(model)
    for _ in range(2):
        assert torch.equal(generated(model, max_new_tokens=10, do_sample=False).sequences, expected)


@needs_programs
def test_a_layer_that_is_there_twice() -> None:
    """Its decoder goes through as many layers as the configuration says."""
    model = llama(num_hidden_layers=2)
    model.model.layers.append(model.model.layers[1])
    expected = generated(model, max_new_tokens=10, do_sample=False).sequences
    optimized(model)
    assert hfopt.explain(model).by_module is None
    for _ in range(2):
        assert torch.equal(generated(model, max_new_tokens=10, do_sample=False).sequences, expected)


def test_layers_in_another_order() -> None:
    model = llama(num_hidden_layers=3)
    model.model.layers = torch.nn.ModuleList([model.model.layers[index] for index in (2, 0, 1)])
    expected = generated(model, max_new_tokens=10, do_sample=False).sequences
    optimized(model)
    for _ in range(2):
        assert torch.equal(generated(model, max_new_tokens=10, do_sample=False).sequences, expected)


@needs_programs
def test_the_first_request_goes_by_the_program(passes: list[int], rehearsals: list[str | None]) -> None:
    model = optimized(llama())
    assert programs_of(model) is not None and rehearsals == [None]
    found = generated(model, max_new_tokens=6, do_sample=False)
    assert not passes and rehearsals == [None]
    with modules_alone(model):
        assert_same_bits(found, generated(model, max_new_tokens=6, do_sample=False))
