"""Command-line arguments that several commands have, and the model that they ask for."""

import argparse

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hfopt
from hfopt.cache import KV_CACHES
from hfopt.console import models
from hfopt.console.output import progress
from hfopt.errors import InvalidInput
from hfopt.quantization import FORMATS
from hfopt.words import DTYPES, dtype_name


def positive(text: str) -> int:
    """The argparse type of counts."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a model, `model_id` apart."""
    parser.add_argument(
        "--random-weights",
        metavar="CONFIG",
        help=f"random weights instead of a checkpoint: a config.json or one of {', '.join(models.SHAPES)}",
    )
    add_loading(parser)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """The flags that say how a checkpoint is loaded."""
    parser.add_argument(
        "--dtype", choices=[*map(dtype_name, DTYPES)], default="bfloat16", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code from the checkpoint (default: never)"
    )


def add_quantization(parser: argparse.ArgumentParser, what: str) -> None:
    """The flag --quantization."""
    parser.add_argument(
        "--quantization",
        choices=sorted(FORMATS),
        metavar="NAME",
        help=f"{what}: {', '.join(sorted(FORMATS))} (default: weights stay as they are)",
    )


def add_kv_cache(parser: argparse.ArgumentParser, what: str) -> None:
    """The flag --kv-cache."""
    parser.add_argument(
        "--kv-cache",
        choices=[kind for kind in KV_CACHES if kind is not None],
        help=f"{what} as 8-bit codes (default: as they are)",
    )


def load_model(args: argparse.Namespace) -> PreTrainedModel:
    """The stock model that the flags ask for."""
    dtype = getattr(torch, args.dtype)
    if args.random_weights is None:
        return models.load(args.model_id or hfopt.embedded_model(), dtype, args.trust_remote_code)
    if args.model_id is not None:
        raise InvalidInput("--model-id and --random-weights exclude each other")
    with progress(f"Making random weights of {args.random_weights}"):
        return models.random_model(models.named_config(args.random_weights), dtype)


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase | None:
    """The tokenizer of that model; random weights have none."""
    return None if args.random_weights is not None else load_text_tokenizer(args)


def load_text_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint that the flags ask for."""
    return models.load_tokenizer(args.model_id or hfopt.embedded_model(), args.trust_remote_code)
