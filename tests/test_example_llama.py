"""examples/custom_llama.py against LlamaForCausalLM: the same checkpoint, the same tokens."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hfopt
from examples import custom_llama

N_NEW = 24
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
FORMS: dict[str, dict[str, Any]] = {
    "untied, llama3": {"num_key_value_heads": 2, "rope_parameters": LLAMA3},
    "tied, biases, multi-query, odd head size": {
        **{"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True, "head_dim": 22},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "multi-head, yarn": {
        "num_key_value_heads": 4,
        "rope_parameters": {
            **{
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            **{"beta_fast": 32.0, "beta_slow": 1.0},
        },
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
}


def checkpoint(folder: Path, form: str) -> LlamaForCausalLM:
    """A small random model, which is also written to `folder`, in several files."""
    torch.manual_seed(len(form))
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **FORMS[form]})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").exists()
    return model


def prompts(n_tokens: tuple[int, ...], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Random prompts of these lengths, padded on the left."""
    is_text = torch.arange(max(n_tokens)) >= max(n_tokens) - torch.tensor(n_tokens)[:, None]
    return torch.randint(4, vocabulary, is_text.shape) * is_text, is_text.long()


def expected(model: LlamaForCausalLM, ids: Tensor, is_text: Tensor, n_beams: int, eos: Tensor) -> Tensor:
    settings = {
        "max_new_tokens": N_NEW,
        "num_beams": n_beams,
        "do_sample": False,
        "eos_token_id": eos.tolist(),
    }
    tokens = model.generate(ids, attention_mask=is_text, pad_token_id=int(eos[0]), **settings)[
        :, ids.size(1) :
    ]
    return torch.nn.functional.pad(tokens, (0, N_NEW - tokens.size(1)), value=int(eos[0]))


def assert_same_tokens(model: LlamaForCausalLM, folder: str | Path, eos: Tensor) -> None:
    own = custom_llama.load(folder, torch.float32)
    ids, is_text = prompts((5, 12, 1), model.config.vocab_size)
    assert torch.equal(
        custom_llama.greedy(own, ids, is_text, N_NEW, eos), expected(model, ids, is_text, 1, eos)
    )
    beams = custom_llama.beam_search(own, ids, is_text, N_NEW, eos, 4)
    assert torch.equal(beams, expected(model, ids, is_text, 4, eos))


@pytest.mark.parametrize("form", FORMS)
def test_tokens_of_any_llama(form: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, form)
    assert_same_tokens(model, tmp_path, torch.tensor([3, 17, 40]))


def test_tokens_of_the_embedded_model() -> None:
    model = LlamaForCausalLM.from_pretrained(hfopt.embedded_model(), dtype=torch.float32)
    assert_same_tokens(model, hfopt.embedded_model(), torch.tensor([0]))


@torch.inference_mode()
def test_bfloat16_is_no_further_from_float32_than_transformers() -> None:
    ids, is_text = prompts((9, 60, 31), 1792)
    exact = LlamaForCausalLM.from_pretrained(hfopt.embedded_model(), dtype=torch.float32)
    stock = LlamaForCausalLM.from_pretrained(hfopt.embedded_model(), dtype=torch.bfloat16)
    own = custom_llama.load(hfopt.embedded_model(), torch.bfloat16)
    past = own.read(is_text[:, :-8])
    steps = [own(new, past) for new in (ids[:, :-8], *ids[:, -8:].split(1, dim=1))]
    ours = torch.stack(steps, dim=1).float()
    wanted, theirs = (model(ids, attention_mask=is_text).logits.float()[:, -9:] for model in (exact, stock))
    assert (ours - wanted).norm() <= 1.5 * (theirs - wanted).norm()


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="not llama with gelu"):
        custom_llama.Llama(LlamaConfig(hidden_act="gelu"), {})


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what LlamaForCausalLM says."""
    tokenizer = AutoTokenizer.from_pretrained(hfopt.embedded_model())
    model = LlamaForCausalLM.from_pretrained(hfopt.embedded_model(), dtype=torch.float32)
    prompt = tokenizer("Once more", return_tensors="pt")
    for n_beams in (1, 3):
        monkeypatch.setattr(
            sys, "argv", ["", "--prompt", "Once more", "--beams", str(n_beams), "--max-new-tokens", "8"]
        )
        custom_llama.main()
        tokens = model.generate(**prompt, num_beams=n_beams, max_new_tokens=8, do_sample=False)
        assert capsys.readouterr().out == f"{tokenizer.decode(tokens[0], skip_special_tokens=True)}\n"


def test_it_stays_a_page() -> None:
    assert len(Path(custom_llama.__file__).read_text().splitlines()) < 250
