"""`hfopt chat`: talk with a model. Its answers are shown while they are made; each turn reads only what is new."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import hfopt
from hfopt.console.arguments import (
    add_kv_cache,
    add_loading,
    add_quantization,
    load_text_tokenizer,
    positive,
)
from hfopt.console.output import say, stream
from hfopt.errors import HfoptError, InvalidInput
from hfopt.words import first_line

_COMMANDS = {
    "/save FILE": "write the messages as JSON",
    "/load FILE": "go on from such a file",
    "/clear": "begin anew",
    "/help": "show this list",
    "/quit": "end, as Ctrl-D does",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hfopt chat`."""
    parser.add_argument("-m", "--model-id", help="a folder or hub id (default: the embedded model)")
    add_loading(parser)
    add_quantization(parser, "turn the weights into a format")
    add_kv_cache(parser, "cache keys and values")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before all else")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=512,
        metavar="N",
        help="of an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--greedy", action="store_true", help="the most likely token, whatever the checkpoint is set to"
    )
    parser.add_argument(
        "--plain", action="store_true", help="text as it is (default: as Markdown in a terminal)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    chat = _chat(args)
    beginning = list(chat.messages)
    for line in _lines():
        try:
            if not line.startswith("/"):
                _answer(chat, line, args.plain)
            elif line == "/quit":
                break
            elif line == "/clear":
                chat.messages = list(beginning)
            else:
                _obey(chat, *line.split(maxsplit=1))
        except HfoptError as error:
            sys.stderr.write(f"hfopt: {error}\n")
    return 0


def _chat(args: argparse.Namespace) -> hfopt.Chat:
    tokenizer = load_text_tokenizer(args)
    model = hfopt.load(
        args.model_id or hfopt.embedded_model(),
        dtype=getattr(torch, args.dtype),
        quantization=args.quantization,
        kv_cache=args.kv_cache,
        trust_remote_code=args.trust_remote_code,
    )
    options: dict[str, Any] = {"do_sample": False} if args.greedy else {}
    if model.generation_config.pad_token_id is None:
        # one text needs none, but transformers speaks of it in each answer
        options["pad_token_id"] = tokenizer.eos_token_id
    return hfopt.Chat(model, tokenizer, system=args.system, max_new_tokens=args.max_new_tokens, **options)


def _lines() -> Iterator[str]:
    """What is typed, line by line, with a history where there is a terminal."""
    prompt = ""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (`input` uses it)
        say("Ctrl-C stops an answer, /help lists the commands.")
        prompt = "> "
    while True:
        try:
            line = input(prompt).strip()
        except KeyboardInterrupt:
            say("")
            continue
        except EOFError:
            return
        if line:
            yield line


def _answer(chat: hfopt.Chat, line: str, plain: bool) -> None:
    with contextlib.closing(chat.send(line)) as pieces, contextlib.suppress(KeyboardInterrupt):
        stream(pieces, plain)


def _obey(chat: hfopt.Chat, name: str, file: str = "") -> None:
    if name == "/help":
        for command, what in _COMMANDS.items():
            say(f"{command:<12}{what}")
    elif name == "/save" and file:
        try:
            text = json.dumps(chat.messages, indent=2, ensure_ascii=False)
            Path(file).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidInput(f"/save {file}: cannot be written ({error.strerror})") from error
    elif name == "/load" and file:
        chat.messages = _messages(file)
    else:
        raise InvalidInput(f"{name}: not a command, or not a whole one; /help lists them")


def _messages(file: str) -> list[dict[str, Any]]:
    try:
        messages = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"/load {file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InvalidInput(f"/load {file}: is not JSON ({first_line(error)})") from error
    if not isinstance(messages, list) or not all(
        isinstance(each, dict) and "role" in each for each in messages
    ):
        raise InvalidInput(f"/load {file}: a list of messages is needed, each of which has a role")
    return messages
