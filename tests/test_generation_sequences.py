"""What readers of sequences are given, and who may change a model between two steps."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)
from transformers.generation import BaseStreamer

import hfopt
from hfopt.generation.sequences import Sequences
from hfopt.generation.stopping import Stopping, runs_foreign_code


@pytest.mark.parametrize("length", [0, 1, 5, 63, 64, 65])
def test_sequences_grow_as_torch_cat_and_leave_earlier_views_alone(length: int) -> None:
    prompt = torch.randint(0, 50, (3, length))
    given, expected, sequences = prompt.clone(), prompt.clone(), Sequences(prompt)
    views = [(sequences.ids, expected)]
    for step in range(200):
        tokens = torch.randint(0, 50, (3,))
        if step % 7 == 3:
            rows = torch.randint(0, 3, (3,))
            sequences.reorder(rows.numpy())
            expected = expected[rows]
        sequences.append(tokens.numpy())
        expected = torch.cat([expected, tokens[:, None]], dim=1)
        assert sequences.length == expected.shape[1]
        views.append((sequences.ids, expected))
    assert all(torch.equal(view, then) for view, then in views)
    assert torch.equal(prompt, given)


class _Recorder(LogitsProcessor):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids)
        return scores


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("n_rows, num_beams", [(1, 1), (3, 1), (2, 3)])
def test_processors_see_what_transformers_shows_them(model: Any, n_rows: int, num_beams: int) -> None:
    prompt = torch.randint(0, 99, (n_rows, 4))

    def seen() -> list[torch.Tensor]:
        recorder = _Recorder()
        processors = LogitsProcessorList([recorder])
        model.generate(
            prompt, max_new_tokens=70, do_sample=False, num_beams=num_beams, logits_processor=processors
        )
        return recorder.seen

    expected = seen()
    hfopt.optimize(model)
    found = seen()
    assert len(found) == len(expected)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class _Callback(BaseStreamer):
    """Calls something after the prompt and a few tokens."""

    def __init__(self, action) -> None:
        self.tokens: list[torch.Tensor] = []
        self._action = action

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value)
        if len(self.tokens) == 6:
            self._action()

    def end(self) -> None:
        pass


def test_streamed_tokens_stay_as_they_were(model: Any) -> None:
    hfopt.optimize(model)
    prompt = torch.randint(0, 99, (1, 4))
    streamer = _Callback(lambda: None)
    found = model.generate(prompt, max_new_tokens=20, do_sample=False, streamer=streamer)
    assert torch.equal(torch.cat([each.flatten() for each in streamer.tokens]), found[0])


def test_the_next_step_knows_of_a_hook_that_a_streamer_sets(model: Any) -> None:
    hfopt.optimize(model)
    prompt = torch.randint(0, 99, (1, 4))
    model.generate(prompt, max_new_tokens=8, do_sample=False)
    calls = []

    def look() -> None:
        model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))

    model.generate(prompt, max_new_tokens=20, do_sample=False, streamer=_Callback(look))
    assert len(calls) == 20 - 5  # the streamer is given the prompt, too


def test_what_comes_with_transformers_is_not_foreign_unless_it_calls_the_user() -> None:
    assert not runs_foreign_code([TemperatureLogitsWarper(0.5), MaxLengthCriteria(9)])
    assert runs_foreign_code([TemperatureLogitsWarper(0.5), _Recorder()])
    assert runs_foreign_code([PrefixConstrainedLogitsProcessor(lambda *_: [1], 1)])


def test_stopping_asks_criteria_that_nobody_knows() -> None:
    class Odd(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 2 == 1

    stopping = Stopping(StoppingCriteriaList([MaxLengthCriteria(5), Odd()]))
    tokens = np.array([1, 2, 3])
    ids = torch.from_numpy(tokens)[:, None]
    hits = stopping(tokens, 1, ids, None)
    assert hits is not None and hits.tolist() == [True, False, True]
    hits = stopping(tokens, 5, ids, None)
    assert hits is not None and hits.all()
