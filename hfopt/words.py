"""How exceptions, dtypes, paths and tables are put into messages and reports, and which dtypes there are kernels for."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights, activations and caches


def first_line(error: Exception) -> str:
    """First line of what an exception says, with the second where that only announces it; its type if it says nothing."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first


def in_words(error: Exception) -> str:
    """Type of an exception and its first line."""
    kind = type(error).__name__
    return f"{kind}: {first_line(error)}" if str(error).strip() else kind


def counted(number: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtypes_in_words(last: str = "") -> str:
    """Those of weights: `torch.float32, torch.bfloat16 or torch.float16`; with a last one more."""
    *first, end = [*map(str, DTYPES), *filter(None, [last])]
    return f"{', '.join(first)} or {end}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of text with aligned columns."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    rule = tuple("-" * width for width in widths)
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, rule, *rows)
    ]


def grouped(entries: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Rows of (paths, *columns): paths that differ only in numbers or in their last name are put together."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path, columns in entries:
        groups.setdefault((re.sub(r"\d+", "#", path), columns), []).append(path)
    siblings: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (_, columns), paths in groups.items():
        parent, _, name = _merged(paths).rpartition(".")
        siblings.setdefault((parent, columns), []).append(name)
    return [(_joined(parent, names), *columns) for (parent, columns), names in siblings.items()]


def _joined(parent: str, names: list[str]) -> str:
    """`layers.0-15.mlp`, or `layers.0-15.{mlp, self_attn}` for several names."""
    together = names[0] if len(names) == 1 else f"{{{', '.join(names)}}}"
    return f"{parent}.{together}" if parent else together or "(the model itself)"


def _merged(paths: list[str]) -> str:
    texts = re.split(r"\d+", paths[0])
    numbers = zip(*(map(int, re.findall(r"\d+", path)) for path in paths), strict=True)
    merged = texts[0]
    for text, values in zip(texts[1:], numbers, strict=True):
        merged += _ranges(sorted(set(values))) + text
    return merged


def _ranges(values: list[int]) -> str:
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
