"""What a draft model is worth: tokens a second with it against the same optimised model without, turn by turn.

    python scripts/distill.py FOLDER            trains a model and a draft of it, once
    python scripts/draft.py FOLDER              greedy search and sampling, float32 and bfloat16

The prompts are beginnings of texts that neither was trained on. Both contestants give the same tokens, which is checked.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfopt
from hfopt.generation.speculation import Speculation
from hfopt.machine import env
from scripts import train_tiny

_PROMPTS, _PROMPT_TOKENS = 6, 24
_MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
}


class Acceptance:
    """Counts guessed tokens and those that were right, in this process, from now on."""

    def __init__(self) -> None:
        self.n_guesses = self.guessed = self.right = 0
        note = Speculation.note

        def counted(speculation: Speculation, n_guessed: int, n_right: int) -> None:
            self.n_guesses += n_guessed > 0
            self.guessed += n_guessed
            self.right += n_right
            note(speculation, n_guessed, n_right)

        setattr(Speculation, "note", counted)  # noqa: B010


def prompts(folder: Path) -> list[Tensor]:
    """Token ids [1, n] of the beginnings of held-out texts that are long enough."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    texts = train_tiny.read_heldout(train_tiny.EMBEDDED / train_tiny.HELDOUT)
    ids = (tokenizer(text, return_tensors="pt")["input_ids"] for text in texts)
    return [each[:, :_PROMPT_TOKENS] for each in ids if each.shape[1] > 2 * _PROMPT_TOKENS][:_PROMPTS]


def turn(model: Any, given: list[Tensor], options: dict[str, Any]) -> tuple[float, list[Tensor]]:
    """(tokens a second, tokens), over all prompts, with the same random numbers in each turn."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    tokens = [model.generate(each, **options) for each in given]
    seconds = time.perf_counter() - begin
    return sum(each.shape[1] - _PROMPT_TOKENS for each in tokens) / seconds, tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draft", type=Path, help="another one than FOLDER/draft")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", choices=_MODES, default=list(_MODES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    given, acceptance = prompts(arguments.folder), Acceptance()
    versions = " ".join(f"{name} {version}" for name, version in env.versions().items())
    print(f"{env.cpu_model()}, {torch.get_num_threads()} threads, {versions}")
    print(
        f"{len(given)} prompts of {_PROMPT_TOKENS} tokens, {arguments.new_tokens} new ones, {arguments.rounds} turns"
    )
    for dtype in arguments.dtypes:
        model, draft = (
            hfopt.optimize(AutoModelForCausalLM.from_pretrained(path, dtype=dtype))
            for path in (arguments.folder / "model", arguments.draft or arguments.folder / "draft")
        )
        for mode in arguments.modes:
            options = {**_MODES[mode], "max_new_tokens": arguments.new_tokens, "eos_token_id": None}
            contestants: dict[str, dict[str, Any]] = {
                "plain": options,
                "draft": {**options, "assistant_model": draft},
            }
            rates: dict[str, list[float]] = {name: [] for name in contestants}
            for index in range(arguments.rounds + 1):
                if index == 1:  # the first one is not counted
                    acceptance.n_guesses = acceptance.guessed = acceptance.right = 0
                found = {}
                for name in sorted(contestants, reverse=bool(index % 2)):
                    rate, found[name] = turn(model, given, contestants[name])
                    rates[name] += [rate] if index else []
                if not all(map(torch.equal, found["plain"], found["draft"])):
                    print("the draft has changed tokens")
                    return 1
            low, middle, high = statistics.quantiles(
                (one / other for one, other in zip(rates["draft"], rates["plain"], strict=True)), n=4
            )
            size = acceptance.guessed / max(acceptance.n_guesses, 1)
            print(
                f"{dtype:8} {mode:8} "
                f"{statistics.median(rates['plain']):7.1f} tokens a second plain, "
                f"{statistics.median(rates['draft']):7.1f} with the draft: {middle:.2f} ({low:.2f} to {high:.2f}); "
                f"{acceptance.right} of {acceptance.guessed} guessed tokens right, {size:.1f} a guess"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
