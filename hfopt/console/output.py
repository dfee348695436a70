"""What the command line shows: text and JSON on standard output, progress on standard error."""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from hfopt.errors import InvalidInput

_errors = Console(stderr=True)


def say(text: str) -> None:
    """A line of text on standard output, as it is."""
    sys.stdout.write(text + "\n")


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
