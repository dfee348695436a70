"""What answers of a given form cost, and what tokens without a choice are worth, turn by turn.

    python scripts/structured.py                          llama-160m in bfloat16, JSON by a schema, greedy

Contestants: the same number of tokens without a grammar (`plain`), and with a processor that does nothing; the grammar with
and without guesses of the tokens that it leaves no choice about; and stock transformers with the same grammar. Weights are
random, and so is what stands in the strings; the tokenizer, of 32,000 tokens, is trained on Python's standard library.
"""

import argparse
import json
import statistics
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerFast

import hfopt
from hfopt.console.models import named_config, random_model
from hfopt.generation.derivation import Derivation
from hfopt.machine import env
from scripts.speculation import ratio, turns

_PROMPT = 32  # tokens
_TRAINED_ON = 12 << 20  # characters
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "identifier": {"type": "integer", "minimum": 0, "maximum": 99999},
        "full_name": {"type": "string", "maxLength": 24},
        "email_address": {"type": "string", "maxLength": 24},
        "is_customer": {"type": "boolean"},
        "country": {"enum": ["Austria", "Germany", "Switzerland"]},
        "orders": {
            "type": "array",
            "minItems": 3,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {
                    "article_number": {"type": "integer", "minimum": 0, "maximum": 9999},
                    "description": {"type": "string", "maxLength": 24},
                    "quantity": {"type": "integer", "minimum": 1, "maximum": 20},
                },
                "required": ["article_number", "description", "quantity"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["identifier", "full_name", "email_address", "is_customer", "country", "orders"],
    "additionalProperties": False,
}


class Nothing(LogitsProcessor):
    """A processor of a user."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


def trained_tokenizer(n_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of so many tokens, trained on the standard library."""
    texts, left = [], _TRAINED_ON
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if left > 0 and "site-packages" not in path.parts:
            texts.append(path.read_text(errors="replace"))
            left -= len(texts[-1])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=n_tokens, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--shape", default="llama-160m")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print(f"hfopt {hfopt.__version__}, torch {torch.__version__}, {env.cpu_path()}, {env.threads()} threads")

    config = named_config(arguments.shape)
    tokenizer = trained_tokenizer(config.vocab_size)
    grammar = hfopt.Grammar.json(_SCHEMA, tokenizer)
    stock = random_model(config, torch.bfloat16)
    ours: Any = hfopt.optimize(random_model(config, torch.bfloat16))
    prompt = torch.arange(100, 100 + _PROMPT)[None]
    shown = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}

    def answer(model: Any) -> Tensor:
        tokens: Tensor = model.generate(
            prompt, logits_processor=[grammar], eos_token_id=0, max_new_tokens=600, **shown
        )
        return tokens[0, _PROMPT:]

    def unguessed(model: Any) -> Tensor:
        with mock.patch.object(Derivation, "guess", lambda derivation, n: None):
            return answer(model)

    expected = answer(ours)
    json.loads(str(tokenizer.decode(expected[:-1])))
    n_tokens = len(expected)
    whole = {**shown, "eos_token_id": None, "max_new_tokens": n_tokens}
    contestants: dict[str, Callable[[], Any]] = {
        "plain": lambda: ours.generate(prompt, **whole),
        "a processor": lambda: ours.generate(prompt, logits_processor=[Nothing()], **whole),
        "grammar, no guesses": lambda: unguessed(ours),
        "grammar": lambda: answer(ours),
        "stock, grammar": lambda: answer(stock),
    }
    assert torch.equal(unguessed(ours), expected)
    seconds = turns(contestants, arguments.rounds)
    print(f"{arguments.shape}, bfloat16, JSON of {n_tokens} tokens behind {_PROMPT}")
    for name, times in seconds.items():
        print(f"    {name:20} {n_tokens / statistics.median(times):7.1f} tokens/s")
    for name in ("a processor", "grammar, no guesses", "grammar"):
        more = [one - other for one, other in zip(seconds[name], seconds["plain"], strict=True)]
        print(f"    {name:20} {1000 * statistics.median(more) / n_tokens:+7.3f} ms a token against plain")
    for name in ("plain", "grammar, no guesses", "stock, grammar"):
        print(f"    guesses are {ratio(seconds, name, 'grammar')} x as fast as {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
