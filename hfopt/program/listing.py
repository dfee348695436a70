"""A program for people to read: what each instruction does, over what, and what a decode step costs at least."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

_HEAD = ("", "operation", "shapes", "then", "weights", "slots")
_TO_THE_RIGHT = (0, 4)


@dataclass(frozen=True)
class Line:
    """A line of a program.

    layer: of the decoder, None before and behind them. then: what the same kernel does to its results. n_bytes: of weights
    that it reads, whatever the number of rows; row_bytes: for each row; token_bytes: for each row and token of its
    context, up to `window` of them. reads, writes: slots by the bytes of scratch a row before them; writes is None for the
    logits.
    """

    name: str
    layer: int | None
    shapes: str
    then: str
    reads: tuple[int, ...]
    writes: int | None
    n_bytes: int = 0
    row_bytes: int = 0
    token_bytes: int = 0
    window: int = sys.maxsize

    @property
    def kind(self) -> tuple[str, ...]:
        """Name, shapes and what follows: equal for instructions that do the same over other weights."""
        return self.name, self.shapes, self.then

    def bytes_read(self, n_rows: int, n_tokens: int) -> int:
        """Bytes that must come from memory in a step of n_rows rows, each with a context of n_tokens."""
        return self.n_bytes + n_rows * (self.row_bytes + self.cached_bytes(n_tokens))

    def cached_bytes(self, n_tokens: int) -> int:
        """Bytes of keys and values that it reads of a context of n_tokens."""
        return min(n_tokens, self.window) * self.token_bytes

    @property
    def slots(self) -> str:
        """As text: from → to."""
        target = "logits" if self.writes is None else f"{self.writes:,}"
        return f"{', '.join(f'{place:,}' for place in self.reads)} → {target}".lstrip()


@dataclass(frozen=True)
class Listing:
    """All instructions of a decode step.

    n_bytes: of weights that a step of one row reads. scratch_bytes: of its arena, for each row. cached_bytes: of a
    context's keys and values, which a step reads, for each token and row.
    """

    instructions: tuple[Line, ...]
    n_bytes: int
    scratch_bytes: int
    cached_bytes: int

    def lines(self, *, folded: bool = True) -> list[str]:
        """As text, aligned; folded: of layers that do the same one after the other, the first only."""
        rows = [_HEAD, *self._rows(folded)]
        widths = [max(len(row[column]) for row in rows if len(row) > 1) for column in range(len(_HEAD))]
        lines = [_line(row, widths) for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines += [
            f"{len(self.instructions)} instructions, {_size(self.n_bytes)} of weights a step",
            f"each row: {_size(self.scratch_bytes)} of scratch, {_size(self.cached_bytes)} of keys and values a token",
        ]
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _rows(self, folded: bool) -> Iterator[tuple[str, ...]]:
        """Cells of the lines; one cell alone is a heading."""
        shown, first_shown = None, 0
        alike: list[int] = []
        for layer, group in groupby(enumerate(self.instructions), lambda pair: pair[1].layer):
            numbered = list(group)
            kinds = [(line.kind, line.bytes_read(1, 0)) for _, line in numbered]
            if folded and layer is not None and kinds == shown:
                alike.append(layer)
                continue
            if alike:
                yield (_as_before(alike, first_shown),)
                alike = []
            shown = kinds if layer is not None else None
            if layer is not None:
                first_shown = layer
                yield (f"layer {layer}",)
            for number, line in numbered:
                yield f"{number}", line.name, line.shapes, line.then, _size(line.bytes_read(1, 0)), line.slots
        if alike:
            yield (_as_before(alike, first_shown),)


def _as_before(layers: list[int], shown: int) -> str:
    several = len(layers) > 1
    return f"layer{'s' * several} {layers[0]}{f'-{layers[-1]}' * several} as layer {shown}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    if len(row) == 1:
        return row[0]
    cells = (
        cell.rjust(width) if column in _TO_THE_RIGHT else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def _size(n_bytes: int) -> str:
    if n_bytes >= 1 << 20:
        return f"{n_bytes / 2**20:,.1f} MiB"
    return f"{n_bytes / 2**10:.1f} KiB" if n_bytes >= 1 << 10 else f"{n_bytes} B" if n_bytes else ""
