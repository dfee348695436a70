"""The embedded model is what its card says."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hfopt.embedded import embedded_model

FOLDER = Path(embedded_model())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The sums of the script, and no threads that wait for each other over matrices as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def train_tiny() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "train_tiny.py"
    spec = importlib.util.spec_from_file_location("train_tiny", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, use_safetensors=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def card() -> str:
    return (FOLDER / "MODEL.md").read_text(encoding="utf-8")


def test_folder_is_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= sizes.keys()
    assert sum(sizes.values()) <= 5_000_000
    assert sizes["heldout.txt"] <= 40_000


def test_stored_in_bfloat16_with_tied_embeddings(model):
    stored = LlamaForCausalLM.from_pretrained(FOLDER, dtype="auto", use_safetensors=True)
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_attention_heads > model.config.num_key_value_heads > 1


@pytest.mark.parametrize("text", ["Return a list of\n\n    names.", "ß ☃ \t\x00\r\n", "", "  two  spaces "])
def test_tokenizer_round_trip(tokenizer, text):
    input_ids = tokenizer(text)["input_ids"]
    assert input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(input_ids, skip_special_tokens=True) == text


def test_tokenizer_and_model_agree(tokenizer, model):
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    for config in (model.config, model.generation_config):
        ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
        assert ids == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_perplexity_is_what_the_card_says(train_tiny, model, tokenizer, card):
    row = re.search(r"^\| heldout\.txt \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
    assert row is not None
    result = train_tiny.evaluate(model, tokenizer, train_tiny.read_heldout(FOLDER / "heldout.txt"))
    assert (result.tokens, result.bytes) == (int(row[1]), int(row[2]))
    assert result.perplexity == pytest.approx(float(row[3]), rel=0.01)
    assert result.bits_per_byte == pytest.approx(float(row[4]), rel=0.01)
    assert result.perplexity < 60


def test_demo_continuation_is_what_the_card_says(train_tiny, model, tokenizer, card):
    pattern = rf"^`{re.escape(train_tiny.DEMO_PROMPT)}`\n\n```text\n(.*?)\n```$"
    sample = re.search(pattern, card, re.MULTILINE | re.DOTALL)
    assert sample is not None
    assert train_tiny.continuation(model, tokenizer, train_tiny.DEMO_PROMPT) == sample[1]


def test_greedy_text_does_not_collapse(train_tiny, model, tokenizer):
    for prompt in train_tiny.PROMPTS:
        words = train_tiny.continuation(model, tokenizer, prompt).split()
        triples = list(zip(words, words[1:], words[2:], strict=False))
        assert len(words) > len(prompt.split())
        assert len(set(triples)) > 0.8 * len(triples), f"{prompt!r} repeats itself"


def test_heldout_texts_are_on_the_heldout_side(train_tiny):
    texts = train_tiny.read_heldout(FOLDER / "heldout.txt")
    training, heldout = train_tiny.split(texts)
    assert not training
    assert heldout == texts


def test_split_keeps_copies_together(train_tiny):
    texts = [f"Return item number {name}." for name in "abcdefghijklmnopqrstuvwxyz" * 20]
    texts += [text.replace(" ", "\n    ").upper() for text in texts]
    training, heldout = train_tiny.split(texts)
    assert len(training) + len(heldout) == 26
    assert not {train_tiny.words(text) for text in training} & {train_tiny.words(text) for text in heldout}


def test_evaluation_counts_every_token_once(train_tiny, model, tokenizer):
    """Against transformers' own loss, for a text of one piece, and as a sum over the pieces of a long one."""
    text = "Return the number of items in the list."
    input_ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        loss = model(input_ids=input_ids, labels=input_ids).loss.item()
    result = train_tiny.evaluate(model, tokenizer, [text])
    assert result.tokens == input_ids.shape[1] - 1
    assert result.nats == pytest.approx(loss * result.tokens, rel=1e-4)

    long = " item" * (train_tiny.CONTEXT + 50)
    assert train_tiny.evaluate(model, tokenizer, [long]).tokens == len(tokenizer(long)["input_ids"])
