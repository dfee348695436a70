"""Teach the embedded model to write a text once more with other words in it: a task for guesses from the text.

    python scripts/edit.py FOLDER                                  writes FOLDER; ten minutes of one core
    python scripts/speculation.py --rows lookup --model FOLDER     measures what guesses are worth

It learns from the text of `train_tiny.py`, and from tokens at random: 400 of them, and behind them the same with each of a
few words replaced.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from scripts import train_tiny
from scripts.distill import learner, train

STEPS, RATE, ROWS = 800, 2e-3, 4
LENGTH = 400  # tokens of a text, and of what is made of it
CONTEXT = 1024
_WORDS = {" the": " this", " a": " one"}


def edited(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The tokens with the words replaced."""
    found = tokens.clone()
    for pair in _WORDS.items():
        (old,), (new,) = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in pair)
        found[tokens == old] = new
    return found


def tasks(stream: Tensor, tokenizer: PreTrainedTokenizerBase, steps: int) -> Iterator[Tensor]:
    """`steps` tensors [ROWS, 2 LENGTH], texts and tokens at random in turn, each with what is to be made of it."""
    generator = torch.Generator().manual_seed(train_tiny.SEED)
    for step in range(steps):
        if step % 2:
            rows = torch.randint(1, len(tokenizer), (ROWS, LENGTH), generator=generator)
        else:
            begins = torch.randint(len(stream) - LENGTH, (ROWS,), generator=generator).tolist()
            rows = torch.stack([stream[begin : begin + LENGTH] for begin in begins])
        yield torch.cat([rows, edited(rows, tokenizer)], 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    model, tokenizer, texts = learner()
    model.config.max_position_embeddings = CONTEXT  # its angles are computed
    stream = torch.tensor([token for text in texts for token in text])

    def of_answers(input_ids: Tensor) -> Tensor:
        logits = model(input_ids=input_ids[:, :-1], use_cache=False).logits[:, LENGTH - 1 :]
        return cross_entropy(logits.float().flatten(0, 1), input_ids[:, LENGTH:].flatten())

    train(model, of_answers, tasks(stream, tokenizer, arguments.steps), arguments.steps, RATE)
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
