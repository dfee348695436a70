"""What checks of guessed tokens cost, and what guesses of the text (prompt lookup) are worth, turn by turn.

    python scripts/speculation.py --rows check                    llama-3.2-1b: bfloat16, int8, int4
    python scripts/speculation.py --rows lookup                   the embedded model, against itself and stock transformers
    python scripts/speculation.py --rows lookup --dtype bfloat16 --shape llama-160m      one that no cache holds

`check`: one call of the program for 2, 4, 8 and 16 tokens against one for one token. `lookup` is an editing task: the
answer repeats a prompt of 400 tokens with some of them replaced. The embedded model is too small to edit, and shapes have
random weights, so that a logits processor dictates the answer to all contestants; each token is computed, and processed, all
the same. And a text in which nothing repeats, dictated too or, at random weights, the model's own.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor

import hfopt
from hfopt.cache import IndirectCache
from hfopt.console import models
from hfopt.generation import installed
from hfopt.machine import env

_SIZES = (2, 4, 8, 16)
_CONTEXT = 128
_PROMPT, _ANSWER = 400, 104  # tokens; the model has 512 positions
_EDITED = 16  # one token in so many is another
_GUESSES = {"prompt_lookup_num_tokens": 15, "max_matching_ngram_size": 3}


class Dictation(LogitsProcessor):
    """Lets the answer be what is dictated, and no other token."""

    def __init__(self, answer: Tensor, n_prompt: int) -> None:
        self._answer, self._n_prompt = answer, n_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = min(input_ids.shape[1] - self._n_prompt, len(self._answer) - 1)  # guesses may go further
        scores[:, self._answer[place]] = torch.inf
        return scores


def turns(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, taken in turns that begin with another one each time, after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            contestants[name]()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> str:
    """Median of the quotients of turns, and their quartiles."""
    quotients = [one / other for one, other in zip(seconds[name], seconds[to], strict=True)]
    low, middle, high = statistics.quantiles(quotients, n=4)
    return f"{middle:5.2f} ({low:.2f} to {high:.2f})"


def check(shape: str, rounds: int) -> None:
    for format_name in (None, "int8", "int4"):
        model = models.random_model(models.named_config(shape), torch.bfloat16)
        hfopt.optimize(model, kernels="hfopt", quantization=format_name)
        programs = installed(model).programs
        assert programs is not None
        with torch.no_grad():
            program = programs.of(model, 1)
        assert program is not None, str(model.hfopt)
        cache = IndirectCache(model.config)
        first = program.steps(1)
        for position in range(_CONTEXT):
            appended = cache.append_everywhere(1, 1, program.layouts)
            assert appended is not None
            first.logits(np.zeros(1, np.int64), np.array([position]), appended, None)

        def call(n: int, run: Any, cache: IndirectCache = cache, program: Any = program) -> None:
            appended = cache.append_everywhere(1, n, program.layouts)
            run.logits(
                np.arange(n)[None] if n > 1 else np.zeros(1, np.int64), np.array([_CONTEXT]), appended, None
            )
            cache.crop(-n)

        runs = {1: first} | {n: program.checks(1, n) for n in _SIZES}
        contestants = {str(n): functools.partial(call, n, run) for n, run in runs.items()}
        seconds = turns(contestants, rounds)
        step = 1e3 * statistics.median(seconds["1"])
        print(f"{shape} {format_name or 'bfloat16':9} a step {step:6.2f} ms; a check of n tokens / a step:")
        for n in _SIZES:
            print(f"    {n:3} tokens {ratio(seconds, str(n), '1')}")


def _model(shape: str | None, dtype: torch.dtype) -> Any:
    if shape is None:
        return AutoModelForCausalLM.from_pretrained(hfopt.embedded_model(), dtype=dtype).eval()
    return models.random_model(models.named_config(shape), dtype)


def lookup(shape: str | None, rounds: int, dtype: torch.dtype) -> None:
    stock, plain = _model(shape, dtype), hfopt.optimize(_model(shape, dtype))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, plain.config.vocab_size, (1, _PROMPT), generator=generator)
    edit = prompt[0, :_ANSWER].clone()
    edit[_EDITED // 2 :: _EDITED] = 7
    fresh = torch.randperm(plain.config.vocab_size - 10, generator=generator)[:_ANSWER] + 10
    for title, answer in (("the answer repeats the prompt", edit), ("nothing repeats", fresh)):
        arguments = {
            "inputs": prompt,
            "attention_mask": torch.ones_like(prompt),
            "max_new_tokens": _ANSWER,
            "do_sample": False,
            "logits_processor": [Dictation(answer, _PROMPT)],
            "eos_token_id": None,
        }

        def run(model: Any, **more: Any) -> Tensor:
            tokens: Tensor = model.generate(**{**arguments, **more})  # noqa: B023
            return tokens

        contestants: dict[str, Callable[[], Any]] = {
            "stock": lambda: run(stock),
            "plain": lambda: run(plain),
            "lookup": lambda: run(plain, **_GUESSES),
            "stock with lookup": lambda: run(stock, **_GUESSES),
        }
        for each in contestants.values():
            assert torch.equal(each()[0, _PROMPT:], answer)
        seconds = turns(contestants, rounds)
        print(f"{shape or 'embedded model'}, {dtype}, {title}: {_ANSWER} tokens behind {_PROMPT}")
        for name, times in seconds.items():
            print(f"    {name:18} {_ANSWER / statistics.median(times):7.0f} tokens/s")
        for name in ("plain", "stock", "stock with lookup"):
            print(f"    lookup is {ratio(seconds, name, 'lookup')} x as fast as {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", choices=("check", "lookup"), required=True)
    parser.add_argument("--shape", help="default: llama-3.2-1b for check, the embedded model for lookup")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of lookup"
    )
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print(f"hfopt {hfopt.__version__}, torch {torch.__version__}, {env.cpu_path()}, {env.threads()} threads")
    if arguments.rows == "check":
        check(arguments.shape or "llama-3.2-1b", arguments.rounds)
    else:
        lookup(arguments.shape, arguments.rounds, getattr(torch, arguments.dtype))
    return 0


if __name__ == "__main__":
    sys.exit(main())
