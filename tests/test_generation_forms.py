"""Prompts, masks, positions, caches and numbers in every form that transformers takes give its result; others raise."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, StaticCache
from transformers.generation import utils

from tests.generation_cases import (
    CACHE,
    FAMILIES,
    IS_WHOLE,
    VOCABULARY,
    Model,
    assert_same,
    cache_of,
    one_thread,
    prompts,
)
from tests.step_cases import optimized

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

LENGTH, N_PAST = 14, 9
ALL, PADS = prompts(3, LENGTH)["input_ids"].clamp(min=1), prompts(3, LENGTH)["attention_mask"]
IDS, MASK = ALL[:, :N_PAST], PADS[:, :N_PAST]
ONES = torch.ones_like(MASK)
PLACES = torch.arange(N_PAST)[None]
ERRORS = (ValueError, RuntimeError, IndexError, TypeError, AttributeError)
ENDS = list(range(3, 60))


class Pair(NamedTuple):
    """One model twice."""

    stock: Model
    ours: Model


def pair_of(family: str, **sizes: Any) -> Pair:
    """Ours has its programs proven, so that they run wherever they may."""
    stock = FAMILIES[family](**sizes)
    ours = optimized(copy.deepcopy(stock))
    for _ in range(2):
        ours.generate(**prompts(1, 4), max_new_tokens=2)
    return Pair(stock, ours)


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest) -> Pair:
    return pair_of(request.param)


@pytest.fixture(scope="module", params=["gptj", "opt"])
def short(request: pytest.FixtureRequest) -> Pair:
    """A pair with 24 positions."""
    sizes = {"gptj": {"n_positions": 24}, "opt": {"max_position_embeddings": 24}}
    return pair_of(request.param, **sizes[request.param])


def outcome(model: Model, make: Callable[[Model], dict[str, Any]]) -> Any:
    """What `generate` returns, or the exception that it raises; `make` gives its arguments."""
    torch.manual_seed(3)
    made = make(model)
    defaults = {} if "generation_config" in made else {"max_new_tokens": 5, "do_sample": False}
    try:
        return model.generate(**{**defaults, **made})
    except ERRORS as error:
        return error


def is_taken(pair: Pair, make: Callable[[Model], dict[str, Any]] | dict[str, Any], rows: Any = ...) -> bool:
    """Whether transformers takes the arguments; then ours gives the same (`rows` of it), and otherwise raises too."""
    maker = make if callable(make) else lambda model: dict(make)
    expected = outcome(pair.stock, maker)
    found = outcome(pair.ours, maker)
    if isinstance(expected, Exception):
        assert isinstance(found, Exception), f"transformers raises {expected!r}"
        return False
    if isinstance(found, Exception):
        raise found
    if isinstance(expected, Tensor):
        others = found[found != expected]
        assert ((others >= 0) & (others < VOCABULARY)).all(), "tokens of rows that mean nothing"
        expected, found = expected[rows], found[rows]
    assert_same(found, expected)
    return True


def changed(tensor: Tensor, position: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[position] = value
    return tensor


MASKS: dict[str, Tensor] = {
    "bool": MASK.bool(),
    "int8": MASK.to(torch.int8),
    "int32": MASK.int(),
    "uint8": MASK.to(torch.uint8),
    "float32": MASK.float(),
    "float64": MASK.double(),
    "float16": MASK.half(),
    "bfloat16": MASK.bfloat16(),
    "of columns": MASK.t().contiguous().t(),
    "one row in memory": MASK[1:2].expand(3, -1),
    "a row of 1": ONES[:1],
    "a row of True": ONES[:1].bool(),
    "twos": MASK * 2,
    "nothing but 2": ONES * 2,
    "a 2": changed(MASK, (1, 5), 2),
    "halves": MASK * 0.5,
    "a fraction": changed(MASK.float(), (1, 5), 0.3),
    "minus 1": changed(MASK, (1, 5), -1),
    "nothing but minus 1": -MASK,
    "additive": (1 - MASK.float()) * -1e9,
    "minus infinity": changed(MASK.float(), (1, 0), -torch.inf),
    "infinity": changed(MASK.float(), (1, 5), torch.inf),
    "NaN": changed(MASK.float(), (0, 3), torch.nan),
    "255": (MASK * 255).to(torch.uint8),
    "huge": MASK * 10**12,
    "huge, negative": MASK * -(10**12),
    "holes": changed(changed(MASK, (0, 4), 0), (1, 8), 0),
    "longer": torch.cat([MASK, ONES], 1),
    "longer, nothing but 1": torch.cat([ONES, ONES], 1),
    "longer, and hides what there is": torch.cat([MASK * 0, MASK], 1),
    "one column for all": ONES[:, :1] * 2,
}
# With positions that nobody makes of them, other masks are taken too.
MASKS_BESIDE_POSITIONS: dict[str, Tensor] = {
    "shorter": MASK[:, 1:],
    "shorter, nothing but 1": ONES[:, 1:],
    "no columns": MASK[:, :0],
    "fewer rows of 1": ONES[:2],
    "fewer rows of 2": ONES[:2] * 2,
    "more rows": torch.cat([MASK, MASK]),
}
# Everything is computed for Llama; positions in a table have to be there.
ONLY_COMPUTED = {
    "nothing but minus 1",
    "additive",
    "minus infinity",
    "infinity",
    "NaN",
    "255",
    "huge",
    "huge, negative",
}


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("name", MASKS)
def test_masks(pair: Pair, name: str, num_beams: int) -> None:
    mask = MASKS[name]
    taken = is_taken(pair, {"input_ids": IDS, "attention_mask": mask, "num_beams": num_beams})
    if num_beams == 2 and len(mask) == 1:
        assert not taken, "its positions are repeated for the beams, and not for the rows"
    elif pair.stock.config.model_type == "llama" or name not in {
        *ONLY_COMPUTED,
        "halves",
        "minus 1",
        "one column for all",
    }:
        assert taken


@pytest.mark.parametrize("name", MASKS_BESIDE_POSITIONS)
def test_masks_beside_positions(pair: Pair, name: str) -> None:
    mask = MASKS_BESIDE_POSITIONS[name]
    taken = is_taken(pair, {"input_ids": IDS, "attention_mask": mask, "position_ids": PLACES})
    if IS_WHOLE:
        # attention of torch itself gets no mask where nothing is hidden
        assert taken == (name != "fewer rows of 2" or pair.stock.config._attn_implementation == "sdpa")


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"use_cache": False}, {"prefill_chunk_size": 4}], ids=str
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_nothing_but_padding(family: str, attention: str, options: dict[str, Any]) -> None:
    """A batch is filled up with rows that nobody reads; even their tokens are those of transformers."""
    if family == "gptj" and attention == "sdpa":
        pytest.skip("GPT-J has no such attention")
    pair = pair_of(family, attn_implementation=attention)
    for mask in (changed(MASK, (1,), 0), MASK * 0):
        assert is_taken(pair, {"input_ids": IDS, "attention_mask": mask, **options})


POSITIONS: dict[str, Tensor] = {
    "a row for all": PLACES,
    "int32": PLACES.int(),
    "rows in other memory": PLACES.expand(3, -1),
    "one for all": torch.tensor([[5]]),
    "more than tokens": torch.arange(20)[None],
    "others beyond the table": torch.cat([torch.tensor([[1000, 2000]]), PLACES], 1),
    "up to the end of the table": PLACES + 82,
    "past the end of the table": PLACES + 90,
    "the row before the first": PLACES - 1,
    "two rows before the first": torch.full((3, N_PAST), -2),
    "far away": PLACES + 70_000,
    "the largest of int32": torch.full((1, N_PAST), 2**31 - 1, dtype=torch.int32),
    "the largest of int64": torch.full((1, N_PAST), 2**63 - 1),
    "the smallest of int64": torch.full((1, N_PAST), -(2**63)),
    "the end of int8": (PLACES + 116).to(torch.int8),
    "uint8": PLACES.to(torch.uint8),
    "float": PLACES.float(),
    "halves": PLACES / 2,
    "bool": PLACES > 3,
    "one dimension": PLACES[0],
    "three dimensions": PLACES.expand(3, 1, -1),
    "too few": PLACES[:, :4],
    "none": PLACES[:, :0],
    "fewer rows": PLACES.expand(2, -1),
}
TAKEN_BY_ALL = ("a row for all", "int32", "rows in other memory", "one for all", "more than tokens",
                "others beyond the table", "up to the end of the table")  # fmt: skip


@pytest.mark.parametrize("name", POSITIONS)
def test_positions(pair: Pair, name: str) -> None:
    taken = is_taken(pair, {"input_ids": IDS, "position_ids": POSITIONS[name]})
    assert taken or name not in TAKEN_BY_ALL


def test_a_position_for_each_beam(pair: Pair) -> None:
    for positions in (PLACES.expand(3, -1) + 3, torch.tensor([[5]] * 3)):
        assert is_taken(pair, {"input_ids": IDS, "position_ids": positions, "num_beams": 2})


def cached(
    model: Model, n: int = N_PAST, mask: Tensor | None = PADS, n_rows: int = 3, into: Cache | None = None
) -> Any:
    """The cache behind the first n tokens."""
    given = {} if mask is None else {"attention_mask": mask[:n_rows, :n]}
    with torch.no_grad():
        return cache_of(model(ALL[:n_rows, :n], use_cache=True, **{CACHE: into}, **given))


def repeated(cache: Cache, n: int = 2) -> Cache:
    cache.batch_repeat_interleave(n)
    return cache


def cropped(cache: Cache, n: int) -> Cache:
    cache.crop(cache.get_seq_length() - n if not IS_WHOLE else -n)
    return cache


def made_by_generate(model: Model) -> Any:
    result = model.generate(
        IDS, attention_mask=MASK, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
    )
    return cache_of(result)


def static(model: Model) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=40)


Make = Callable[[Model], dict[str, Any]]
OVER_CACHES: dict[str, Make] = {
    "all": lambda m: {"input_ids": ALL, CACHE: cached(m, mask=None)},
    "all, ones": lambda m: {"input_ids": ALL, "attention_mask": torch.ones_like(PADS), CACHE: cached(m, mask=None)},
    "all, one row of ones": lambda m: {
        "input_ids": ALL, "attention_mask": torch.ones_like(PADS[:1]), CACHE: cached(m, mask=None)},
    "all, pads": lambda m: {"input_ids": ALL, "attention_mask": PADS, CACHE: cached(m)},
    "all, bool": lambda m: {"input_ids": ALL, "attention_mask": PADS.bool(), CACHE: cached(m)},
    "all, of generate": lambda m: {"input_ids": ALL, "attention_mask": PADS, CACHE: made_by_generate(m)},
    "new": lambda m: {"input_ids": ALL[:, N_PAST:], CACHE: cached(m, mask=None)},
    "new, a mask of them": lambda m: {
        "input_ids": ALL[:, 4:], "attention_mask": torch.ones_like(PADS[:, 4:]), CACHE: cached(m, 4, None)},
    "new, ones": lambda m: {
        "input_ids": ALL[:, N_PAST:], "attention_mask": torch.ones_like(PADS), CACHE: cached(m, mask=None)},
    "new, one row of ones": lambda m: {
        "input_ids": ALL[:, N_PAST:], "attention_mask": torch.ones_like(PADS[:1]), CACHE: cached(m, mask=None)},
    "new, pads": lambda m: {"input_ids": ALL[:, N_PAST:], "attention_mask": PADS, CACHE: cached(m)},
    "new, pads in 8 bits": lambda m: {
        "input_ids": ALL[:, N_PAST:], "attention_mask": PADS.to(torch.uint8), CACHE: cached(m)},
    "new, of generate": lambda m: {
        "input_ids": ALL[:, N_PAST:], "attention_mask": PADS, CACHE: made_by_generate(m)},
    "new, positions": lambda m: {
        "input_ids": ALL[:, N_PAST:], "attention_mask": PADS, "position_ids": torch.arange(9, 14)[None],
        CACHE: cached(m)},
    "new, a mask of other length": lambda m: {
        "input_ids": ALL[:, N_PAST:], "attention_mask": PADS[:, 2:], CACHE: cached(m)},
    "one new": lambda m: {"input_ids": ALL[:, 13:], "attention_mask": PADS, CACHE: cached(m, 13)},
    "one new without a mask": lambda m: {"input_ids": ALL[:, 13:], CACHE: cached(m, 13, None)},
    "one of all is new": lambda m: {"input_ids": ALL, CACHE: cached(m, 13, None)},
    "none is new": lambda m: {"input_ids": ALL, CACHE: cached(m, LENGTH, None)},
    "none is new, pads": lambda m: {"input_ids": ALL, "attention_mask": PADS, CACHE: cached(m, LENGTH)},
    "more cached than given": lambda m: {"input_ids": ALL[:, :10], CACHE: cached(m, LENGTH, None)},
    "far more cached than given": lambda m: {"input_ids": ALL[:, :5], CACHE: cached(m, LENGTH, None)},
    "cropped": lambda m: {"input_ids": ALL, "attention_mask": PADS, CACHE: cropped(cached(m, 12), 4)},
    "cropped to nothing": lambda m: {"input_ids": ALL, "attention_mask": PADS, CACHE: cropped(cached(m, 12), 12)},
    "empty": lambda m: {"input_ids": ALL, "attention_mask": PADS, CACHE: DynamicCache()},
    "empty, of layers": lambda m: {"input_ids": ALL, "attention_mask": PADS, CACHE: DynamicCache(config=m.config)},
    "old ids that are none": lambda m: {"input_ids": changed(ALL, (0, 0), -100), CACHE: cached(m, mask=None)},
    "new ids that are none": lambda m: {"input_ids": changed(ALL, (0, 12), 999), CACHE: cached(m, mask=None)},
    "static": lambda m: {"input_ids": ALL, "attention_mask": PADS, CACHE: static(m)},
    "static, all": lambda m: {"input_ids": ALL, "attention_mask": PADS, CACHE: cached(m, into=static(m))},
    "static, new": lambda m: {
        "input_ids": ALL[:, N_PAST:], "attention_mask": PADS, CACHE: cached(m, into=static(m))},
    "static, too short": lambda m: {
        "input_ids": ALL, CACHE: StaticCache(config=m.config, max_cache_len=10)},
    "static, by name": lambda m: {"input_ids": ALL, "attention_mask": PADS, "cache_implementation": "static"},
    "beams": lambda m: {
        "input_ids": ALL, "attention_mask": PADS, "num_beams": np.int64(2), CACHE: repeated(cached(m))},
    "beams over too few rows": lambda m: {
        "input_ids": ALL, "attention_mask": PADS, "num_beams": 2, CACHE: cached(m)},
    "fewer rows": lambda m: {"input_ids": ALL, CACHE: cached(m, mask=None, n_rows=1)},
    "more rows": lambda m: {"input_ids": ALL[:1], CACHE: cached(m, mask=None)},
    "in chunks, all": lambda m: {
        "input_ids": ALL, "attention_mask": PADS, "prefill_chunk_size": 3, CACHE: cached(m)},
    "in chunks, new": lambda m: {
        "input_ids": ALL[:, N_PAST:], "attention_mask": PADS, "prefill_chunk_size": 3, CACHE: cached(m)},
    "in chunks, one position for the last": lambda m: {
        "input_ids": ALL[:, :8], "position_ids": PLACES[:, :6], "prefill_chunk_size": 4, CACHE: cached(m, 1, None)},
    "embeddings": lambda m: {
        "inputs_embeds": m.get_input_embeddings()(ALL).detach(), "attention_mask": PADS, CACHE: cached(m)},
    "embeddings, none new": lambda m: {
        "inputs_embeds": m.get_input_embeddings()(ALL).detach(), CACHE: cached(m, LENGTH, None)},
    "a begin token": lambda m: {CACHE: cached(m, mask=None, n_rows=1)},
    "a tuple": lambda m: {"input_ids": ALL, CACHE: ((torch.zeros(3, 2, 9, 16),) * 2,) * 2},
    "a list": lambda m: {"input_ids": ALL, CACHE: [1]},
}  # fmt: skip
RAISES = {
    "one new without a mask", "far more cached than given", "new ids that are none", "static, too short",
    "beams over too few rows", "fewer rows", "more rows", "a begin token", "a tuple", "a list",
}  # fmt: skip


@pytest.mark.parametrize("name", OVER_CACHES)
def test_caches(pair: Pair, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        taken = is_taken(pair, OVER_CACHES[name])
    if IS_WHOLE:
        assert taken == (name not in RAISES)


@pytest.mark.parametrize("name", OVER_CACHES)
def test_caches_over_few_positions(short: Pair, name: str) -> None:
    """Cached tokens take their places in the table once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        taken = is_taken(short, OVER_CACHES[name])
    if IS_WHOLE:
        assert taken == (name not in RAISES)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("n_past, length", [(20, 30), (30, 40), (50, 60)])
def test_chats_over_a_table_of_positions(n_past: int, length: int, with_mask: bool) -> None:
    """All tokens and the last cache, as a chat gives them."""
    pair = pair_of("opt", max_position_embeddings=64)
    ids = prompts(1, length)["input_ids"]

    def make(model: Model) -> dict[str, Any]:
        with torch.no_grad():
            cache = cache_of(model(ids[:, :n_past], use_cache=True))
        mask = {"attention_mask": torch.ones_like(ids)} if with_mask else {}
        return {"input_ids": ids, "max_new_tokens": 3, CACHE: cache, **mask}

    assert is_taken(pair, make)


@pytest.mark.parametrize("name", utils.ALL_CACHE_NAMES)
def test_names_of_the_cache(pair: Pair, name: str) -> None:
    """Deprecated ones are taken as long as transformers takes them."""

    def make(model: Model) -> dict[str, Any]:
        return {"input_ids": ALL, "attention_mask": PADS, name: cached(model)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        taken = is_taken(pair, make)
    assert taken or name != CACHE


FAR = torch.cat([torch.zeros(3, 95, dtype=torch.long), IDS[:, :5]], 1)  # padding that takes no position
PADDED: dict[str, dict[str, Any]] = {
    "pads that the prompt tells": {"input_ids": IDS * MASK},
    "more pads than positions": {"input_ids": FAR},
    "more pads than positions, other pad": {"input_ids": FAR.clamp(min=7), "pad_token_id": np.int64(7)},
    "more pads than positions, in a config": {
        "input_ids": FAR.clamp(min=7),
        "generation_config": GenerationConfig(pad_token_id=7, max_new_tokens=4),
    },
    "more hidden tokens than positions": {"input_ids": FAR.clamp(min=7), "attention_mask": (FAR > 0).half()},
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_takes_no_position(pair: Pair, name: str) -> None:
    assert is_taken(pair, PADDED[name])


def test_pads_that_are_tokens(pair: Pair) -> None:
    taken = is_taken(pair, {"input_ids": FAR.clamp(min=7), "pad_token_id": 7, "eos_token_id": [7, 9]})
    assert taken == (pair.stock.config.model_type == "llama"), "a pad that ends sequences hides nothing"
    assert taken == is_taken(pair, {"input_ids": FAR.clamp(min=7)})


NUMBERS: dict[str, dict[str, Any]] = {
    "beams of numpy": {"num_beams": np.int64(2)},
    "beams of torch": {"num_beams": torch.tensor(2)},
    "one beam that is a float": {"num_beams": 1.0},
    "one beam that is a bool": {"num_beams": np.bool_(True)},
    "results of numpy": {"num_beams": np.int64(3), "num_return_sequences": np.int32(2)},
    "results of torch": {"num_beams": torch.tensor(3), "num_return_sequences": torch.tensor(2)},
    "samples of numpy": {"do_sample": True, "num_return_sequences": np.int64(3)},
    "beams and samples of torch": {
        "do_sample": True, "num_beams": torch.tensor(2), "num_return_sequences": torch.tensor(2)},
    "no result of one beam": {"num_return_sequences": 0},
    "all results but one": {"num_beams": 3, "num_return_sequences": -1},
    "length of numpy": {"max_new_tokens": np.int64(4)},
    "length of torch": {"max_new_tokens": torch.tensor(4)},
    "length of torch, beams": {"max_new_tokens": torch.tensor(4), "num_beams": 2, "eos_token_id": 5},
    "whole length of torch": {"max_new_tokens": None, "max_length": torch.tensor(14)},
    "length that is a float": {"max_new_tokens": 4.5},
    "penalty of numpy": {"repetition_penalty": np.float64(1.3)},
    "length penalty of numpy": {"num_beams": 2, "length_penalty": np.float64(0.7), "eos_token_id": ENDS},
    "length penalty of float32": {"num_beams": 2, "length_penalty": np.float32(0.7), "eos_token_id": ENDS},
    "length penalty of torch": {"num_beams": 2, "length_penalty": torch.tensor(0.7), "eos_token_id": ENDS},
    "never early, of torch": {
        "num_beams": torch.tensor(2), "early_stopping": "never", "length_penalty": torch.tensor(0.7),
        "max_new_tokens": torch.tensor(6), "eos_token_id": ENDS},
    "early, of numpy": {"num_beams": 2, "early_stopping": np.bool_(True), "eos_token_id": ENDS},
    "temperature of numpy": {"do_sample": True, "temperature": np.float64(0.7), "top_p": np.float64(0.9)},
    "ends of numpy": {"eos_token_id": np.array([5, 6]), "num_beams": 2},
    "ends of torch": {"eos_token_id": torch.tensor(ENDS), "pad_token_id": np.int64(0)},
    "a config of numpy": {
        "generation_config": GenerationConfig(num_beams=np.int64(2), max_new_tokens=np.int64(4), pad_token_id=0)},
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(pair: Pair, name: str) -> None:
    everything = {"return_dict_in_generate": True, "output_scores": True}
    for options in ({}, everything):
        taken = is_taken(pair, {"input_ids": IDS, **NUMBERS[name], **options})
        assert taken or not IS_WHOLE


def embeddings(model: Model) -> Tensor:
    table: Tensor = model.get_input_embeddings().weight
    return table.detach()[IDS]


EMBEDDINGS: dict[str, tuple[Make, Any]] = {
    "beside ids": (lambda m: {"inputs_embeds": embeddings(m), "input_ids": IDS}, ...),
    "beside other ids": (lambda m: {"inputs_embeds": embeddings(m)[:, :4], "input_ids": IDS}, ...),
    "beside ids that are none": (
        lambda m: {"inputs_embeds": embeddings(m), "input_ids": IDS[:, :0], "attention_mask": MASK}, ...),
    "beside a mask of 1 in other dimensions": (
        lambda m: {"inputs_embeds": embeddings(m), "attention_mask": torch.ones(3, 1, 9, 9), "position_ids": PLACES},
        ...),
    "NaN": (lambda m: {"inputs_embeds": changed(embeddings(m), (0, 0, 0), torch.nan)}, ...),
    "infinity": (lambda m: {"inputs_embeds": changed(embeddings(m), (0, 0, 0), torch.inf)}, ...),
    # transformers' own row of NaN behind a mask is NaN, and so are its beams
    "NaN behind a mask": (
        lambda m: {"inputs_embeds": changed(embeddings(m), (1, 0, 0), torch.nan), "attention_mask": MASK}, [0, 2]),
    "NaN, beams": (
        lambda m: {"inputs_embeds": changed(embeddings(m), (0, 0, 0), torch.nan), "num_beams": 2}, [1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(pair: Pair, name: str) -> None:
    make, rows = EMBEDDINGS[name]
    taken = is_taken(pair, make, rows)
    assert taken or not IS_WHOLE


def test_embeddings_that_are_integers() -> None:
    is_taken(pair_of("llama"), {"inputs_embeds": torch.randint(-3, 3, (3, 9, 64))})


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n_past=st.integers(0, LENGTH),
    first=st.integers(0, LENGTH - 1),
    last=st.integers(1, LENGTH),
    masked=st.one_of(
        st.none(), st.tuples(st.integers(0, LENGTH), st.integers(1, LENGTH), st.sampled_from([1, 2, 3, 6]))
    ),
    scale=st.sampled_from([1, 2, 0.5, -1, 0]),
    places=st.one_of(
        st.none(), st.tuples(st.integers(-3, 30), st.integers(1, LENGTH), st.sampled_from([1, 2, 3]))
    ),
    options=st.sampled_from(
        [{}, {"num_beams": np.int64(2)}, {"use_cache": False}, {"prefill_chunk_size": 4}]
    ),
)
@pytest.mark.skipif(
    not IS_WHOLE, reason="transformers 4 counts otherwise, and its caches are taken as they are"
)
def test_any_shapes(
    short: Pair,
    n_past: int,
    first: int,
    last: int,
    masked: Any,
    scale: float,
    places: Any,
    options: dict[str, Any],
) -> None:
    """Any part of a text over a cache of any length, with any part of a mask, and any positions."""

    def make(model: Model) -> dict[str, Any]:
        arguments: dict[str, Any] = {"input_ids": ALL[:, first:last], "max_new_tokens": 3, **options}
        if n_past:
            cache = cached(model, n_past)
            arguments[CACHE] = repeated(cache) if "num_beams" in options else cache
        if masked is not None:
            begin, end, n_rows = masked
            arguments["attention_mask"] = torch.cat([PADS, PADS])[:n_rows, begin:end] * scale
        if places is not None:
            begin, n, n_rows = places
            arguments["position_ids"] = torch.arange(begin, begin + n).expand(n_rows, -1)
        return arguments

    if isinstance(outcome(short.stock, make), Exception):
        outcome(short.ours, make)  # may find some sense in it
    else:
        assert is_taken(short, make)
