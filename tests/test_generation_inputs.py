"""A prompt that cannot be read gets an InvalidInput that says which value, where, and what is allowed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.generation import install, uninstall
from tests.generation_cases import (
    CACHE,
    FAMILIES,
    IS_WHOLE,
    NOT_WHOLE,
    Model,
    cache_of,
    llama,
    needs_programs,
    one_thread,
    prompts,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


@pytest.fixture(scope="module")
def model() -> Model:
    model = llama()
    install(model)
    return model


def changed(tensor: Tensor, position: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[position] = value
    return tensor


IDS, MASK = prompts()["input_ids"], prompts()["attention_mask"]
EMBEDS = torch.ones(3, 9, 64)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a negative id": (
        {"input_ids": changed(IDS, (1, 4), -1)},
        r"input_ids\[1, 4\]=-1: must be from 0 to 210",
    ),
    "an id past the table": (
        {"input_ids": changed(IDS, (2, 8), 211)},
        r"input_ids\[2, 8\]=211: must be from 0 to 210",
    ),
    "an empty prompt": ({"input_ids": IDS[:1, :0]}, "input_ids of shape .1, 0.: the prompt is empty"),
    "no rows": ({"input_ids": IDS[:0]}, "the prompt is empty"),
    "one dimension": ({"input_ids": IDS[0]}, r"must be \[batch, length\]"),
    "ids that are floats": (
        {"input_ids": IDS.float()},
        "input_ids: must be a tensor of integers, int64 or int32, not a tensor of torch.float32",
    ),
    "ids in 16 bits": ({"input_ids": IDS.short()}, "int64 or int32, not a tensor of torch.int16"),
    "ids that are a list": (
        {"input_ids": IDS.tolist()},
        "input_ids: must be a tensor of integers, int64 or int32, not list",
    ),
    "an array of ids": ({"input_ids": IDS.numpy()}, "not ndarray"),
    "three dimensions": (
        {"input_ids": IDS[None]},
        r"input_ids of shape \(1, 3, 9\): must be \[batch, length\]",
    ),
    "no dimension": ({"input_ids": IDS[0, 0]}, r"input_ids of shape \(\): must be \[batch, length\]"),
    "a short mask": (
        {"attention_mask": MASK[:, :-1]},
        r"attention_mask of shape \(3, 8\): must be \[3, 9 or more\]",
    ),
    "a mask of fewer rows": (
        {"attention_mask": MASK[:2]},
        r"attention_mask of shape \(2, 9\): must be \[3, 9 or more\]",
    ),
    "a mask of fewer rows that hides nothing": (
        {"attention_mask": torch.ones(2, 9)},
        r"attention_mask of shape \(2, 9\): must be \[3, 9 or more\]",
    ),
    "a mask of more rows": (
        {"attention_mask": torch.cat([MASK, MASK])},
        r"attention_mask of shape \(6, 9\): must be \[3, 9 or more\]",
    ),
    "a mask of no columns": ({"attention_mask": MASK[:, :0]}, r"attention_mask of shape \(3, 0\)"),
    "a mask of one dimension": (
        {"attention_mask": MASK[0]},
        r"attention_mask of shape \(9,\): must be \[batch, length\]",
    ),
    "a mask of four dimensions": (
        {"attention_mask": MASK[:, None, None]},
        r"attention_mask of shape \(3, 1, 1, 9\)",
    ),
    "a list as mask": (
        {"attention_mask": MASK.tolist()},
        "attention_mask: must be a tensor of 0 and 1, not list",
    ),
    "an array as mask": ({"attention_mask": MASK.numpy()}, "must be a tensor of 0 and 1, not ndarray"),
    "positions in a list": (
        {"position_ids": [list(range(9))]},
        "position_ids: must be a tensor of integers, not list",
    ),
    "too few positions": (
        {"position_ids": torch.arange(4)[None]},
        r"position_ids of shape \(1, 4\): must be \[3, 9 or more\]",
    ),
    "positions of fewer rows": (
        {"position_ids": torch.arange(9).expand(2, -1)},
        r"position_ids of shape \(2, 9\): must be \[3, 9 or more\]",
    ),
    "narrow embeddings": (
        {"inputs_embeds": EMBEDS[..., :63]},
        r"inputs_embeds of shape \(3, 9, 63\): must be \[batch, length, 64\]",
    ),
    "embeddings of no token": ({"inputs_embeds": EMBEDS[:, :0]}, "the prompt is empty"),
    "embeddings of two dimensions": ({"inputs_embeds": EMBEDS[0]}, r"must be \[batch, length, 64\]"),
    "embeddings in a list": ({"inputs_embeds": EMBEDS.tolist()}, "must be a floating point tensor, not list"),
    "other ids beside embeddings": (
        {"inputs_embeds": EMBEDS, "input_ids": IDS[:, :4]},
        r"input_ids of shape \(3, 4\): must be \[3, 9 or more\]",
    ),
    "no beams": ({"num_beams": 0}, "num_beams=0: must be an integer of at least 1"),
    "fewer than no beams": ({"num_beams": -2}, "num_beams=-2"),
    "half a beam": ({"num_beams": 1.5}, "num_beams=1.5"),
    "half a beam of numpy": ({"num_beams": np.float64(1.5)}, "num_beams=.*1.5"),
    "two beams that are a float": ({"num_beams": 2.0}, "num_beams=2.0"),
    "beams in words": ({"num_beams": "2"}, "num_beams='2'"),
    "nothing to return": ({"num_return_sequences": 0, "num_beams": 2}, "num_return_sequences=0"),
    "half a result": ({"num_return_sequences": 0.5}, "num_return_sequences=0.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(model: Model, case: str) -> None:
    changes, message = BAD[case]
    if not IS_WHOLE and {"num_beams", "num_return_sequences"} & changes.keys():
        pytest.skip(NOT_WHOLE)
    arguments = {"input_ids": IDS, **changes}
    if "inputs_embeds" in changes and "input_ids" not in changes:
        arguments.pop("input_ids")
    with pytest.raises(InvalidInput, match=message):
        model.generate(**arguments, max_new_tokens=4)
    with pytest.raises(ValueError):
        model.generate(**{"num_beams": 3, **arguments}, max_new_tokens=4)


def test_nothing_runs_before_the_gate(model: Model) -> None:
    calls: list[Any] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: calls.append(args))
    with pytest.raises(InvalidInput):
        model.generate(changed(IDS, (0, 0), 999), max_new_tokens=4)
    model.generate(IDS, max_new_tokens=1)
    handle.remove()
    assert len(calls) == 1


def test_the_gate_lets_a_begin_token_and_a_cache_through(model: Model) -> None:
    assert model.generate(max_new_tokens=3).shape == (1, 4)
    first = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True)
    rest = torch.cat([first.sequences, IDS], dim=-1)
    mask = torch.ones_like(rest)
    model.generate(rest, attention_mask=mask, **{CACHE: cache_of(first)}, max_new_tokens=2)


def test_no_token_is_new(model: Model) -> None:
    """Without a mask over everything, all tokens are expected."""
    first = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True)
    with pytest.raises(
        InvalidInput, match=r"input_ids of shape \(3, 2\): .* the cache holds 11; new ones alone need"
    ):
        model.generate(IDS[:, :2], **{CACHE: cache_of(first)}, max_new_tokens=2)


def test_ids_of_a_padded_table(model: Model) -> None:
    padded = llama()
    padded.resize_token_embeddings(256)
    install(padded)
    assert padded.generate(changed(IDS, (0, 0), 255), max_new_tokens=2).shape == (3, 11)
    with pytest.raises(InvalidInput, match="from 0 to 255"):
        padded.generate(changed(IDS, (0, 0), 256), max_new_tokens=2)


@pytest.fixture(scope="module", params=["gptj", "opt"])
def table(request: pytest.FixtureRequest) -> Model:
    """A model with 16 positions."""
    sizes = {"gptj": {"n_positions": 16}, "opt": {"max_position_embeddings": 16}}
    model = FAMILIES[request.param](**sizes[request.param])
    install(model)
    return model


@needs_programs
class TestPositions:
    def test_a_long_prompt(self, table: Model) -> None:
        ids = prompts(1, 17)["input_ids"]
        with pytest.raises(
            InvalidInput, match="a token at position 16, and the last position of the model is 15"
        ):
            table.generate(ids, max_new_tokens=1)
        assert table.generate(ids[:, 1:], max_new_tokens=1).shape == (1, 17)

    def test_a_mask_that_counts_further(self, table: Model) -> None:
        ids = prompts(1, 9)["input_ids"]
        with pytest.raises(
            InvalidInput, match="a token at position 17, and the last position of the model is 15"
        ):
            table.generate(ids, attention_mask=torch.full((1, 9), 2), max_new_tokens=1)

    def test_tokens_that_are_cached(self, table: Model) -> None:
        """They keep their places."""
        ids = prompts(1, 17)["input_ids"]
        for given, options in (
            (ids[:, :12], {}),
            (ids[:, 8:12], {"attention_mask": torch.ones(1, 12)}),
            (ids[:, :12], {"attention_mask": torch.ones(1, 12)}),
        ):
            cache = cache_of(table(ids[:, :8], use_cache=True))
            assert table.generate(given, **{CACHE: cache}, max_new_tokens=4, **options).numel() > 0
        cache = cache_of(table(ids[:, :8], use_cache=True))
        with pytest.raises(InvalidInput, match="a token at position 16"):
            table.generate(ids[:, 8:], attention_mask=torch.ones(1, 17), **{CACHE: cache}, max_new_tokens=1)

    def test_padding_takes_no_position(self, table: Model) -> None:
        ids, mask = prompts(1, 20)["input_ids"], torch.tensor([[0] * 8 + [1] * 12])
        ours = table.generate(ids, attention_mask=mask, max_new_tokens=4)
        uninstall(table)
        stock = table.generate(ids, attention_mask=mask, max_new_tokens=4)
        install(table)
        assert torch.equal(ours, stock)

    @pytest.mark.parametrize("num_beams", [1, 3])
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_the_end_of_the_table_comes_while_generating(
        self, table: Model, num_beams: int, use_cache: bool
    ) -> None:
        options = {**prompts(2), "num_beams": num_beams, "use_cache": use_cache}
        assert table.generate(**options, max_new_tokens=8).shape == (2, 17)
        with pytest.raises(InvalidInput, match="the next token would have position 16"):
            table.generate(**options, max_new_tokens=9)

    def test_position_ids(self, table: Model) -> None:
        ids = prompts(1)["input_ids"]
        with pytest.raises(InvalidInput, match="position_ids: 16 is past the last position of the model, 15"):
            table.generate(ids, position_ids=torch.arange(8, 17)[None], max_new_tokens=1)


def test_computed_positions_have_no_end() -> None:
    model = llama(max_position_embeddings=12)
    install(model)
    assert model.generate(**prompts(1), max_new_tokens=12).shape == (1, 21)


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_masks_read_like_stock(family: str) -> None:
    model = FAMILIES[family]()
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(3, 9, generator=generator) < 0.6
    mask[:, 2] = True
    assert not mask.all(dim=1).any() and not mask[:, -1].all(), "holes and padding on the right"
    results = []
    for change in (uninstall, install):
        change(model)
        results.append(
            model.generate(IDS.clamp(min=1), attention_mask=mask.long(), max_new_tokens=20, num_beams=2)
        )
    assert torch.equal(*results)


FORMS: list[Callable[[Tensor], Tensor]] = [Tensor.int, lambda ids: ids.t().contiguous().t()]


@pytest.mark.parametrize("form", FORMS, ids=["int32", "strided"])
def test_other_forms_of_ids(model: Model, form: Callable[[Tensor], Tensor]) -> None:
    assert torch.equal(model.generate(form(IDS), max_new_tokens=6), model.generate(IDS, max_new_tokens=6))
