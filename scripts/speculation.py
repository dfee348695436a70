"""What checks of guessed tokens cost, and what guesses of the text (prompt lookup) are worth, turn by turn.

    python scripts/speculation.py --rows check                    llama-3.2-1b: bfloat16, int8, int4
    python scripts/speculation.py --rows lookup                   the embedded model, against itself and stock transformers
    python scripts/speculation.py --rows lookup --dtype bfloat16 --shape llama-160m      one that no cache holds
    python scripts/speculation.py --rows lookup --model FOLDER    one that `edit.py` has taught to edit

`check`: one call of the program for 2, 4, 8 and 16 tokens against one for one token. `lookup` is an editing task: the
answer repeats a prompt of 400 tokens with some of them replaced. The embedded model has not learnt to edit, and shapes have
random weights, so that a logits processor dictates the answer to all contestants; each token is computed, and processed, all
the same. And a text in which nothing repeats, dictated too.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

import hfopt
from hfopt.cache import IndirectCache
from hfopt.console import models
from hfopt.generation import installed
from hfopt.machine import env
from scripts import train_tiny
from scripts.edit import LENGTH, edited

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


class Task(NamedTuple):
    """A prompt, int64 [1, n], and what is to come of it; dictated to a model that would say something else."""

    title: str
    prompt: Tensor
    answer: Tensor
    is_dictated: bool = True

    def run(self, model: Any, **more: Any) -> Tensor:
        """The tokens behind the prompt."""
        n_prompt, n_new = self.prompt.shape[1], len(self.answer)
        processors = [Dictation(self.answer, n_prompt)] if self.is_dictated else []
        found: Tensor = model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=n_new,
            do_sample=False,
            logits_processor=processors,
            eos_token_id=None,
            **more,
        )
        return found[0, n_prompt:]


def _dictations(n_tokens: int) -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, n_tokens, (1, _PROMPT), generator=generator)
    edit = prompt[0, :_ANSWER].clone()
    edit[_EDITED // 2 :: _EDITED] = 7
    fresh = torch.randperm(n_tokens - 10, generator=generator)[:_ANSWER] + 10
    return [Task("the answer repeats the prompt", prompt, edit), Task("nothing repeats", prompt, fresh)]


def _edits(folder: Path) -> list[Task]:
    """What a model has been taught by `edit.py`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = train_tiny.read_heldout(train_tiny.EMBEDDED / train_tiny.HELDOUT)
    stream = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(1, len(tokenizer), (LENGTH,), generator=generator)
    prompts = {"held-out text": stream[:LENGTH], "tokens at random": anything}
    return [
        Task(f"{title}, edited", prompt[None], edited(prompt, tokenizer), is_dictated=False)
        for title, prompt in prompts.items()
    ]


def lookup(name: str, load: Callable[[], Any], tasks: Sequence[Task], rounds: int) -> None:
    stock, plain = load(), hfopt.optimize(load())
    for task in tasks:
        contestants: dict[str, Callable[[], Any]] = {
            "stock": functools.partial(task.run, stock),
            "plain": functools.partial(task.run, plain),
            "lookup": functools.partial(task.run, plain, **_GUESSES),
            "stock with lookup": functools.partial(task.run, stock, **_GUESSES),
        }
        said = [run() for run in contestants.values()]
        assert all(torch.equal(each, said[0]) for each in said)
        n_right, n_new = int((said[0] == task.answer).sum()), len(task.answer)
        n_copied = int((said[0] == task.prompt[0, :n_new]).sum())
        seconds = turns(contestants, rounds)
        print(f"{name}, {plain.dtype}, {task.title}: {n_new} tokens behind {task.prompt.shape[1]}")
        print(f"    {n_right} as wanted, {n_copied} of them as in the prompt")
        for contestant, times in seconds.items():
            print(f"    {contestant:18} {n_new / statistics.median(times):7.0f} tokens/s")
        for other in ("plain", "stock", "stock with lookup"):
            print(f"    lookup is {ratio(seconds, other, 'lookup')} x as fast as {other}")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", choices=("check", "lookup"), required=True)
    parser.add_argument("--shape", help="default: llama-3.2-1b for check, the embedded model for lookup")
    parser.add_argument("--model", type=Path, help="of lookup: what edit.py has written")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of lookup"
    )
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print(f"hfopt {hfopt.__version__}, torch {torch.__version__}, {env.cpu_path()}, {env.threads()} threads")
    if arguments.rows == "check":
        check(arguments.shape or "llama-3.2-1b", arguments.rounds)
        return 0
    dtype = getattr(torch, arguments.dtype)
    if arguments.shape is not None:
        config = models.named_config(arguments.shape)
        name = arguments.shape
        load: Callable[[], Any] = functools.partial(models.random_model, config, dtype)
    else:
        folder = arguments.model or Path(hfopt.embedded_model())
        name = "embedded model" if arguments.model is None else "embedded model, taught to edit"
        load = functools.partial(AutoModelForCausalLM.from_pretrained, folder, dtype=dtype)
        config = AutoConfig.from_pretrained(folder)
    tasks = _dictations(config.vocab_size) if arguments.model is None else _edits(arguments.model)
    lookup(name, load, tasks, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
