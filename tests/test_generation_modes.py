"""Every mode and option of `generate`, installed against not installed."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hfopt.cache import IndirectCache
from hfopt.generation import install, uninstall
from tests.generation_cases import (
    CACHE,
    FAMILIES,
    VOCABULARY,
    Model,
    assert_same,
    cache_of,
    llama,
    one_thread,
    prompts,
)

pytestmark = [
    pytest.mark.usefixtures(one_thread.__name__),
    # of transformers 4, which gives None for them
    pytest.mark.filterwarnings("ignore:`output_attentions=True` is not supported"),
]

EVERYTHING: dict[str, Any] = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True},
    "beam search": {"num_beams": 4},
    "beam sampling": {"num_beams": 3, "do_sample": True},
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> Model:
    return FAMILIES[request.param](attn_implementation="eager")  # gives attentions


@pytest.fixture(scope="module")
def small() -> Model:
    return llama()


def compare(model: Model, fresh: Callable[[], dict[str, Any]] = dict, **arguments: Any) -> Any:
    """Runs both, and returns our result; `fresh` makes the arguments that keep state."""
    results = []
    for undo_or_do in (uninstall, install):
        undo_or_do(model)
        torch.manual_seed(3)
        results.append(model.generate(**arguments, **fresh()))
        after = torch.rand(1)
        results.append(after)
    uninstall(model)
    stock, stock_random, ours, our_random = results
    assert_same(ours, stock)
    assert torch.equal(our_random, stock_random), "the random streams differ"
    return ours


@pytest.mark.parametrize("n_equal", [2, 53])
@pytest.mark.parametrize(
    "options", [{}, {"num_return_sequences": 3}, {"eos_token_id": list(range(5, 205, 6))}]
)
def test_beams_of_equal_scores(n_equal: int, options: dict[str, Any]) -> None:
    """Their order is that of `torch.topk`, whose algorithm is no simple rule."""
    model = llama(tie_word_embeddings=False)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight.copy_(weight[torch.arange(len(weight)) // n_equal])
    compare(model, **prompts(), max_new_tokens=12, num_beams=4, do_sample=False, **options)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("mode", MODES)
def test_fifty_tokens_with_all_outputs(model: Model, mode: str) -> None:
    result = compare(model, **prompts(), max_new_tokens=50, **MODES[mode], **EVERYTHING)
    assert isinstance(cache_of(result), IndirectCache)
    assert result.sequences.shape[1] == 59
    assert len(set(result.sequences[0, 9:].tolist())) > 5, "a degenerate model proves nothing"


@pytest.mark.parametrize("mode", MODES)
def test_tokens_alone(model: Model, mode: str) -> None:
    compare(model, **prompts(), max_new_tokens=50, **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("output", ["output_scores", "output_logits"])
def test_one_output_alone(small: Model, mode: str, output: str) -> None:
    options = {**prompts(), "return_dict_in_generate": True, output: True, **MODES[mode]}
    compare(small, max_new_tokens=12, **options)


SAMPLES = {"do_sample": True, "num_return_sequences": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "several samples": SAMPLES,
    "several of the beams": {"num_beams": 4, "num_return_sequences": 3},
    "top-k, top-p, temperature": {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 0.7},
    "processors in beams": {"num_beams": 4, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "processors in beam samples": {"num_beams": 4, "do_sample": True, "top_k": 20, "temperature": 0.5},
    "no mask": {"attention_mask": None},
    "right padding": {"attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 8 + [0]])},
    "a mask with holes": {"attention_mask": torch.tensor([[1, 0, 1] * 3, [0, 1, 1] * 3, [1] * 9])},
    "a boolean mask": {"attention_mask": prompts()["attention_mask"].bool()},
    "a float mask": {"attention_mask": prompts()["attention_mask"].float()},
    "no cache": {"use_cache": False},
    "no cache, beams": {"use_cache": False, "num_beams": 3},
    "prompt in chunks": {"prefill_chunk_size": 4},
    "prompt in chunks, beams": {"prefill_chunk_size": 4, "num_beams": 3},
    "prompt in chunks, samples": {"prefill_chunk_size": 2, **SAMPLES},
    "a static cache": {"cache_implementation": "static"},
    "a static cache, beams": {"cache_implementation": "static", "num_beams": 3},
    "no time": {"max_time": 0.0},
    "no time, beams": {"max_time": 0.0, "num_beams": 3},
    "one token": {"max_new_tokens": 1},
    "one token, beams": {"max_new_tokens": 1, "num_beams": 3},
    "a least length": {"min_new_tokens": 10, "eos_token_id": list(range(0, VOCABULARY, 3))},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 1, **prompts(1)},
    "classifier-free guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option(small: Model, option: str) -> None:
    compare(
        small,
        **{**prompts(), "max_new_tokens": 24, **EVERYTHING, "output_attentions": False, **OPTIONS[option]},
    )


ENDS = list(range(2, VOCABULARY, 9))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ends", [5, ENDS], ids=["one end", "many ends"])
def test_rows_end_at_different_steps(small: Model, mode: str, ends: Any) -> None:
    # the end token of the first case is one that greedy search comes by
    if ends == 5:
        ends = int(small.generate(**prompts(), max_new_tokens=8)[1, -2])
    compare(small, **prompts(), max_new_tokens=40, eos_token_id=ends, **MODES[mode], **EVERYTHING)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("do_sample", [False, True])
def test_when_beams_stop(small: Model, early_stopping: Any, length_penalty: float, do_sample: bool) -> None:
    result = compare(
        small,
        **prompts(),
        max_new_tokens=30,
        eos_token_id=ENDS,
        num_beams=4,
        num_return_sequences=4,
        early_stopping=early_stopping,
        length_penalty=length_penalty,
        do_sample=do_sample,
        return_dict_in_generate=True,
        output_scores=True,
    )
    if length_penalty < 2:
        assert (result.beam_indices == -1).any(), "no sequence ended before the others"


@pytest.mark.parametrize("mode", MODES)
def test_embeddings_as_prompt(small: Model, mode: str) -> None:
    given = prompts()
    embeds = small.get_input_embeddings()(given["input_ids"]).detach()
    mask = given["attention_mask"]
    compare(small, inputs_embeds=embeds, attention_mask=mask, max_new_tokens=12, **MODES[mode], **EVERYTHING)
    compare(small, **given, inputs_embeds=embeds, max_new_tokens=12, **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_going_on_from_a_returned_cache(small: Model, mode: str) -> None:
    ids = prompts()["input_ids"].clamp(min=2)
    results = []
    for undo_or_do in (uninstall, install):
        undo_or_do(small)
        torch.manual_seed(0)
        first = small.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
        both = torch.cat([first.sequences, ids[:, :4]], dim=-1)
        results.append(small.generate(both, **{CACHE: cache_of(first)}, max_new_tokens=8))
        torch.manual_seed(0)
        # a cache of the caller for several rows of one prompt
        results.append(small.generate(ids, **{CACHE: DynamicCache()}, max_new_tokens=8, **MODES[mode]))
    uninstall(small)
    for stock, ours in zip(results[:2], results[2:], strict=True):
        assert torch.equal(stock, ours)


class Forbid(LogitsProcessor):
    """Writes into what it is given, as a user's processor may."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[torch.arange(len(scores)), input_ids[:, -1]] = -torch.inf
        scores[:, ::3] -= 2.0
        return scores


class StopAtRepetition(StoppingCriteria):
    """Reads whole sequences, and counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return torch.tensor(
            [len(set(row[9:])) < len(row[9:]) - 1 or self.calls > 30 for row in input_ids.tolist()]
        )


@pytest.mark.parametrize("mode", MODES)
def test_processors_and_criteria_of_the_caller(small: Model, mode: str) -> None:
    def fresh() -> dict[str, Any]:
        return {"stopping_criteria": StoppingCriteriaList([StopAtRepetition()])}

    for processors in (None, LogitsProcessorList([Forbid()])):
        options = {**prompts(), "max_new_tokens": 40, "logits_processor": processors, **MODES[mode]}
        compare(small, fresh, **options, **EVERYTHING)
        compare(small, fresh, **options, eos_token_id=ENDS)


def three_ways(row: int, sequence: Tensor) -> list[int]:
    return [2 + (int(sequence[-1]) * step + row) % (VOCABULARY - 2) for step in (3, 5, 7)]


def one_way_out(row: int, sequence: Tensor) -> list[int]:
    """A trie of two sequences: fewer tokens than beams, so equal scores decide."""
    return {9: [20, 30], 10: [40], 11: [40, 41]}.get(len(sequence), [50])


@pytest.mark.parametrize("allowed", [three_ways, one_way_out])
@pytest.mark.parametrize("mode", ["greedy", "sample", "beam search"])
def test_allowed_tokens(small: Model, allowed: Any, mode: str) -> None:
    options = {**prompts(), **MODES[mode], **EVERYTHING, "prefix_allowed_tokens_fn": allowed}
    if mode == "beam search":
        options["num_return_sequences"] = 4
    for ends in (50, None):
        compare(small, **options, max_new_tokens=12, eos_token_id=ends)


def test_assisted_generation(small: Model) -> None:
    assistant = llama(num_hidden_layers=1)
    for both in (False, True):
        if both:
            install(assistant)
        compare(small, **prompts(1), max_new_tokens=24, assistant_model=assistant)
        compare(small, **prompts(1), max_new_tokens=24, assistant_model=assistant, do_sample=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["LoraConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("mode", MODES)
def test_adapters(kind: str, mode: str) -> None:
    peft = pytest.importorskip("peft")
    options = {"init_lora_weights": False} if kind == "LoraConfig" else {"num_virtual_tokens": 4}
    base = llama()
    adapted = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval()
    results = []
    for change in (uninstall, install):
        change(base)
        torch.manual_seed(3)
        results.append(adapted.generate(**prompts(), max_new_tokens=12, **MODES[mode]))
    assert torch.equal(*results)


def test_custom_loop_of_the_caller(small: Model) -> None:
    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return input_ids + 1

    assert torch.equal(
        compare(small, **prompts(), max_new_tokens=4, custom_generate=loop), prompts()["input_ids"] + 1
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_number(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    for mode in ("greedy", "sample"):
        compare(model, **prompts(), max_new_tokens=12, **MODES[mode])


def test_a_sliding_window_gets_our_cache(small: Model) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=0,
    )
    result = compare(
        MistralForCausalLM(config).eval(), **prompts(), max_new_tokens=20, num_beams=3, **EVERYTHING
    )
    assert type(cache_of(result)) is IndirectCache


@torch.no_grad()
def test_rows_read_past_the_hooks_keep_their_own_keys(small: Model) -> None:
    """transformers 4 reads a prompt in chunks by `forward` itself."""
    ids, mask = (given.repeat_interleave(3, 0) for given in prompts().values())
    install(small)
    results = []
    for cache in (IndirectCache(small.config, copies=3), DynamicCache(config=small.config)):
        small.forward(ids[:, :4], attention_mask=mask[:, :4], **{CACHE: cache})
        more = [small(input_ids=ids[:, first:end], attention_mask=mask[:, :end], **{CACHE: cache}).logits
                for first, end in ((4, 8), (8, 9))]  # fmt: skip
        results.append(torch.cat(more, 1))
    uninstall(small)
    assert_same(*results)


def test_batches_and_beams(small: Model) -> None:
    for n_rows, num_beams, length in itertools.product((1, 5), (2, 7), (1, 13)):
        compare(small, **prompts(n_rows, length), max_new_tokens=16, num_beams=num_beams, eos_token_id=ENDS)
