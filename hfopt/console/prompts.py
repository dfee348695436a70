"""Prompts of any length for the command line, from text that every Python installation carries."""

import argparse
import decimal
import inspect
import itertools
import json
import logging

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfopt.errors import InvalidInput

DEFAULT_PROMPT = "Return a list of the"


def of_text(tokenizer: PreTrainedTokenizerBase, text: str, n_rows: int) -> dict[str, torch.Tensor]:
    """The ids of a text, repeated for `n_rows` rows; raises `InvalidInput` if it has none."""
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise InvalidInput("--prompt is empty: it must hold at least one token")
    return _whole(torch.tensor([ids] * n_rows))


def of_length(tokenizer: PreTrainedTokenizerBase, length: int, n_rows: int) -> dict[str, torch.Tensor]:
    """`length` tokens of documentation for `n_rows` rows, each row from another place in it."""
    documents = (inspect.getdoc(item) or "" for item in (argparse, json, decimal, logging, inspect))
    ids = tokenizer("\n".join(documents))["input_ids"]
    rows = [
        list(itertools.islice(itertools.cycle(ids), row * 17, row * 17 + length)) for row in range(n_rows)
    ]
    return _whole(torch.tensor(rows))


def random_ids(model: PreTrainedModel, length: int, n_rows: int) -> dict[str, torch.Tensor]:
    """`n_rows` rows of `length` random ids that the model knows, the same in every run."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return _whole(torch.randint(vocab_size, (n_rows, length), generator=generator))


def _whole(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
