"""What the command line shows: text and JSON on standard output, progress on standard error."""

import contextlib
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.markdown import Markdown
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.segment import Segments
from transformers.utils import logging as transformers_logging

from hfopt.errors import InvalidInput

_errors = Console(stderr=True)


def silence() -> None:
    """Show and write nothing from now on but errors: another process does."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    _errors.quiet = True
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def say(text: str) -> None:
    """A line of text on standard output, as it is."""
    sys.stdout.write(text + "\n")


def stream(pieces: Iterable[str], plain: bool = False) -> None:
    """Text on standard output while it comes: as Markdown where that is a terminal, unless `plain`, and otherwise as it is.

    What has come is shown, whatever `pieces` raises.
    """
    console, text = Console(), ""
    if plain or not console.is_terminal:
        try:
            for text in pieces:
                sys.stdout.write(text)
                sys.stdout.flush()
        finally:
            if text:
                say("")
        return
    try:
        # what may still change is drawn again and again
        with Live(get_renderable=lambda: _end(text, console), console=console, transient=True) as live:
            for piece in pieces:
                done, text = _paragraphs(text + piece)
                if done:
                    live.console.print(Markdown(done), "")
    finally:
        if text:
            console.print(Markdown(text))


def _end(text: str, console: Console) -> Segments:
    """The last lines of a Markdown text, as many as the terminal shows."""
    lines = console.render_lines(Markdown(text), pad=False, new_lines=True)[1 - console.height :]
    return Segments(itertools.chain.from_iterable(lines))


def _paragraphs(text: str) -> tuple[str, str]:
    """The complete paragraphs at the beginning of a Markdown text, and the rest; a block of code is not taken apart."""
    before, gap, rest = text.rpartition("\n\n")
    return ("", text) if before.count("```") % 2 else (before + gap, rest)


def show_table(columns: list[str], rows: list[list[str]]) -> None:
    """A Markdown table on standard output; all columns but the first are aligned to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *others])} |"

    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for cells in (columns, ruler, *rows):
        say(line(cells))


def write_json(target: str, figures: dict[str, Any]) -> None:
    """Write figures to the file `target`, or to standard output for '-'."""
    if _errors.quiet:
        return
    text = json.dumps(figures, indent=2, default=str) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text)
    except OSError as error:
        raise InvalidInput(f"--json={target} cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def progress(what: str, total: int | None = None, hidden: bool = False) -> Iterator[Callable[[], None]]:
    """A bar on standard error while the body runs (without a total, a spinner); yields what advances it."""
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    if total is not None:
        columns.insert(3, MofNCompleteColumn())
    with Progress(*columns, console=_errors, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def show_messages() -> None:
    """Show the library's warnings on standard error."""
    handler = RichHandler(console=_errors, show_time=False, show_path=False)
    logging.getLogger("hfopt").handlers = [handler]
