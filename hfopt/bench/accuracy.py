"""`hfopt accuracy`: what forms of a model predict for a text, against the stock model in float32.

Every token but the first is scored once: in windows that are read at once, and the first tokens of the text again one by
one with a cache. The exit code is 1 where the optimised model that is not quantised is further from float32 than allowed.
"""

import argparse
import gc
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import hfopt
from hfopt import host
from hfopt.console import prompts
from hfopt.console.arguments import add_kv_cache, add_model_arguments, load_model, load_tokenizer
from hfopt.console.output import progress, say, show_table, write_json
from hfopt.errors import InvalidInput

from .accuracy_sums import Figures, Sums

_WINDOW = 512
_RANDOM_TOKENS = 513
_NOT_QUANTISED = "none"
_FORMS = (_NOT_QUANTISED, "int8", "int4", "nf4")
# of the stock model's own error: both round at different places, so neither is always the smaller
_LIMIT = 1.5


@dataclass(frozen=True)
class Form:
    """A way to hold and run the model. quantization, calibration, kv_cache: what `hfopt.optimize` takes."""

    name: str
    is_optimized: bool = True
    quantization: Any = None
    calibration: list[str] | None = None
    kv_cache: str | None = None

    @property
    def is_judged(self) -> bool:
        """Whether the limit holds for it."""
        return self.is_optimized and self.quantization is None and self.kv_cache is None


@dataclass(frozen=True, eq=False)
class Reading:
    """Input ids and the ids that follow them, cut into windows, and how a window is read."""

    by_token: bool
    windows: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def n_tokens(self) -> int:
        return sum(len(targets) for _, targets in self.windows)

    def __str__(self) -> str:
        return f"{self.n_tokens} tokens {'by token' if self.by_token else 'by windows'}"


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    form: Form
    reading: Reading
    figures: Figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hfopt accuracy`."""
    parser.add_argument("model_id", nargs="?", help="a folder or hub id (default: the embedded model)")
    add_model_arguments(parser)
    parser.add_argument(
        "--text", metavar="FILE", help="held-out text (default: what the embedded model was not trained on)"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="of the text, the first N (default: all)")
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help=f"tokens that are read together (default: {_WINDOW}, or as many as the model has positions)",
    )
    parser.add_argument(
        "--by-token",
        type=int,
        default=128,
        metavar="N",
        help="read the first N tokens once more, one by one with a cache; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--quantization",
        action="append",
        metavar="FORMAT",
        help='a format\'s name, or one with its fields as JSON (\'{"format": "int4", "group": 64}\'), or '
        f"'{_NOT_QUANTISED}'; may be repeated (default: {', '.join(_FORMS)})",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="every format once more, with its weights rounded for a text that is none of the held-out ones",
    )
    add_kv_cache(parser, "every optimised form once more, with keys and values")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="figures as JSON to FILE, or instead of the text"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    forms = _forms(args)
    text = None if args.random_weights is not None else read_text("--text", args.text or heldout())
    tokenizer = load_tokenizer(args)
    reference = load_model(_in_float32(args))
    readings = _readings(args, reference, _token_ids(args, reference, tokenizer, text))
    total = len(forms) * sum(len(reading.windows) for reading in readings)
    lines: list[Line] = []
    with progress("Reading", total) as advance:
        for form in forms:
            model = _make(args, form)
            for reading in readings:
                lines.append(Line(form, reading, _measure(model, reference, form, reading, advance)))
            del model
            gc.collect()  # an optimised model refers to itself
    lines.sort(key=lambda line: line.reading.by_token)
    worst = _worst(lines)
    if args.json != "-":
        _show(lines, worst)
    if args.json is not None:
        write_json(args.json, _figures(args, lines, worst))
    return int(worst is not None and not worst <= _LIMIT)


# ---- what is asked for -----------------------------------------------------------------------------------------


def _forms(args: argparse.Namespace) -> list[Form]:
    """Stock, unless it is the reference itself, and what the flags name."""
    if args.random_weights is not None and (args.text or args.calibration):
        raise InvalidInput(
            "--text and --calibration need a tokenizer, and random weights have none: use --tokens"
        )
    calibration = None if args.calibration is None else [read_text("--calibration", args.calibration)]
    forms = [] if args.dtype == "float32" else [Form(f"stock {args.dtype}", is_optimized=False)]
    for text in args.quantization or _FORMS:
        if text == _NOT_QUANTISED:
            forms.append(Form(f"optimized {args.dtype}"))
            continue
        quantization = text
        if text.startswith("{"):
            try:
                quantization = json.loads(text)
            except ValueError as error:
                raise InvalidInput(f"--quantization={text} is not JSON ({error})") from error
        hfopt.HfoptConfig.of(quantization)  # before anything is loaded
        forms.append(Form(text, quantization=quantization))
        if calibration is not None:
            forms.append(Form(f"{text}, calibrated", quantization=quantization, calibration=calibration))
    if args.kv_cache is None:
        return forms
    cached = [
        replace(form, name=f"{form.name}, cache {args.kv_cache}", kv_cache=args.kv_cache)
        for form in forms
        if form.is_optimized
    ]
    return forms + cached


def heldout() -> str:
    """The text that the embedded model was not trained on."""
    return str(Path(hfopt.embedded_model(), "heldout.txt"))


def read_text(flag: str, file: str) -> str:
    """The text of a file that a flag names; raises `InvalidInput` where there is none."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{flag}={file} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{flag}={file} is not a text in UTF-8 ({error.reason})") from error
    if not text.strip():
        raise InvalidInput(f"{flag}={file} is empty")
    return text


def _in_float32(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "dtype": "float32"})


def _token_ids(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | None,
) -> torch.Tensor:
    if args.tokens is not None and args.tokens < 2:
        raise InvalidInput(f"--tokens={args.tokens} must be at least 2")
    if tokenizer is None or text is None:
        return prompts.random_ids(model, args.tokens or _RANDOM_TOKENS, 1)["input_ids"][0]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: args.tokens], dtype=torch.int64)
    if len(ids) < 2:
        raise InvalidInput(f"--text={args.text} has {len(ids)} tokens: at least 2 are needed")
    return ids


def _readings(args: argparse.Namespace, model: PreTrainedModel, ids: torch.Tensor) -> list[Reading]:
    config = model.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None) or _WINDOW
    length = min(_WINDOW, positions) if args.window is None else args.window
    if not 1 <= length <= positions:
        raise InvalidInput(f"--window={length} must be from 1 to {positions}, the positions of the model")
    if args.by_token < 0:
        raise InvalidInput(f"--by-token={args.by_token} must not be negative")
    readings = [Reading(False, _windows(ids, length))]
    if args.by_token:
        readings.append(Reading(True, _windows(ids[: args.by_token + 1], length)))
    return readings


def _windows(ids: torch.Tensor, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs [1, tokens] and the ids that follow them [tokens]."""
    inputs, targets = ids[:-1].split(length), ids[1:].split(length)
    return [(each[None], following) for each, following in zip(inputs, targets, strict=True)]


def _make(args: argparse.Namespace, form: Form) -> PreTrainedModel:
    model = load_model(args)
    if not form.is_optimized:
        return model
    return hfopt.optimize(model, quantization=form.quantization, calibration=form.calibration)


# ---- reading ---------------------------------------------------------------------------------------------------


def _measure(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    form: Form,
    reading: Reading,
    advance: Callable[[], None],
) -> Figures:
    sums = Sums()
    for inputs, targets in reading.windows:
        sums.add(_read(model, form, inputs, reading.by_token), _read_whole(reference, inputs), targets)
        advance()
    return sums.figures()


@torch.no_grad()
def _read_whole(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary]."""
    logits: torch.Tensor = model(input_ids, use_cache=False).logits[0]
    return logits


@torch.no_grad()
def _read(model: PreTrainedModel, form: Form, input_ids: torch.Tensor, by_token: bool) -> torch.Tensor:
    """Logits [tokens, vocabulary] of tokens that are read with a cache, one by one or at once."""
    cache: DynamicCache = DynamicCache(config=model.config)
    if form.is_optimized:
        cache = hfopt.IndirectCache(config=model.config, kv_cache=form.kv_cache)
    steps = input_ids.split(1 if by_token else input_ids.shape[1], dim=1)
    given: dict[str, Any] = {str(host.cache_argument(type(model).forward)): cache}
    return torch.cat([model(step, **given).logits[0] for step in steps])


# ---- what is shown ---------------------------------------------------------------------------------------------


def _worst(lines: list[Line]) -> float | None:
    """The largest ratio of the optimised model's error to stock's; None without one of them."""
    stock = {line.reading: line.figures.error for line in lines if not line.form.is_optimized}
    ratios = [
        line.figures.error / stock[line.reading]
        for line in lines
        if line.form.is_judged and line.reading in stock
    ]
    # max() would pass over NaN
    return next((ratio for ratio in ratios if ratio != ratio), max(ratios)) if ratios else None


def _show(lines: list[Line], worst: float | None) -> None:
    rows = []
    for reading, group in itertools.groupby(lines, key=lambda line: line.reading):
        own = list(group)
        rows.append([f"{reading}: stock float32", f"{own[0].figures.reference_perplexity:.3f}", *[""] * 4])
        rows += [_row(line) for line in own]
    show_table(
        ["predictions of a text", "perplexity", "change", "KL, nats", "same best token", "rms error"], rows
    )
    if worst is not None:
        say(f"\nOptimized / stock rms error of logits: {worst:.2f}, allowed {_LIMIT}")


def _row(line: Line) -> list[str]:
    figures = line.figures
    return [
        f"{line.reading}: {line.form.name}",
        f"{figures.perplexity:.3f}",
        f"{figures.change:+.2%}",
        f"{figures.divergence:.2e}",
        f"{figures.agreement:.1%}",
        f"{figures.error:.2e}",
    ]


def _figures(args: argparse.Namespace, lines: list[Line], worst: float | None) -> dict[str, Any]:
    return {
        "arguments": {key: value for key, value in vars(args).items() if key != "function"},
        "forms": [
            {
                "form": line.form.name,
                "quantization": line.form.quantization,
                "kv_cache": line.form.kv_cache,
                "is_calibrated": line.form.calibration is not None,
                "by_token": line.reading.by_token,
                "tokens": line.reading.n_tokens,
                **line.figures._asdict(),
            }
            for line in lines
        ],
        "optimized_to_stock_error": worst,
        "limit": _LIMIT,
    }
