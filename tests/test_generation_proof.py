"""Our loops are held against transformers' own before they run, and a request that is not fit for them starts again."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, LlamaForCausalLM, StoppingCriteria
from transformers.generation import BaseStreamer

import hfopt
from hfopt import host
from hfopt.cache import IndirectCache
from hfopt.generation import proof
from hfopt.generation.proof_cases import CASES, OTHER_LOOPS
from hfopt.machine import private_file
from tests.generation_cases import (
    CACHE,
    FAMILIES,
    Model,
    assert_same,
    cache_of,
    llama,
    needs_programs,
    one_thread,
    prompts,
)
from tests.step_cases import take_programs

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

MODES: dict[str, dict[str, Any]] = {
    "greedy search": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam search": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True, "top_k": 20},
}
Loop = Callable[..., Any]


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which nothing is proven yet; the file for what will be."""
    file = tmp_path / "loops.json"
    monkeypatch.setattr(proof, "_known", None)
    monkeypatch.setattr(private_file, "path", lambda kind, identity: file)
    return file


def generated(model: Model, **options: Any) -> Any:
    torch.manual_seed(5)
    given = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    return model.generate(**prompts(), **{**given, **options})


# ---- the proof ---------------------------------------------------------------------------------------------


def test_every_loop_of_this_release_is_proven(unknown: Path) -> None:
    lack = host.missing()
    assert proof.refusals() == ({} if lack is None else dict.fromkeys(MODES, lack))


@needs_programs
def test_the_cases_ask_all_of_a_loop(monkeypatch: pytest.MonkeyPatch, unknown: Path) -> None:
    assert {case.mode for case in CASES} == {*MODES, OTHER_LOOPS}
    reordered: list[bool] = []
    reorder = IndirectCache.reorder_cache

    def noting(self: IndirectCache, beam_idx: Tensor) -> None:
        reordered.append(not torch.equal(beam_idx, torch.arange(len(beam_idx))))
        reorder(self, beam_idx)

    monkeypatch.setattr(IndirectCache, "reorder_cache", noting)
    proof.prove()
    assert sum(reordered) > 20


def test_the_outcome_is_kept_and_read(unknown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dict(proof.refusals())
    assert json.loads(unknown.read_text())["refusals"] == first
    monkeypatch.setattr(proof, "_known", None)
    monkeypatch.setattr(proof, "_run", lambda: pytest.fail("it is known already"))
    assert proof.refusals() == first


@pytest.mark.parametrize("content", [b"", b"{", b'{"identity": 1, "refusals": {}}', b'{"refusals": 7}'])
def test_a_damaged_file_is_found_out_again(
    unknown: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unknown.write_bytes(content)
    monkeypatch.setattr(proof, "_run", lambda: {"sampling": "it is another one"})
    assert proof.refusals() == {"sampling": "it is another one"}
    assert "is damaged" in caplog.text and json.loads(unknown.read_text())["refusals"]


@pytest.mark.parametrize("place", [None, Path("nowhere") / "loops.json"])
def test_a_folder_that_cannot_be_written_is_no_error(
    unknown: Path, place: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_file, "path", lambda kind, identity: place)
    monkeypatch.setattr(proof, "_run", dict)
    assert proof.refusals() == {}


def test_the_proof_leaves_no_trace(unknown: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    proof.refusals()
    assert torch.equal(torch.rand(4), expected) and torch.get_num_threads() == threads


def _biased(loop: Loop) -> Loop:
    @functools.wraps(loop)
    def biased(self: Any, input_ids: Tensor, logits_processor: Any, **kwargs: Any) -> Any:
        logits_processor.append(lambda ids, scores: scores + torch.arange(scores.shape[1]) * 0.3)
        return loop(self, input_ids, logits_processor=logits_processor, **kwargs)

    return biased


def _one_more_random_number(loop: Loop) -> Loop:
    @functools.wraps(loop)
    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        torch.rand(1)
        return loop(self, *args, **kwargs)

    return other


def _longer_penalty(loop: Loop) -> Loop:
    @functools.wraps(loop)
    def other(self: Any, *args: Any, generation_config: Any, **kwargs: Any) -> Any:
        generation_config.length_penalty += 2.5
        return loop(self, *args, generation_config=generation_config, **kwargs)

    return other


@needs_programs
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "change", "refused"),
    [
        ("_sample", _biased, {"greedy search", "sampling"}),
        ("_sample", _one_more_random_number, {"greedy search", "sampling"}),
        ("_beam_search", _longer_penalty, {"beam search", "beam sampling"}),
    ],
)
@pytest.mark.thinned(3)
def test_a_loop_that_does_something_else_is_used(
    name: str,
    change: Callable[[Loop], Loop],
    refused: set[str],
    family: str,
    unknown: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also when it comes after `optimize`."""
    model, stock = hfopt.optimize(FAMILIES[family]()), FAMILIES[family]()
    monkeypatch.setattr(GenerationMixin, name, change(getattr(GenerationMixin, name)))
    for mode, options in MODES.items():
        ours = generated(model, num_return_sequences=options.get("num_beams", 1), **options)
        assert_same(ours, generated(stock, num_return_sequences=options.get("num_beams", 1), **options))
        assert isinstance(cache_of(ours), IndirectCache) is (mode not in refused)
    assert set(hfopt.explain(model).loops) - {OTHER_LOOPS} == refused
    warnings = [record.message for record in caplog.records if record.name == proof.logger.name]
    assert len(warnings) == 1
    for text in (warnings[0], str(hfopt.explain(model))):
        assert f"transformers {host.installed()}" in text and all(mode in text for mode in refused)
    with pytest.raises(
        hfopt.UnsupportedModel, match=r"strict: transformers .* runs these in loops of its own"
    ):
        hfopt.optimize(FAMILIES[family](), strict=True)


# ---- requests that a loop cannot go on with ----------------------------------------------------------------


class Copying(LlamaForCausalLM):
    """Gives another cache back than it was given."""

    times = 1

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        output = super().forward(*args, **kwargs)
        name, cache = host.cache_given(output) or ("", None)
        self.times -= 1
        if cache is not None and self.times == 0:
            other = DynamicCache()
            layers: Any = cache.layers
            for index, layer in enumerate(layers):
                other.update(layer.keys, layer.values, index)
            output[name] = other
        return output


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


def copying(times: int = 1) -> Model:
    """An optimized model that goes module by module, and gives another cache than it is given, from now on."""
    model = hfopt.optimize(llama())
    take_programs(model)
    model.__class__ = Copying
    model.times = times
    return model


@needs_programs
@pytest.mark.parametrize("mode", MODES)
def test_another_cache_behind_the_prompt_starts_the_request_again(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    stock, model = llama(), copying()
    ours = generated(model, **MODES[mode])
    assert_same(ours, generated(stock, **MODES[mode]))
    assert type(cache_of(ours)) is DynamicCache
    assert "The request runs in transformers' own loop" in caplog.text


@needs_programs
def test_a_streamer_is_given_everything_once() -> None:
    heard = []
    for model in (llama(), copying()):
        streamer = Heard()
        model.generate(prompts(1)["input_ids"], max_new_tokens=5, do_sample=False, streamer=streamer)
        heard.append(streamer.heard)
    assert heard[0] == heard[1]


@needs_programs
def test_a_cache_of_the_user_is_as_long_as_before() -> None:
    ids = prompts(1)["input_ids"]
    results = []
    for model in (llama(), copying(2)):
        cache = DynamicCache()
        with torch.no_grad():
            model(ids[:, :4], **{CACHE: cache})
        given = {"max_new_tokens": 6, "do_sample": False, CACHE: cache}
        results.append((model.generate(ids, **given), cache.get_seq_length()))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


@needs_programs
def test_another_cache_later_is_an_error_that_says_what_to_report() -> None:
    class Reading(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = copying(2)
    with pytest.raises(hfopt.HostError, match=rf"transformers {host.installed()}: please report it"):
        model.generate(**prompts(), max_new_tokens=8, do_sample=False, stopping_criteria=[Reading()])


@needs_programs
def test_a_cache_that_cannot_be_reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock refuses it, and so do we; nothing goes on with beams that read each other's keys."""
    monkeypatch.setattr(sys.modules["hfopt.generation.generate"], "takes_our_cache", lambda: False)
    monkeypatch.delattr("transformers.cache_utils.Cache.reorder_cache")
    for model in (llama(), hfopt.optimize(llama())):
        with pytest.raises(ValueError, match="cannot be reordered"):
            model.generate(**prompts(), max_new_tokens=4, num_beams=2, do_sample=False)
