"""What it saves not to read the beginnings of prompts again: times to the first token, turn by turn with those without.

    python scripts/prefixes.py                                       both shapes, bfloat16, random weights
    python scripts/prefixes.py --shapes llama-160m --threads 1

Three figures for each shape: another question on a text that a `PrefixCache` knows, against the same request without one;
two tokens alone against that, which is the least that a first token can take, because all weights are read; and some
questions on one document in one call, against one of them alone.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import hfopt
from hfopt.console import models
from hfopt.machine import env

_SHAPES = ["llama-3.2-1b", "llama-160m"]
_KNOWN, _DOCUMENT = 2048, 1024  # tokens
_QUESTION, _QUESTIONS = 16, 16  # tokens of one, and how many
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Prompts:
    """Random texts."""

    def __init__(self, n_tokens: int) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._n_tokens = n_tokens

    def text(self, length: int) -> torch.Tensor:
        return torch.randint(3, self._n_tokens, (length,), generator=self._generator)

    def questions(self, text: torch.Tensor, n_rows: int) -> torch.Tensor:
        """New ones on a text, of slightly different lengths, padded on the left by zeros."""
        shorter = [index % 4 for index in range(n_rows)]
        rows = [torch.cat([text.new_zeros(n), text, self.text(_QUESTION - n)]) for n in shorter]
        return torch.stack(rows)


def _seconds(model: Any, ids: torch.Tensor, **options: Any) -> float:
    mask = (ids != 0).long()
    begin = time.perf_counter()
    model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0, **options)
    return time.perf_counter() - begin


def _show(title: str, pairs: list[tuple[float, float]]) -> None:
    ratio = statistics.median(one / other for one, other in pairs)
    one, other = (statistics.median(each) for each in zip(*pairs, strict=True))
    print(f"  {title:44} {1e3 * one:10.1f} ms / {1e3 * other:10.1f} ms = {ratio:.4f}", flush=True)


def _measure(shape: str, n_layers: int | None, dtype: torch.dtype, rounds: int) -> None:
    config = models.named_config(shape, n_layers)
    config.max_position_embeddings = max(config.max_position_embeddings, _KNOWN + _QUESTION + 1)
    model: Any = models.random_model(config, dtype)
    model.generation_config.eos_token_id = None
    hfopt.optimize(model)
    print(f"{shape}, {config.num_hidden_layers} layers, {dtype}", flush=True)
    prompts, prefix_cache = Prompts(config.vocab_size), hfopt.PrefixCache(model, max_bytes=2**31)
    known, document = prompts.text(_KNOWN), prompts.text(_DOCUMENT)
    _seconds(model, prompts.questions(known[:200], 2))  # compiles
    _seconds(model, prompts.questions(known, 1), prefix_cache=prefix_cache)
    pairs: dict[str, list[tuple[float, float]]] = {"known": [], "least": [], "shared": []}
    for index in range(rounds):
        one, many = prompts.questions(known, 1), prompts.questions(document, _QUESTIONS)
        first: Any = lambda: _seconds(model, one, prefix_cache=prefix_cache)  # noqa: B023, E731
        other: Any = lambda: _seconds(model, one)  # noqa: B023, E731
        all_rows: Any = lambda: _seconds(model, many)  # noqa: B023, E731
        one_row: Any = lambda: _seconds(model, many[:1])  # noqa: B023, E731
        least: Any = lambda: _seconds(model, one[:, -2:])  # noqa: B023, E731
        for names, given in ((("known", "least"), (first, least, other)), (("shared",), (all_rows, one_row))):
            order = given if index % 2 else given[::-1]
            found = {id(each): each() for each in order}
            for name, each in zip(names, given, strict=False):
                pairs[name].append((found[id(each)], found[id(given[-1])]))
    _show(f"{_KNOWN:,} tokens known / read", pairs["known"])
    _show("2 tokens alone / read", pairs["least"])
    _show(f"{_QUESTIONS} questions on {_DOCUMENT:,} tokens / 1", pairs["shared"])
    print(f"  {prefix_cache.use}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=_SHAPES)
    parser.add_argument("--layers", type=int, help="in place of all")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="1 where other processes use the machine")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    print(
        f"{env.cpu_path()}; {torch.get_num_threads()} threads; questions of {_QUESTION - 3} to {_QUESTION} tokens;"
        f" medians of {arguments.rounds} alternating runs, time to the first token"
    )
    for shape in arguments.shapes:
        _measure(shape, arguments.layers, _DTYPES[arguments.dtype], arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
