"""Every causal language model type of transformers: what of a tiny random model runs in hfopt, and whether it says the same.

    python scripts/model_types.py                              a line for each type
    python scripts/model_types.py --types gemma2,olmo2         these only
    python scripts/model_types.py --json types.json            all there is to know of each
    python scripts/model_types.py --markdown docs/models.md    a page of them

A type is made of generic sizes (`tests/model_types.py`) and generates in float32, greedily and with two beams, before and
after `hfopt.optimize`. Exit code 1 if tokens or logits differ by more than rounding makes of it, or if anything is raised.

How a type runs: "program" is a decoder that is one call from Python, for texts of any length; "modules" are parts in hfopt's
kernels; "nothing" is the model as it was; "skipped" is a type of which there is no such model.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from torch import Tensor

import hfopt
from hfopt.cache import IndirectCache
from hfopt.patches.probe import allowed
from hfopt.patches.scene import shaken
from tests import model_types

_N_NEW, _N_BEAMS = 24, 2
_TIE = 1e-5  # of the largest logit: tokens nearer to each other may change places
_LARGEST = 1e-3  # error of logits that no one looks into
_SECONDS, _PER_PROCESS = 60, 30
# of modules that are no obstacle, or that hfopt has nothing like
_USUAL = re.compile("a PreTrainedModel keeps|it matches no pattern|part of |.* reads its weights")
GOOD = ("same", "tie", "unsteady", "")


@dataclass
class Row:
    """What there is to say of a type.

    runs: "program", "modules", "nothing" or "skipped". parts: number of modules swapped. reason: why it is no program.
    kept: modules that hfopt has something like, and why they are not swapped. tokens: "same", "tie" (of equal logits, one or
    the other), "unsteady" (so are transformers' own, where inputs change in the last bit), or what is wrong. error: of
    logits, as a share of the largest. seconds: for 24 tokens of two rows, stock and optimized.
    """

    type: str
    runs: str = "skipped"
    parts: int = 0
    reason: str = ""
    kept: tuple[str, ...] = ()
    tokens: str = ""
    error: float = 0.0
    seconds: tuple[float, float] = (0.0, 0.0)

    def __str__(self) -> str:
        numbers = (
            ""
            if self.runs == "skipped"
            else f"{self.error:.0e}  {self.seconds[0]:.2f} {self.seconds[1]:.2f} s"
        )
        return (
            f"{self.type:26} {self.runs:8} {self.parts:3}  {self.tokens:5} {numbers:17}  {self.why}".rstrip()
        )

    @property
    def why(self) -> str:
        """Reason, and what else is in the way."""
        return "; ".join((self.reason, *self.kept)) if self.reason else ""

    def obstacles(self) -> set[str]:
        """Each of `why` without what is of this type alone."""
        return {
            re.sub(r"^\w+: | by [\d.e-]+ of the largest value", "", each)
            for each in self.why.split("; ")
            if each
        }


class _Answers(NamedTuple):
    """Of one model. beams: None if it cannot have any."""

    greedy: Any
    beams: Any
    plain: Tensor
    seconds: float


def _ask(model: Any) -> _Answers:
    request = {**model_types.prompts(), "max_new_tokens": _N_NEW, "do_sample": False}
    outputs = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    model.generate(**{**request, "max_new_tokens": 2})
    begin = time.perf_counter()
    plain = model.generate(**request)
    seconds = time.perf_counter() - begin
    try:
        beams = model.generate(**request, **outputs, num_beams=_N_BEAMS)
    except Exception as error:  # noqa: BLE001 (recurrent models have no beams)
        beams = error
    return _Answers(model.generate(**request, **outputs), beams, plain, seconds)


def row_of(name: str) -> Row:
    """Make, ask, optimize and ask again."""
    try:
        model = model_types.tiny(name)
        stock = _ask(model)
    except model_types.Skipped as error:
        return Row(name, reason=str(error))
    except Exception as error:  # noqa: BLE001 (what a foreign model cannot do is no fault of ours)
        return Row(name, reason=f"transformers' own generate raises {_words(error)}")
    try:
        report = hfopt.optimize(model, kernels="hfopt").hfopt
        ours = _ask(model)
    except Exception as error:  # noqa: BLE001 (a fault, and the table goes on)
        return Row(name, "nothing", tokens=f"raises {_words(error)}")
    runs, reason = "program", ""
    if report.by_module is not None:
        runs, reason = "modules" if report.swapped else "nothing", report.by_module
    elif not any(isinstance(value, IndirectCache) for value in ours.greedy.values()):
        runs, reason = (
            "modules",
            f"texts of more than {report.window} tokens, its window, get transformers' cache",
        )
    tokens, difference = _compared(stock, ours)
    if tokens not in GOOD or difference > _LARGEST:
        unsteady = model_types.tiny(name)
        unsteady.get_input_embeddings().register_forward_hook(lambda module, args, output: shaken(output))
        their_tokens, noise = _compared(stock, _ask(unsteady))
        if difference <= allowed(noise) and (tokens in GOOD or their_tokens not in GOOD):
            tokens = "unsteady"
        elif tokens in GOOD:
            tokens = "logits differ"
    kept = {
        f"{each.old_class.rpartition('.')[2]}: {each.reason}"
        for each in report.kept
        if not _USUAL.match(each.reason)
    }
    return Row(
        name,
        runs,
        len(report.swapped),
        reason.replace(type(model).__name__, "it"),
        tuple(sorted(kept)),
        tokens,
        difference,
        (stock.seconds, ours.seconds),
    )


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _compared(stock: _Answers, ours: _Answers) -> tuple[str, float]:
    """(tokens, largest error of the logits up to the first token that differs)."""
    theirs, mine = torch.stack(stock.greedy.logits).double(), torch.stack(ours.greedy.logits).double()
    differs = (stock.greedy.sequences != ours.greedy.sequences)[:, -_N_NEW:]
    step = int(differs.any(0).int().argmax()) if differs.any() else _N_NEW - 1
    error = _error(theirs[: step + 1], mine[: step + 1])
    if differs.any():
        rows = differs[:, step]
        gap = theirs[step, rows].topk(2).values.diff().abs().max() / theirs[step].abs().max()
        if gap > _TIE:
            return f"differ from token {step + 1} on", error
    elif not torch.equal(ours.plain, ours.greedy.sequences):
        return "differ where nobody looks at logits", error
    if isinstance(stock.beams, Exception):
        return "tie" if differs.any() else "same", error
    if isinstance(ours.beams, Exception):
        return f"beams raise {_words(ours.beams)}", error
    if torch.equal(stock.beams.sequences, ours.beams.sequences):
        return "tie" if differs.any() else "same", error
    scores = _error(stock.beams.sequences_scores, ours.beams.sequences_scores)
    return "tie" if scores <= _TIE else f"beams differ, their scores by {scores:.0e}", error


def _error(theirs: Tensor, mine: Tensor) -> float:
    return float(torch.where(theirs == mine, 0.0, (theirs - mine).abs()).max() / theirs.abs().max())


# ---- processes ---------------------------------------------------------------------------------------------


def _work(names: list[str]) -> None:
    """Print rows as JSON; one that takes too long ends the process."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in names:
        signal.alarm(_SECONDS)
        print(json.dumps(asdict(row_of(name))), flush=True)


def rows(names: list[str]) -> Iterator[Row]:
    """Rows in order, from processes that may crash."""
    while names:
        command = [sys.executable, __file__, "--work", ",".join(names[:_PER_PROCESS])]
        done = 0
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                if line.startswith("{"):
                    done += 1
                    yield Row(**json.loads(line))
        if done < len(names[:_PER_PROCESS]):
            yield Row(names[done], "nothing", tokens=f"the process ended with status {worker.returncode}")
            done += 1
        names = names[done:]


# ---- output ------------------------------------------------------------------------------------------------


_PAGE = """# Models

Each causal language model type of transformers {version}, as a tiny random model in float32: written by
`python scripts/model_types.py --markdown docs/models.md`, which also compares what each generates, greedily and with
beams, before and after `hfopt.optimize`. Prompts are padded, and longer than the windows.

{counts}

- **program**: the whole decoder is one call from Python a step, for texts of any length.
- **modules**: the parts that hfopt knows run in its kernels; the rest is transformers' own code.
- **nothing**: the model runs as it was.
- **skipped**: there is no tiny model of it that continues texts.

| type | runs as | parts in kernels | why no program |
|---|---|---:|---|
"""


def _page(table: list[Row]) -> str:
    numbers = Counter(row.runs for row in table)
    kinds = {
        "program": "by program",
        "modules": "by modules",
        "nothing": "as they were",
        "skipped": "skipped",
    }
    counts = ", ".join(f"{numbers[runs]} {words}" for runs, words in kinds.items())
    lines = [
        f"| `{row.type}` | {row.runs} | {row.parts or ''} | {row.why.replace('|', '/')} |" for row in table
    ]
    return _PAGE.format(version=transformers.__version__, counts=f"{counts}.") + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--types", help="comma-separated, instead of all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a page")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        _work(arguments.work.split(","))
        return 0
    names = arguments.types.split(",") if arguments.types else list(model_types.TYPES)
    if unknown := sorted(set(names) - set(model_types.TYPES)):
        parser.error(f"--types: transformers {transformers.__version__} has no {', '.join(unknown)}")
    table = []
    for row in rows(names):
        print(row, flush=True)
        table.append(row)
    wrong = [row for row in table if row.tokens not in GOOD]
    print(f"\n{dict(Counter(row.runs for row in table))}, {len(wrong)} wrong: {[row.type for row in wrong]}")
    reasons = Counter(reason for row in table for reason in row.obstacles() if row.runs != "skipped")
    for reason, number in reasons.most_common():
        print(f"{number:4}  {reason}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in table], indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(_page(table))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
