"""Models that are larger than memory: the same tokens, bounded memory, and what is said about it."""

import copy
import json
import mmap
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hfopt
from hfopt.errors import InvalidInput, UnsupportedModel
from hfopt.machine import linux, pages
from hfopt.streaming import LayerStream, stream_of, turn_of
from hfopt.streaming.budget import Split, split
from hfopt.streaming.stream import Part

MIB = 1 << 20


def llama(dtype: torch.dtype, **options: Any) -> Any:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        **{"tie_word_embeddings": False, **options},
    )
    torch.manual_seed(3)
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float32")
    llama(torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """From disk, for tests that leave it as it is."""
    return load(folder)


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    return tokens(hfopt.load(folder))


def load(folder: Path, share: float = 0.6, **options: Any) -> Any:
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return hfopt.load(folder, device_map="disk", max_memory={"cpu": int(share * size)}, **options)


def tokens(model: Any, **options: Any) -> torch.Tensor:
    ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    found: torch.Tensor = model.generate(ids, attention_mask=mask, **options)
    return found


def pages_of_process(model: Any) -> int:
    """Bytes of its layers and head that this process has in its page tables."""
    n_pages = 0
    with open(linux.PROC / "self" / "pagemap", "rb", buffering=0) as file:
        for part in streamed(model).parts:
            for each in part.extents:
                address, n_bytes = each.whole_pages
                file.seek(address // mmap.PAGESIZE * 8)
                words = np.frombuffer(file.read(n_bytes // mmap.PAGESIZE * 8), np.uint64)
                n_pages += int((words >> np.uint64(63)).sum())
    return n_pages * mmap.PAGESIZE


def streamed(model: Any) -> LayerStream:
    stream = stream_of(model)
    assert stream is not None
    return stream


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(1e-3)


# ---- tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8"), (torch.bfloat16, "int4")],
    ids=str,
)
def test_tokens_are_those_of_the_model_in_memory(tmp_path, dtype, quantization):
    made: Any = llama(dtype, tie_word_embeddings=dtype is torch.bfloat16)
    if quantization is not None:
        hfopt.optimize(made, quantization=quantization)
    hfopt.save(made, tmp_path)
    other, model = hfopt.load(tmp_path), load(tmp_path)
    assert streamed(model).step_bytes > 0
    for options in ({}, {"num_beams": 3}):
        assert torch.equal(tokens(model, **options), tokens(other, **options))
    ids = torch.randint(3, 300, (1, 70))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)


def test_memory_is_bounded_whoever_runs_the_layers(model, monkeypatch):
    most = 0
    enter = LayerStream.enter

    def entered(stream: LayerStream, place: int) -> None:
        nonlocal most
        enter(stream, place)
        if stream_of(model) is stream:
            most = max(most, pages_of_process(model))

    monkeypatch.setattr(LayerStream, "enter", entered)
    tokens(model)
    ids = torch.randint(3, 300, (1, 70))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        model(ids)
    stream = streamed(model)
    kept = sum(part.n_bytes for part in stream.parts) - stream.step_bytes
    edges = 2 * mmap.PAGESIZE * len(stream.parts)  # pages that parts have in common
    assert 0 < most <= kept + stream.split.window + edges
    assert kept + stream.split.window <= stream.budget


def test_parts_are_read_in_the_order_of_their_turns(monkeypatch):
    """The next one while one is in use, and one that has gone not before all others."""
    fetched: list[int] = []
    monkeypatch.setattr(pages, "fetch", lambda extent: fetched.append(extent.address))
    monkeypatch.setattr(pages, "give_back", lambda extents: True)
    parts = [Part(str(place), (pages.Extent(place, 10, "", 0),)) for place in range(5)]
    stream = LayerStream(parts, Split(frozenset({3}), 20), (), 30, 0)
    for place in [*range(5), *range(5), 0, 1]:
        with stream.turns[place]:
            wait_until(lambda: stream._next() is None and 1 not in stream._states)
        wait_until(lambda: stream._next() is None and 1 not in stream._states)
    assert fetched == [*range(5), 0, 1, 2, 4, 0, 1, 2, 4]


def test_nothing_is_read_again_where_all_fits(folder):
    model = load(folder, 1.1)
    tokens(model)
    stream = streamed(model)
    assert stream.step_bytes == 0
    assert "nothing is read again" in str(hfopt.explain(model))
    assert pages_of_process(model) >= 0.99 * sum(part.n_bytes for part in stream.parts)


def test_what_is_available_is_the_budget(folder, monkeypatch):
    monkeypatch.setattr("hfopt.streaming.model.available_memory", lambda: 10 * MIB)
    assert streamed(hfopt.load(folder, device_map="disk")).budget == 8 * MIB


def test_threads_share_a_stream(model, expected):
    found = {}

    def ask(name: int) -> None:
        found[name] = tokens(model)

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 3 and all(torch.equal(each, expected) for each in found.values())
    assert not any(streamed(model)._users)


def test_a_model_may_use_fewer_layers(model, folder, monkeypatch):
    other = hfopt.load(folder)
    tokens(model)
    for each in (model, other):
        monkeypatch.setattr(each.config, "num_hidden_layers", 2)
    assert torch.equal(tokens(model), tokens(other))


def test_what_is_written_into_weights_stays(folder):
    model, other = load(folder, 0.35), hfopt.load(folder)
    before = tokens(model)
    for each in (model, other):
        for layer in each.model.layers:
            layer.mlp.down_proj.weight.data.mul_(-3)
    after = tokens(model)
    assert torch.equal(after, tokens(other)) and not torch.equal(after, before)
    assert torch.equal(tokens(model), after)


def test_a_child_process_begins_anew(model, expected, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert torch.equal(tokens(model), expected)


def test_systems_that_cannot_be_asked_for_pages(model, expected, monkeypatch):
    monkeypatch.setattr(pages, "_POPULATE_READ", 1 << 20)
    assert torch.equal(tokens(model), expected)


def test_systems_that_do_not_say_what_was_written(folder, expected, tmp_path, monkeypatch):
    model = load(folder)
    monkeypatch.setattr(linux, "PROC", tmp_path)
    assert torch.equal(tokens(model), expected)
    assert streamed(model).step_bytes == 0  # nothing is given back


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_fails_is_followed_by_another(model, expected, monkeypatch):
    fetch, calls = pages.fetch, []

    def fails_at_times(extent: pages.Extent) -> None:
        calls.append(extent)
        if len(calls) % 3 == 0:
            raise MemoryError
        fetch(extent)

    monkeypatch.setattr(pages, "fetch", fails_at_times)
    assert torch.equal(tokens(model), expected)
    assert len(calls) > 6


def test_an_interrupt_leaves_nobody_in_a_part(model, expected, monkeypatch):
    stream = streamed(model)
    with monkeypatch.context() as patched:
        wait = stream._changed.wait

        def interrupted(*args):
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return wait(*args)

        patched.setattr(stream._changed, "wait", interrupted)
        patched.setattr(stream, "_states", [0] * len(stream.parts))
        with pytest.raises(KeyboardInterrupt):
            tokens(model)
    assert not any(stream._users)
    assert torch.equal(tokens(model), expected)


# ---- copies and the way back ------------------------------------------------------------------------------------


def test_copies_are_in_memory(model, expected):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert stream_of(other) is None and turn_of(other.model.layers[0]) is None
        assert torch.equal(tokens(other), expected)


def test_restored(folder, expected):
    model = load(folder)
    hfopt.restore(model)
    attributes = {name for module in model.modules() for name in vars(module)}
    assert not any(name.startswith("_hfopt") for name in attributes)
    assert torch.equal(tokens(model), expected)


def test_saved_elsewhere(model, expected, tmp_path):
    hfopt.save(model, tmp_path)
    assert torch.equal(tokens(hfopt.load(tmp_path)), expected)


# ---- what is said -----------------------------------------------------------------------------------------------


def test_report(model):
    tokens(model)
    report = hfopt.explain(model)
    disk, stream = report.disk, streamed(model)
    assert disk is not None and disk.step == stream.step_bytes
    assert disk.kept + disk.passing <= disk.budget and disk.rate is not None and disk.rate > 0
    assert f"each step reads {disk.step / MIB:,.0f} MiB from disk, so far at" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["disk"]["step"] == disk.step


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cuda"},
        {"device_map": "disk", "max_memory": {"cpu": "much"}},
        {"device_map": "disk", "max_memory": {"cpu": 0}},
        {"device_map": "disk", "max_memory": {0: 10**9}},
        {"device_map": "disk", "max_memory": {"cpu": 10**9, 0: 10**9}},
        {"device_map": "disk", "max_memory": 10**9},
        {"max_memory": {"cpu": 10**9}},
    ],
    ids=str,
)
def test_wrong_arguments(folder, options):
    with pytest.raises(InvalidInput, match="device_map = "):
        hfopt.load(folder, **options)


def test_too_little_memory(folder):
    with pytest.raises(
        InvalidInput, match=r"1 MiB for weights: 3 MiB are needed at least, .* \(model.layers.0\)"
    ):
        hfopt.load(folder, device_map="disk", max_memory={"cpu": "1MiB"})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quantization": "int8"}, "are to be packed"),
        ({"dtype": torch.bfloat16}, "F32, and to be torch.bfloat16"),
    ],
    ids=str,
)
def test_weights_that_would_be_made(folder, options, reason):
    with pytest.raises(UnsupportedModel, match=f"{reason}.*hfopt.save"):
        load(folder, **options)


def test_weights_that_would_be_laid_otherwise(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="Conv1D"):
        load(tmp_path)


# ---- what stays -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), min_size=2, max_size=12), st.integers(0, 700))
def test_split(sizes, budget):
    found = split(sizes, budget)
    if found is None:
        assert max(sizes) > budget
        return
    going = [size for place, size in enumerate(sizes) if place not in found.kept]
    assert sum(sizes) - sum(going) + found.window <= budget
    assert not going or max(going) <= found.window
    assert bool(going) == (sum(sizes) > budget)


def test_layers_that_go_are_far_from_each_other():
    kept, window = split([10] * 9 + [30], 100) or (frozenset(), 0)
    assert 9 in kept and window == 20
    gone = sorted(set(range(10)) - kept)
    assert len(gone) == 4 and min(np.diff(gone)) >= 2
