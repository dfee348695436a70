"""`hfopt run`: generate text and say how long it took. The flags are those of ipex.llm's run.py, and more."""

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import hfopt
from hfopt.bench import roofline
from hfopt.bench.measure import Case, Pair, Sample, Summary, alternate, generate, paired_ratio
from hfopt.console import prompts
from hfopt.console.arguments import (
    add_kv_cache,
    add_model_arguments,
    add_quantization,
    load_model,
    load_tokenizer,
    positive,
)
from hfopt.console.output import progress, say, write_json
from hfopt.errors import InvalidInput

from .ranks import add_tensor_parallel, n_ranks

logger = logging.getLogger(__name__)

_BEAMS = 4
_INTERNAL = ("function", "together", "n_ranks")  # no arguments of the user's
_STOCK, _OPTIMIZED = "stock", "optimized"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hfopt run`."""
    parser.add_argument("-m", "--model-id", help="a folder or hub id (default: the embedded model)")
    add_model_arguments(parser)
    add_quantization(parser, "turn the weights of the optimised model into a format")
    add_kv_cache(parser, "cache keys and values of the optimised model")
    parser.set_defaults(together=True)
    add_tensor_parallel(
        parser, "split the model over N processes of this machine (of several: torchrun ... -m hfopt run)"
    )
    parser.add_argument("--prompt", help="the text to continue")
    parser.add_argument(
        "--input-tokens", type=positive, metavar="N", help="a prompt of N tokens instead of --prompt"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=32, metavar="N", help="exactly N (default: %(default)s)"
    )
    parser.add_argument("--greedy", action="store_true", help="the same as --num-beams 1")
    parser.add_argument(
        "--num-beams", type=positive, default=_BEAMS, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--sample", action="store_true", help="sample instead of taking the most likely token"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="texts at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--num-iter",
        type=positive,
        default=5,
        metavar="N",
        help="runs, warm-up included (default: %(default)s)",
    )
    parser.add_argument(
        "--num-warmup", type=int, default=1, metavar="N", help="runs that do not count (default: %(default)s)"
    )
    parser.add_argument(
        "--token-latency", action="store_true", help="print the time of every token of the last run"
    )
    parser.add_argument(
        "--streaming", action="store_true", help="print the text while it is made (one text, no beams)"
    )
    parser.add_argument(
        "--profile", action="store_true", help="profile one more run and print where the time went"
    )
    parser.add_argument(
        "--compare", action="store_true", help="the unpatched model too, in turn with the optimised one"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="figures as JSON to FILE, or instead of the text"
    )


def _load_pair(args: argparse.Namespace) -> tuple[Pair, PreTrainedTokenizerBase | None]:
    """The stock model and the optimised one. Where that is quantised, the stock model is loaded for --compare alone."""
    tokenizer = load_tokenizer(args)
    if args.quantization is None:
        model = load_model(args) if n_ranks() == 1 else _load(args, None)
        return Pair(model, model, args.kv_cache), tokenizer
    # first the one whose float weights are freed: both never are in memory as floats
    if args.random_weights is None:
        optimized = _load(args, args.quantization)
    else:
        model = load_model(args)
        optimized = hfopt.optimize(model, quantization=args.quantization, kv_cache=args.kv_cache)
    stock = optimized
    if args.compare:
        stock = load_model(args) if n_ranks() == 1 else hfopt.restore(_load(args, None))
    return Pair(stock, optimized, args.kv_cache), tokenizer


def _load(args: argparse.Namespace, quantization: str | None) -> PreTrainedModel:
    """The optimised model of a checkpoint, or the part of it that this process has."""
    return hfopt.load(
        args.model_id or hfopt.embedded_model(),
        dtype=getattr(torch, args.dtype),
        quantization=quantization,
        kv_cache=args.kv_cache,
        trust_remote_code=args.trust_remote_code,
        tensor_parallel=n_ranks() > 1,
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    if not 0 <= args.num_warmup < args.num_iter:
        raise InvalidInput(
            f"--num-warmup={args.num_warmup} must be at least 0 and below --num-iter={args.num_iter}"
        )
    if n_ranks() > 1 and args.random_weights is not None:
        raise InvalidInput(
            "--random-weights: processes split what a checkpoint holds, so name one by --model-id"
        )
    pair, tokenizer = _load_pair(args)
    inputs = _inputs(args, pair.stock, tokenizer)
    options = _options(args, tokenizer)
    names = [_STOCK, _OPTIMIZED] if args.compare else [_OPTIMIZED]
    cases = [Case(name, name == _OPTIMIZED, inputs, options) for name in names]

    total = args.num_iter * len(cases)
    with progress("Generating", total, hidden=args.streaming) as advance:
        samples = alternate(pair, cases, args.num_iter - args.num_warmup, args.num_warmup, advance)

    n_rows, n_new = args.batch_size, args.max_new_tokens
    lengths = n_rows, inputs["input_ids"].shape[1], n_rows * options["num_beams"], n_new
    summaries = {
        name: Summary.of(samples[name], n_rows, n_new, roofline.bytes_per_step(model, *lengths, kv_cache))
        for name, model, kv_cache in (
            (_STOCK, pair.stock, None),
            (_OPTIMIZED, pair.optimized, args.kv_cache),
        )
        if name in names
    }
    if args.json != "-":
        _print_text(args, samples[_OPTIMIZED][-1], inputs, tokenizer)
        _print_summaries(args, samples, summaries)
    if args.json is not None:
        write_json(args.json, _figures(args, samples, summaries))
    if args.profile:
        _profile(pair.optimized, cases[-1])
    return 0


def _inputs(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, torch.Tensor]:
    if args.prompt is not None and args.input_tokens is not None:
        raise InvalidInput("--prompt and --input-tokens exclude each other")
    if tokenizer is None:
        if args.prompt is not None:
            raise InvalidInput("--prompt needs a tokenizer, and random weights have none: use --input-tokens")
        return prompts.random_ids(model, args.input_tokens or 32, args.batch_size)
    if args.input_tokens is not None:
        return prompts.of_length(tokenizer, args.input_tokens, args.batch_size)
    return prompts.of_text(
        tokenizer, prompts.DEFAULT_PROMPT if args.prompt is None else args.prompt, args.batch_size
    )


def _options(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    num_beams = 1 if args.greedy else args.num_beams
    options: dict[str, Any] = {
        "do_sample": args.sample,
        "num_beams": num_beams,
        "max_new_tokens": args.max_new_tokens,
        "min_new_tokens": args.max_new_tokens,
    }
    if args.streaming:
        if tokenizer is None or num_beams > 1 or args.batch_size > 1:
            logger.warning("--streaming is ignored: it needs a tokenizer, --greedy and --batch-size 1")
        else:
            options["streamer"] = TextStreamer(tokenizer)
    return options


def _print_text(
    args: argparse.Namespace,
    sample: Sample,
    inputs: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    say(f"---- Prompt size: {inputs['input_ids'].shape[1]}")
    for row in sample.sequences:
        if tokenizer is None:
            say(f"new tokens: {row[inputs['input_ids'].shape[1] :].tolist()}")
        else:
            say(str(tokenizer.decode(row, skip_special_tokens=True)))
    if args.token_latency:
        latencies = " ".join(f"{seconds:.5f}" for seconds in (sample.first, *sample.next))
        say(f"Latency of each token, sec.: {latencies}")


def _print_summaries(
    args: argparse.Namespace, samples: dict[str, list[Sample]], summaries: dict[str, Summary]
) -> None:
    for name, summary in summaries.items():
        title = f"Summary: {name}" if args.compare else "Summary:"
        say(f"\n ---------- {title} ----------")
        for line in summary.lines():
            say(line)
    if args.compare:
        ratios = _ratios(samples)
        say("\n ---------- stock / optimized ----------")
        say("(each run's time of the stock model over that of the optimised one right after it; medians)")
        say(f"First token: {ratios['first']:.2f} times as fast")
        if "next" in ratios:
            say(f"2... tokens: {ratios['next']:.2f} times as fast")
        if ratios["same_tokens"]:
            say("Same tokens: yes")
        elif args.kv_cache is not None and args.quantization is None:
            say(f"Same tokens: no (keys and values in {args.kv_cache} are others)")
        elif args.quantization is not None:
            say(
                f"Same tokens: no (weights in {args.quantization} are others; scripts/accuracy.py says how far)"
            )
        elif args.dtype == "float32":
            say("Same tokens: no")
        else:
            say(f"Same tokens: no (in {args.dtype} both round, at different places; float32 gives the same)")


def _ratios(samples: dict[str, list[Sample]]) -> dict[str, float | bool]:
    stock, optimized = samples[_STOCK], samples[_OPTIMIZED]
    ratios: dict[str, float | bool] = {
        "first": paired_ratio([sample.first for sample in stock], [sample.first for sample in optimized]),
        "same_tokens": torch.equal(stock[-1].sequences, optimized[-1].sequences),
    }
    if stock[0].next:
        ratios["next"] = paired_ratio(
            [sum(sample.next) for sample in stock], [sum(sample.next) for sample in optimized]
        )
    return ratios


def _figures(
    args: argparse.Namespace, samples: dict[str, list[Sample]], summaries: dict[str, Summary]
) -> dict[str, Any]:
    arguments = {key: value for key, value in vars(args).items() if key not in _INTERNAL}
    figures: dict[str, Any] = {"arguments": arguments}
    for name, summary in summaries.items():
        figures[name] = dataclasses.asdict(summary) | {
            "sequences": samples[name][-1].sequences.tolist(),
            "samples": [sample.to_dict() for sample in samples[name]],
        }
    if args.compare:
        figures["ratio"] = _ratios(samples)
    return figures


def _profile(model: PreTrainedModel, case: Case) -> None:
    schedule = torch.profiler.schedule(wait=1, warmup=3, active=1)
    activities: Sequence[torch.profiler.ProfilerActivity] = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, schedule=schedule) as profiler:
        for _ in range(5):
            generate(model, case)
            profiler.step()
    say(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=-1))
